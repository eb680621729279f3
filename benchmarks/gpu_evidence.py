"""The measured evidence of the CUDA room, from the JSON of a run: speed over BF16 and largest error of every kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpu_place import ROOT
from gpu_targets import SHAPES

KEYS = ("device", "date", "commit", "torch", "triton")


def errors(data: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Largest error of each kernel and scheme; those with a case that failed are not there."""
    rows = data.get("checks", {}).get("rows", [])
    return {(r["kernel"], r["scheme"]): r["error"] for r in rows if "error" in r and not r["failures"]}


def evidence(data: Mapping[str, Any], results: str, shape: tuple[int, int] = SHAPES[0]) -> dict[str, Any]:
    """What ``quantport.kernels.tuned`` reads: only kernels that were right in every case that ran.

    Args:
        data: The JSON of a run.
        results: Where that JSON is, from the root of the repository.
        shape: The weight whose speeds count.
    """
    rows = [r for r in data.get("linear", {}).get("rows", []) if tuple(r["shape"]) == shape]
    base = {r["m"]: r["seconds"] for r in rows if r["kind"] == "baseline"}
    right = errors(data)
    kernels: dict[str, dict[str, Any]] = {}
    for row in rows:
        kernel, scheme = row["kernel"], row["scheme"]
        if row["kind"] == "ours" and (kernel, scheme) in right and row["m"] in base:
            cell = kernels.setdefault(kernel, {}).setdefault(
                scheme, {"error": right[kernel, scheme], "speeds": {}}
            )
            cell["speeds"][str(row["m"])] = round(base[row["m"]] / row["seconds"], 3)
    run = {key: data["run"][key] for key in KEYS}
    return {"results": results, "run": run, "shape": list(shape), "kernels": kernels}


def write_evidence(path: Path, data: Mapping[str, Any], save: Callable[[Path, Any], None]) -> str:
    """Writes the evidence of the architecture that a run was on, and says where."""
    measured = evidence(data, f"benchmarks/results/{path.name}")
    if not measured["kernels"]:
        return "no evidence written: no kernel was both checked and measured"
    target = ROOT / "backends" / "cuda" / "quantport_cuda" / "tuned" / f"{data['run']['arch']}.json"
    save(target, measured)
    return f"wrote {target}"
