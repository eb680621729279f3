"""The targets of the GPU kernels, and whether a run met them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MISSING = "not measured"
LLAMA_8B = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336))
LLAMA_70B = ((8192, 8192), (10240, 8192), (57344, 8192), (8192, 28672))
SHAPES = (*LLAMA_8B, *LLAMA_70B)
ROWS = (1, 16, 64, 512, 4096)
BANDWIDTH = 70  # percent
LOADED = ("int8", "fp8_per_channel", "int4_weight_only")

Data = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One shape and number of rows: ``speed`` is compared with the target; ``limit`` and ``peers`` are over BF16."""

    where: str
    speed: float
    limit: float | None = None
    peers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A target and what a run measured: ``state`` is met, missed or not measured."""

    what: str
    need: float
    measured: float | None
    where: str
    state: str
    unit: str = "x"
    at_most: bool = False
    compared: bool = False
    beside: Mapping[str, float] = field(default_factory=dict)


def judge(
    what: str,
    need: float,
    cases: Iterable[Case | None],
    unit: str = "x",
    at_most: bool = False,
    compared: bool = False,
) -> Target:
    """The worst case decides: ``missed`` where a case misses, ``met`` only where every case was measured."""
    cases = list(cases)
    measured = [c for c in cases if c is not None]
    if not measured:
        return Target(what, need, None, "", MISSING, unit, at_most, compared)
    worst = (max if at_most else min)(measured, key=lambda c: c.speed)
    holds = worst.speed <= need if at_most else worst.speed >= need
    state = "missed" if not holds else "met" if len(measured) == len(cases) else MISSING
    where = (
        worst.where
        if len(measured) == len(cases)
        else f"{worst.where} ({len(measured)} of {len(cases)} cases measured)"
    )
    beside = {**worst.peers, **({"limit": worst.limit} if worst.limit else {})}
    return Target(what, need, worst.speed, where, state, unit, at_most, compared, beside)


def at(data: Data, shape: tuple[int, int], m: int) -> list[Row]:
    """The timed rows of a shape and a number of rows."""
    rows = data.get("linear", {}).get("rows", [])
    return [r for r in rows if tuple(r["shape"]) == shape and r["m"] == m and r.get("seconds")]


def best(
    data: Data, shape: tuple[int, int], m: int, scheme: str, against: str = "BF16 F.linear"
) -> Case | None:
    """The fastest kernel of a scheme in the requested precision, relative to BF16 or to ``against``."""
    here = at(data, shape, m)
    ours = [
        r for r in here if r.get("kind") == "ours" and r["scheme"] == scheme and r.get("as_requested", True)
    ]
    base = next((r["seconds"] for r in here if r["name"] == "BF16 F.linear"), None)
    other = [r["seconds"] for r in here if r["name"].startswith(against)]
    if not ours or not base or not other:
        return None
    row = min(ours, key=lambda r: r["seconds"])
    peers = {
        p: base / min(r["seconds"] for r in here if r["name"].startswith(p) and r["scheme"] == scheme)
        for p in ("torchao", "gemlite")
        if any(r["name"].startswith(p) and r["scheme"] == scheme for r in here)
    }
    limit = base / row["limit"] if row.get("limit") else None
    return Case(f"{shape[0]}x{shape[1]}, M={m}, {row['kernel']}", min(other) / row["seconds"], limit, peers)


def share(data: Data, shape: tuple[int, int], scheme: str) -> Case | None:
    """The share of the bandwidth bound at one row."""
    case = best(data, shape, 1, scheme)
    return (
        Case(case.where, 100 * case.speed / case.limit, case.limit, case.peers)
        if case and case.limit
        else None
    )


def column(data: Data, stage: str, key: str, names: Iterable[str], by: float = 1.0) -> list[Case | None]:
    """Numbers of the rows of a stage."""
    rows = {r.get("name", r.get("scheme")): r for r in data.get(stage, {}).get("rows", [])}
    return [Case(n, by * rows[n][key]) if rows.get(n, {}).get(key) is not None else None for n in names]


def targets(data: Data) -> list[Target]:
    """Every target, in the order of the page."""

    def over(scheme: str, rows: Iterable[int], against: str = "BF16 F.linear") -> list[Case | None]:
        return [best(data, shape, m, scheme, against) for shape in SHAPES for m in rows]

    def linear(
        what: str, scheme: str, need: float, rows: tuple[int, ...], against: str = "BF16 F.linear"
    ) -> Target:
        return judge(f"{scheme}, {what}", need, over(scheme, rows, against), compared=True)

    many, tell = (512, 4096), "over BF16 at M >= 512"
    quantized = [r["scheme"] for r in data.get("quantize", {}).get("rows", [])] or ["every scheme"]
    return [
        linear(tell, "fp8_per_tensor", 1.6, many),
        linear("over bare _scaled_mm at M >= 512", "fp8_per_tensor", 0.92, many, "bare _scaled_mm"),
        linear(tell, "fp8_per_block", 1.4, many),
        linear("over torch's blockwise scaled_mm at M >= 512", "fp8_per_block", 0.95, many, "bare blockwise"),
        linear(tell, "int8", 1.5, many),
        linear("over BF16 at M = 1", "int4_weight_only", 3.0, (1,)),
        judge(
            "int4_weight_only, of the bandwidth bound at M = 1",
            80,
            [share(data, s, "int4_weight_only") for s in SHAPES],
            "%",
            compared=True,
        ),
        linear("over BF16 at M = 64", "int4_weight_only", 1.0, (64,)),
        linear("over BF16 at M = 1", "fp8_weight_only", 1.7, (1,)),
        linear("over BF16 at M = 1", "int8_weight_only", 1.7, (1,)),
        judge(
            "quantizing a weight, of the copy bandwidth",
            BANDWIDTH,
            column(data, "quantize", "share", quantized, 100),
            "%",
        ),
        judge(
            "loading a checkpoint, over copying its BF16 tensors", 0.85, column(data, "load", "speed", LOADED)
        ),
        judge(
            "peak device memory over quantized bytes + budget",
            1.0,
            column(data, "load", "peak_ratio", LOADED),
            at_most=True,
        ),
        judge(
            "decode of the 8B shape in fp8, over BF16",
            1.5,
            column(data, "decode", "speed", ["fp8_per_channel"]),
        ),
        judge(
            "decode of the 8B shape in int4, over BF16",
            2.2,
            column(data, "decode", "speed", ["int4_weight_only"]),
        ),
    ]
