"""``quantport bench``: each scheme's linear layer against BF16 on this machine, as ratios from one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantport import numerics
from quantport.choice import choose
from quantport.host import host
from quantport.kernel import Request, WeightSpec
from quantport.modules import QuantLinear

COLD = 320 << 20  # bytes of copies that one rotates through, so that no cache keeps a weight
Call = Callable[[int, Tensor], object]


def interleaved(calls: dict[str, Call], x: Tensor, copies: int, rounds: int = 7, seconds: float = 0.05) -> dict[str, float]:
    """Times every call in turn, round after round, and returns the median seconds of one call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    counts = {name: max(1, min(64, int(seconds / _once(call, x)))) for name, call in calls.items()}
    for r in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for i in range(counts[name]):
                call((r * counts[name] + i) % copies, x)
            _wait(x)
            times[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(t) for name, t in times.items()}


def _once(call: Call, x: Tensor) -> float:
    call(0, x)
    start = time.perf_counter()
    call(1, x)
    _wait(x)
    return time.perf_counter() - start + 1e-9


def _wait(x: Tensor) -> None:
    if x.device.type != "cpu":
        torch.get_device_module(x.device.type).synchronize()


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading a buffer that no cache holds: the limit of one row."""
    buffer = torch.ones(COLD // 4, dtype=torch.int32, device=device)
    return COLD / interleaved({"read": lambda _i, _x: buffer.sum()}, torch.empty(1, device=device), 2)["read"]


@torch.no_grad()
def bench(schemes: Sequence[str] | None, device: str, size: tuple[int, int], rows: Sequence[int]) -> list[dict[str, Any]]:
    """Measures every scheme at every number of rows.

    Returns:
        For each: ``vs_bf16`` and ``vs_prepacked`` (speed-up over ``F.linear``, and over the device's own prepacked BF16
        where it has one), and ``vs_limit`` (share of the time that reading the weight once would take).
    """
    target, (n, k) = host().device(device), size
    on, dtype = target.torch_device, target.arch.compute
    dense = [torch.randn(n, k, device=on).div_(k**0.5).to(dtype) for _ in range(max(2, COLD // (2 * n * k)))]
    bandwidth = read_bandwidth(on)
    out = []
    for m in rows:
        x = torch.randn(m, k, device=on).to(dtype)
        for name in schemes or list(host().schemes):
            scheme = host().schemes[name]
            spec = WeightSpec(scheme, n, k)
            choice = choose(Request(spec, "linear", target, dtype, m), host().kernels(target.kind))
            layers = [QuantLinear(host().kernel(choice.kernel), spec) for _ in range(max(2, COLD // scheme.bytes(n, k)))]
            for i, layer in enumerate(layers):
                layer.set_weight("", numerics.quantize_weight(dense[i % len(dense)], scheme))
            calls: dict[str, Call] = {
                "bf16": lambda i, x: torch.nn.functional.linear(x, dense[i % len(dense)]),
                "ours": lambda i, x, layers=layers: layers[i % len(layers)](x),  # type: ignore[misc]  # a default argument
            }
            t = interleaved(calls, x, len(dense) * len(layers))
            limit = scheme.bytes(n, k) / bandwidth
            row = {"scheme": scheme.name, "kernel": choice.kernel, "rows": m, "status": str(choice.status)}
            out.append({**row, "vs_bf16": t["bf16"] / t["ours"], "vs_prepacked": None, "vs_limit": limit / t["ours"]})
    return out
