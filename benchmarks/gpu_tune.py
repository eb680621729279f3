"""Searches configurations of the Triton kernels near those of ``quantport_triton/tuned``, and writes them for this architecture.

For each entry of each family, candidates halve or double one or two numbers. A candidate is compiled, checked against the
present entry, and timed on the shape of an 8B layer; the present entry stays unless a candidate is 3% faster.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_place import ROOT, Place, interleaved, one_line

SHAPE, SMOKE = (4096, 4096), (32, 256)
SCHEMES = (
    "int4_weight_only",
    "fp8_weight_only",
    "mxfp4_weight_only",
    "fp8_per_channel",
    "fp8_per_block",
    "int8",
)
TUNED = ROOT / "backends" / "triton" / "quantport_triton" / "tuned"
LIMITS = {"warps": (1, 16), "stages": (1, 6)}
Entry = dict[str, Any]


def candidates(entry: Entry) -> list[Entry]:
    """The entry as it is, then those with one number or two halved or doubled."""
    numbers = [
        key
        for key, value in entry.items()
        if key != "max_rows" and isinstance(value, int) and not isinstance(value, bool) and value > 0
    ]
    out = [entry]
    for i, key in enumerate(numbers):
        for other in numbers[i:]:
            for a in (0.5, 2):
                for b in (0.5, 2) if other != key else (1,):
                    new = {**entry, key: int(entry[key] * a)}
                    new[other] = int(new[other] * b)
                    if all(
                        LIMITS.get(k, (1, 1 << 16))[0] <= new[k] <= LIMITS.get(k, (1, 1 << 16))[1]
                        for k in (key, other)
                    ):
                        out.append(new)
    return sorted(out, key=lambda e: sum(e[k] != entry[k] for k in numbers))


@contextmanager
def using(family: str, entry: Entry) -> Iterator[None]:
    """A family has this entry inside, for any number of rows."""
    from quantport_triton import tuned

    original = tuned.entries

    def patched(target: str, name: str) -> tuple[Entry, ...]:
        return ({**entry, "max_rows": None},) if name == family else original(target, name)

    def install(entries: Any) -> None:
        tuned.entries = entries
        tuned.tuned_kernel.cache_clear()
        tuned.tuned_config.cache_clear()

    install(patched)
    try:
        yield
    finally:
        install(original)


class Trial:
    """One family at one number of rows: up to three schemes of ``SCHEMES`` that its kernel accepts."""

    def __init__(self, place: Place, kernel: Any, m: int) -> None:
        from quantport import numerics
        from quantport.kernels.base import Request, WeightSpec
        from quantport.kernels.verdict import Accepted
        from quantport.plugins.registry import default_registry

        self.place, self.kernel = place, kernel
        n, k = SMOKE if place.smoke else SHAPE
        dtype = place.dtypes[0]
        self.x = torch.randn(m, k, device=place.torch).to(dtype)
        dense = torch.randn(n, k, device=place.torch).mul_(0.02).to(dtype)
        specs = [
            WeightSpec(default_registry().schemes[s], n, k) for s in (SCHEMES[:1] if place.smoke else SCHEMES)
        ]
        accepted = [
            s
            for s in specs
            if isinstance(kernel.verdict(Request(s, "linear", place.device, dtype)), Accepted)
        ]
        self.packed = []
        for spec in accepted[:3]:
            packed = kernel.pack(numerics.quantize_weight(dense, spec.scheme), spec)
            size = sum(t.nbytes for t in packed)
            self.packed.append((spec, [tuple(t.clone() for t in packed) for _ in range(place.copies(size))]))

    def outputs(self) -> list[torch.Tensor]:
        """The output of each scheme."""
        return [self.kernel.run(self.x, copies[0], None, spec) for spec, copies in self.packed]

    def seconds(self) -> float:
        """Geometric mean of the medians, so that every scheme counts alike."""
        total = 1.0
        for spec, copies in self.packed:

            def call(i, spec=spec, copies=copies):
                return self.kernel.run(self.x, copies[i % len(copies)], None, spec)

            total *= interleaved(self.place, {"": call}, 3)[""]
        return float(total ** (1 / max(1, len(self.packed))))

    def differs(self, expected: list[torch.Tensor]) -> bool:
        """Whether an output is further from the expected one than the kernel's tolerance."""
        pairs = zip(self.outputs(), expected, strict=True)
        return not all(
            (a.float() - b.float()).abs().max() <= 2 * self.kernel.tolerance * b.float().abs().max()
            for a, b in pairs
        )


def fastest(place: Place, kernel: Any, entry: Entry, m: int) -> tuple[Entry, str]:
    """The fastest candidate of an entry, and a line for the report."""
    trial = Trial(place, kernel, m)
    if not trial.packed:
        return entry, "no scheme to try it with"
    best, tried = entry, 0
    with using(kernel.family, entry):
        expected, before = trial.outputs(), trial.seconds()
    least = before
    for candidate in candidates(entry)[1 : 3 if place.smoke else None]:
        if place.over():
            break
        try:
            with using(kernel.family, candidate):
                if not trial.differs(expected) and (seconds := trial.seconds()) < 0.97 * least:
                    best, least = candidate, seconds
            tried += 1
        except Exception:  # a candidate that does not compile, or wants more shared memory than there is
            continue
    return best, f"{before / least:.2f}x of what it was, {tried} tried"


def run(place: Place, out: Path | None) -> str:
    """Searches every family; each entry has an equal share of the time. Returns the report."""
    from quantport_triton import tuned
    from quantport_triton.launch import target_of

    default = json.loads((TUNED / "default.json").read_text(encoding="utf-8"))
    target = target_of(place.torch)
    path = out or TUNED / f"{target}.json"
    kernels = {getattr(k, "family", ""): k for k in place.kernels}
    lines = [f"{family}: no kernel of this name" for family in default if family not in kernels]
    result = {family: list(tuned.entries(target, family)) for family in default}
    todo = [(family, i) for family in default if family in kernels for i in range(len(result[family]))]
    for done, (family, i) in enumerate(todo):
        entry = result[family][i]
        rows = entry["max_rows"] or 4096
        share = (place.until - time.monotonic()) / (len(todo) - done)
        with torch.no_grad():
            try:
                result[family][i], line = fastest(
                    place.within(share), kernels[family], entry, 2 if place.smoke else rows
                )
            except Exception as error:  # the others go on
                line = one_line(error)
        lines.append(f"{family}, {entry['max_rows']} rows: {line}")
    if place.smoke and out is None:
        return "\n".join([*lines, "smoke mode: nothing written"])
    body = ",\n".join(
        f'  "{f}": [\n' + ",\n".join(f"    {json.dumps(w)}" for w in ws) + "\n  ]" for f, ws in result.items()
    )
    path.write_text("{\n" + body + "\n}\n", encoding="utf-8")
    return "\n".join([*lines, f"wrote {path}"])
