"""Measured speeds: data in a room, by which kernels are chosen and their evidence is shown.

A room that was measured on an architecture has a file ``tuned/<arch>.json`` in its package::

    {"run": {"device": "NVIDIA H200", "date": "2026-12-01", "commit": "1a2b3c4", ...},
     "shape": [4096, 4096],
     "kernels": {"cuda._scaled_mm": {"fp8_per_channel": {"error": 0.0012, "speeds": {"1": 1.1, "512": 1.7}}}}}

``speeds`` are relative to BF16 in the same run, by the number of tokens, for a weight of ``shape``; ``error``
is the largest relative error against the reference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from quantport.kernels.base import Request
from quantport.kernels.own_speeds import own_table
from quantport.kernels.verdict import Claim, Evidence, Measurement

SMALLEST = 16  # a layer with fewer elements than the measured one by this factor has no known speed


@dataclass(frozen=True)
class Tuned:
    """The measurements of one kernel with one scheme on one architecture.

    Attributes:
        file: Where they are, from the package: ``quantport_cpu/tuned/x86_vnni.json``.
        table: The whole file, with what a room adds to it.
        error: Largest relative error against the reference.
        speeds: Number of tokens -> speed relative to BF16.
        date: When, where it is not the date of the whole table.
    """

    file: str
    table: Mapping[str, Any]
    error: float
    speeds: Mapping[int, float]
    date: str = ""

    def speed(self, request: Request) -> float | None:
        """The speed relative to BF16 at the nearest number of tokens, on a log scale.

        None for a layer much smaller than the measured one: there the overhead of a call decides, which was
        not measured.
        """
        n, k = self.table.get("shape", (0, 0))
        if not self.speeds or SMALLEST * request.weight.n * request.weight.k < n * k:
            return None
        return self.speeds[min(self.speeds, key=lambda m: abs(math.log(m / request.num_tokens)))]

    def claim(self, results: str, built_with: str = "") -> Claim:
        """The claim that a request was measured.

        Args:
            results: The page of the results, for people; the user's own have none but their file.
            built_with: What the kernel was compiled by, as it stands after the commit.
        """
        run = self.table["run"]
        device, date = run["device"], self.date or run["date"]
        if "commit" in run:
            commit, made_of = run["commit"], f"commit {run['commit']}"
        else:  # the user's own
            results, commit, made_of = self.file, run["version"], f"quantport {run['version']}"
        where = f"{device}, {date}, {made_of}{built_with}, relative error {self.error:.1e}"
        proof = Measurement(self.file, device, date, commit)
        return Claim(Evidence.MEASURED, f"{results} ({where})", proof)


@cache
def tuned_table(package: str, arch: str) -> Mapping[str, Any]:
    """The file ``tuned/<arch>.json`` of a package; empty where the architecture was not measured."""
    path = files(package) / "tuned" / f"{arch}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def find_tuned(package: str, kernel: str, request: Request) -> Tuned | None:
    """What was measured of a kernel with the scheme of a request, on its architecture: by the user on this
    device, else by the package.

    Args:
        package: The package of the room.
        kernel: Name of the kernel.
        request: The request.
    """
    arch, scheme = request.device.arch.name, request.weight.scheme.name
    shipped = (f"{package}/tuned/{arch}.json", tuned_table(package, arch))
    for file, table in (own_table(request.device), shipped):
        row = table.get("kernels", {}).get(kernel, {}).get(scheme)
        if row is not None:
            speeds = {int(num_tokens): float(speed) for num_tokens, speed in row["speeds"].items()}
            return Tuned(file, table, row["error"], speeds, row.get("date", ""))
    return None
