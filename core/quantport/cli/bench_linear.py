"""``quantport bench``: each scheme's linear layer against BF16 on this machine, as ratios from one run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import quantport
from quantport import numerics
from quantport.cli.page import Column, Grid, Page, progress
from quantport.device import Device
from quantport.errors import BudgetError, ConfigError, DeviceError
from quantport.kernels.base import Request, WeightSpec
from quantport.kernels.own_speeds import save_own
from quantport.modules import QuantLinear
from quantport.planning.select_kernel import Choice, select_kernel
from quantport.plugins.registry import default_registry
from quantport.scheme import Scheme

COLD = 320 << 20  # bytes of copies that one rotates through, so that no cache keeps a weight
ROWS_OF_ERROR = 16
MOST = 4096  # copies: of weights that are smaller still, a row says that they were warm
Call = Callable[[int, Tensor], object]


@dataclass(frozen=True)
class Effort:
    """How much to measure: bytes of copies, rounds, and seconds of each call in a round."""

    cold: int = COLD
    rounds: int = 7
    seconds: float = 0.05

    def copies(self, size: int) -> int:
        """Copies of a weight of ``size`` bytes: at least two, so that no call has the weight of the call
        before.
        """
        return min(MOST, max(2, math.ceil(self.cold / size)))


QUICK = Effort(1 << 20, 3, 0.002)


def interleaved(
    calls: dict[str, Call], x: Tensor, rounds: int = 7, seconds: float = 0.05
) -> dict[str, float]:
    """Times every call in turn, round after round, and returns the median seconds of one call.

    A call gets a number that grows by one from call to call: which copy of its weight to use.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    counts = {name: max(1, min(64, int(seconds / _once(call, x)))) for name, call in calls.items()}
    for r in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for i in range(r * counts[name], (r + 1) * counts[name]):
                call(i, x)
            _wait(x)
            times[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(t) for name, t in times.items()}


def _once(call: Call, x: Tensor) -> float:
    """Seconds of one call after the first, which compiles and allocates."""
    call(0, x)
    _wait(x)
    start = time.perf_counter()
    call(1, x)
    _wait(x)
    return time.perf_counter() - start + 1e-9


def _wait(x: Tensor) -> None:
    if x.device.type != "cpu":
        torch.get_device_module(x.device.type).synchronize()


def read_bandwidth(device: torch.device, effort: Effort | None = None) -> float:
    """Bytes per second of reading a buffer that no cache holds: the limit of one row."""
    effort = effort or Effort()
    buffer = torch.ones(effort.cold // 4, dtype=torch.float32, device=device)
    t = interleaved(
        {"read": lambda _i, _x: buffer.sum()},
        torch.empty(1, dtype=torch.float32, device=device),
        effort.rounds,
        effort.seconds,
    )
    return effort.cold / t["read"]


@torch.no_grad()
def bench(
    schemes: Sequence[str] | None,
    device: str,
    size: tuple[int, int],
    rows: Sequence[int],
    quick: bool = False,
) -> dict[str, Any]:
    """Measures every scheme at every number of rows.

    Memory: copies of the BF16 weight, of the prepacked BF16 weight where the device has one, and of one
    scheme's.

    Returns:
        The machine, and ``results``, for each: seconds, ``vs_bf16`` and ``vs_prepacked`` (speed-up over
            ``F.linear``,
        and over the device's own prepacked BF16 where it has one), and ``of_limit`` (share of the time that
        reading the weight once would take; None of a row nobody can run), and
            ``error`` (largest relative error against the reference).

    Raises:
        DeviceError: the device is simulated.
        BudgetError: the copies do not fit in its memory.
    """
    target, effort = default_registry().device(device), QUICK if quick else Effort()
    if target.simulated:
        raise DeviceError(
            f"bench {target}",
            "it is simulated: nothing runs on it",
            "a device that `quantport devices` lists",
        )
    if min(size) < 1:
        raise ConfigError(
            f"--size {size[0]} {size[1]}", "a layer of no rows or no columns", "two positive numbers"
        )
    chosen = [
        default_registry().schemes[name]
        for name in schemes or [s for s in default_registry().schemes if s != "bf16"]
    ]
    chosen = list({scheme.name: scheme for scheme in chosen}.values())
    bench_of = _Bench(target, size, effort)
    results: list[dict[str, Any]] = []
    with progress("measuring", "schemes") as report:
        for i, scheme in enumerate(chosen):
            results += bench_of.scheme(scheme, rows)
            report(i + 1, len(chosen), "")
    machine = {
        "device": str(target),
        "name": target.name,
        "threads": torch.get_num_threads(),
        "n": size[0],
        "k": size[1],
    }
    return {**machine, "quick": quick, "read_bandwidth": bench_of.bandwidth, "results": results}


class _Bench:
    """The 16-bit weights of one size on one device, which every scheme is measured against."""

    def __init__(self, target: Device, size: tuple[int, int], effort: Effort) -> None:
        self.target, self.size, self.effort = target, size, effort
        n, k = size
        needed = 3 * max(effort.cold, 2 * 2 * n * k) + 4 * n * k
        if target.memory is not None and needed > target.memory:
            found = f"it needs {needed / 1e9:.1f} GB for copies; {target.memory / 1e9:.1f} GB are free"
            raise BudgetError(f"bench {n} x {k} on {target}", found, "a smaller --size")
        self.device, self.dtype = target.torch_device, target.arch.compute
        self.bandwidth = read_bandwidth(self.device, effort)
        self.weight = (
            torch.randn(n, k, dtype=torch.float32, device=self.device).div_(max(k, 1) ** 0.5).to(self.dtype)
        )
        self.dense = [self.weight.clone() for _ in range(effort.copies(2 * n * k))]
        self.prepacked: dict[str, list[QuantLinear]] = {}

    def choice(self, scheme: Scheme, rows: int) -> Choice:
        """What the plan would choose."""
        spec = WeightSpec(scheme, *self.size)
        return select_kernel(
            Request(spec, "linear", self.target, self.dtype, rows),
            default_registry().kernels(self.target.kind),
        )

    def layers(self, scheme: Scheme, kernel: str) -> list[QuantLinear]:
        """Copies of the layer, quantized once."""
        spec = WeightSpec(scheme, *self.size)
        stored = (
            {"weight": self.weight}
            if scheme.name == "bf16"
            else numerics.quantize_weight(self.weight, scheme)
        )
        out = []
        for _ in range(self.effort.copies(scheme.bytes(*self.size))):
            layer = QuantLinear(default_registry().kernel(kernel), spec, dtype=self.dtype)
            layer.set_weight("", {name: tensor.clone() for name, tensor in stored.items()})
            out.append(layer)
        return out

    def scheme(self, scheme: Scheme, rows: Sequence[int]) -> list[dict[str, Any]]:
        """One scheme at every number of rows; its copies are made again only where another kernel is
        chosen.
        """
        out: list[dict[str, Any]] = []
        made: dict[str, list[QuantLinear]] = {}
        error: float | None = None
        for m in rows:
            choice = self.choice(scheme, m)
            if choice.kernel and choice.kernel not in made:
                made = {choice.kernel: self.layers(scheme, choice.kernel)}
                error = self.error(scheme, made[choice.kernel][0])
            out.append(self.row(scheme, m, choice, made.get(choice.kernel)))
            out[-1]["error"] = error if choice.kernel else None
        return out

    def error(self, scheme: Scheme, layer: QuantLinear) -> float:
        """The largest relative error of a layer against the reference."""
        x = torch.randn(ROWS_OF_ERROR, self.size[1], dtype=torch.float32, device=self.device).to(self.dtype)
        effective = scheme if layer.kernel.quantizes_activations else scheme.weight_only
        expected = numerics.linear(x, layer.stored_weight(), effective).float()
        return float((layer(x).float() - expected).abs().max() / expected.abs().max())

    def baseline(self, rows: int) -> list[QuantLinear]:
        """Copies of the device's prepacked BF16 layer; none where its BF16 is ``F.linear`` itself."""
        scheme = default_registry().schemes["bf16"]
        kernel = self.choice(scheme, rows).kernel if self.dtype is torch.bfloat16 else ""
        if kernel in ("", "torch.linear"):
            return []
        if kernel not in self.prepacked:
            self.prepacked = {kernel: self.layers(scheme, kernel)}
        return self.prepacked[kernel]

    def row(
        self, scheme: Scheme, rows: int, choice: Choice, layers: list[QuantLinear] | None
    ) -> dict[str, Any]:
        """Measures one scheme at one number of rows."""
        labels = {"scheme": scheme.name, "kernel": choice.kernel, "rows": rows, "status": str(choice.status)}
        if not layers:
            nothing = dict.fromkeys(("seconds", "seconds_bf16", "vs_bf16", "vs_prepacked", "of_limit"))
            return {**labels, **nothing, "cold": False, "reason": "; ".join(choice.reasons)}
        x = torch.randn(rows, self.size[1], dtype=torch.float32, device=self.device).to(self.dtype)
        dense, packed = self.dense, self.baseline(rows)
        calls: dict[str, Call] = {
            "bf16": lambda i, x: linear(x, dense[i % len(dense)]),
            "ours": lambda i, x: layers[i % len(layers)](x),
        }
        if packed:
            calls["prepacked"] = lambda i, x: packed[i % len(packed)](x)
        t = interleaved(calls, x, self.effort.rounds, self.effort.seconds)
        size = scheme.bytes(*self.size)
        return {
            **labels,
            "seconds": t["ours"],
            "seconds_bf16": t["bf16"],
            "vs_bf16": t["bf16"] / t["ours"],
            "vs_prepacked": t["prepacked"] / t["ours"] if packed else None,
            "of_limit": size / self.bandwidth / t["ours"],
            "cold": len(layers) * size >= COLD,
            "reason": "",
        }


def save(found: dict[str, Any]) -> Path:
    """Adds what `bench` measured to the user's own measurements, which the plan prefers; speeds are relative
    to the faster of ``F.linear`` and the device's own prepacked BF16.

    Raises:
        SaveError: they cannot be written.
    """
    target, date = (
        default_registry().device(found["device"].partition(" ")[0]),
        f"{datetime.now(timezone.utc):%Y-%m-%d}",
    )
    kernels: dict[str, dict[str, Any]] = {}
    for r in found["results"]:
        if not r["kernel"]:
            continue
        row = {"error": r["error"], "speeds": {}, "date": date}
        row = kernels.setdefault(r["kernel"], {}).setdefault(r["scheme"], row)
        baselines = [r["vs_bf16"], r["vs_prepacked"] if r["scheme"] != "bf16" else None]
        row["speeds"][str(r["rows"])] = round(min(x for x in baselines if x is not None), 3)
    versions = {"version": quantport.__version__, "torch": torch.__version__}
    run = {"device": target.name, "date": date, "threads": found["threads"], **versions}
    made_with = default_registry().backends[target.kind].measured_with()
    table = {**made_with, "run": run, "shape": [found["n"], found["k"]], "kernels": kernels}
    return save_own(target, table)


def bench_page(found: dict[str, Any]) -> Page:
    """Ratios against BF16, one row for each scheme and number of rows."""
    numbers = (
        ("us", "seconds", 1e6),
        ("x BF16", "vs_bf16", 1),
        ("x prepacked", "vs_prepacked", 1),
        ("of read limit", "of_limit", 1),
    )
    columns = (
        Column("scheme"),
        Column("kernel", 1),
        Column("rows", right=True),
        *(Column(n, right=True) for n, _, _ in numbers),
    )
    rows = []
    for r in found["results"]:
        cells = ("-" if r[key] is None else f"{r[key] * by:.{0 if by > 1 else 2}f}" for _, key, by in numbers)
        rows.append((r["scheme"], r["kernel"] or "-", str(r["rows"]), *cells))
    title = (
        f"linear {found['n']} x {found['k']} on {found['device']}, {found['threads']} threads, against "
        "F.linear in BF16"
    )
    page = Page(found, [Grid(columns, rows, title)], "quantport bench")
    if path := found.get("saved"):
        page.say(f"saved: {path}; the plan prefers it with {found['threads']} threads")
    if found["quick"]:
        page.say("quick: few copies and rounds; these are no measurements", "warn")
    elif any(r["seconds"] and not r["cold"] for r in found["results"]):
        page.say("the weights are too small to be cold in cache", "warn")
    for reason in dict.fromkeys(f"{r['scheme']}: {r['reason']}" for r in found["results"] if r["reason"]):
        page.say(f"reason: {reason}", "warn")
    return page
