"""GB/s of BF16 weights that one core quantizes to each scheme: compiled code, the reference, and peers.

One thread, a 4096 x 4096 weight (slow cases fewer rows), all cells of a row in turn, medians. The limit is a copy on one core
that reads the weight and writes as many bytes as the scheme stores. Writes ``benchmarks/results/quantize.md``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from common import markdown, write

from quantport import numerics
from quantport.backend import Scheme
from quantport.plugins.registry import default_registry

N = K = 4096
SLOW_ROWS = 512  # rows for cases that take longer than a second
MX = {
    "mxfp8": torch.float8_e4m3fn,
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp4": torch.float4_e2m1fn_x2,
}
PRESETS = {
    "fp8_per_channel": "FP8_DYNAMIC",
    "fp8_per_block": "FP8_BLOCK",
    "int8": "W8A8",
    "int4_weight_only": "W4A16",
    "mxfp8": "MXFP8",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
}
# Targets in GB/s: these, then 0.5 for the schemes below.
TARGETS = {"int4_mse": 0.2, "nf4": 0.2, "fp4": 0.2}
HALF_GB = (
    "fp8_per_tensor",
    "fp8_per_channel",
    "fp8_per_block",
    "fp8_weight_only",
    "int8",
    "int8_weight_only",
    "mxfp8",
    "mxfp8_weight_only",
    "mxfp6_e2m3",
    "mxfp6_e3m2",
    "mxfp4",
    "mxfp4_weight_only",
    "mxfp4_w4a8",
    "mxfp4_dualscale",
)
Call = Callable[[torch.Tensor], object]


def torchao(name: str) -> Call | None:
    """torchao's quantizer of the same format."""
    if name in MX:
        to_mx = import_module("torchao.prototype.mx_formats.mx_tensor").to_mx
        return lambda w: to_mx(w, MX[name], 32)
    if name == "nvfp4":
        nv = import_module("torchao.prototype.mx_formats.nvfp4_tensor")
        return lambda w: nv.NVFP4Tensor.to_nvfp4(
            w, per_tensor_scale=nv.per_tensor_amax_to_scale(w.abs().amax())
        )
    q = import_module("torchao.quantization")
    configs = {"int8_weight_only": "Int8WeightOnlyConfig", "fp8_weight_only": "Float8WeightOnlyConfig"}
    if name not in configs:
        return None

    def quantize(w: torch.Tensor) -> object:
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(w, requires_grad=False)
        return q.quantize_(torch.nn.Sequential(layer), getattr(q, configs[name])())

    return quantize


def bitsandbytes(name: str) -> Call | None:
    """bitsandbytes' code books, with and without quantized scales."""
    kind, _, double = name.partition(":")
    if kind not in ("nf4", "fp4"):
        return None
    quantize = import_module("bitsandbytes.functional").quantize_4bit
    return partial(quantize, blocksize=64, quant_type=kind, compress_statistics=bool(double))


def compressed_tensors(name: str) -> Call | None:
    """Scales, codes and packing of compressed-tensors, by its presets."""
    if name not in PRESETS:
        return None
    helpers = import_module("compressed_tensors.quantization.utils.helpers")
    schemes = import_module("compressed_tensors.quantization.quant_scheme")
    compressors = import_module("compressed_tensors.compressors")
    infer = import_module("compressed_tensors.compressors.format").infer_module_format
    scheme = schemes.preset_name_to_scheme(PRESETS[name], ["Linear"])
    kind = infer(torch.nn.Linear, scheme)
    compressor = compressors.BaseCompressor.get_value_from_registry(kind.value)

    def quantize(w: torch.Tensor) -> object:
        low, high, extra = *extremes(w, scheme.weights), {}
        if scheme.weights.strategy == "tensor_group":
            extra["weight_global_scale"] = helpers.generate_gparam(w.amin(), w.amax())
        scale, zero = helpers.calculate_qparams(low, high, scheme.weights, extra.get("weight_global_scale"))
        stored = {"weight": w, "weight_scale": scale, "weight_zero_point": zero, **extra}
        return compressor.compress(stored, scheme)

    return quantize


def extremes(w: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest values of the blocks that share a scale."""
    if args.block_structure:
        r, c = args.block_structure
        blocks = w.view(w.shape[0] // r, r, w.shape[1] // c, c)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    blocks = w.unflatten(1, (-1, args.group_size)) if args.group_size else w
    return (
        (blocks.amin(-1), blocks.amax(-1))
        if args.group_size
        else (w.amin(1, keepdim=True), w.amax(1, keepdim=True))
    )


def gguf(name: str) -> Call | None:
    """The quantizers of the gguf package, which has no K types."""
    if name not in ("q4_0", "q8_0"):
        return None
    module = import_module("gguf")
    return lambda w: module.quants.quantize(w.float().numpy(), module.GGMLQuantizationType[name.upper()])


PEERS = {
    "torchao": torchao,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
    "gguf": gguf,
}


def copy(scheme: Scheme) -> Call:
    """The limit: reads the weight, writes the bytes of the scheme."""
    size = min(scheme.bytes(N, K), 2 * N * K)
    out = torch.empty(size, dtype=torch.uint8)

    def run(w: torch.Tensor) -> object:
        flat, part = w.view(-1).view(torch.int64), size * w.numel() // (N * K) // 8
        out[: 8 * part].view(torch.int64).copy_(flat[:part])
        return flat[part:].sum()

    return run


def speeds(calls: dict[str, Call], weight: torch.Tensor, rounds: int) -> dict[str, float | str]:
    """GB/s of each, all measured in turn in every round; or why one does not run."""
    out: dict[str, float | str] = {}
    rows: dict[str, int] = {}
    for name, call in calls.items():
        try:
            call(weight[:SLOW_ROWS])
            start = time.perf_counter()
            call(weight[:SLOW_ROWS])
            rows[name] = N if (time.perf_counter() - start) * N / SLOW_ROWS < 1 else SLOW_ROWS
        except Exception as error:  # a peer that does not run here is a cell that says so
            out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, count in rows.items():
            start = time.perf_counter()
            calls[name](weight[:count])
            times[name].append((time.perf_counter() - start) / count)
    return out | {name: 2e-9 * K / statistics.median(t) for name, t in times.items()}


def row(scheme: Scheme, weight: torch.Tensor, rounds: int, limit: bool = True) -> list[str]:
    """One line of the table."""
    fast = default_registry().backends["cpu"].quantize_weight
    calls: dict[str, Call] = {
        "reference": lambda w: numerics.quantize_weight(w, scheme),
        "limit": copy(scheme),
    }
    if fast(weight[:1], scheme) is not None:
        calls["fast"] = lambda w: fast(w, scheme)
    for peer, make in PEERS.items():
        try:
            if call := make(scheme.name):
                calls[peer] = call
        except ImportError:
            continue
    got = speeds(calls, weight, rounds)
    ours = max(v for name in ("fast", "reference") if isinstance(v := got.get(name), float))
    target = TARGETS.get(scheme.name, 0.5 if scheme.name in HALF_GB else 0)
    peers = "; ".join(
        f"{n} {v:.3f} ({ours / v:.0f}x)" if isinstance(v, float) else f"{n}: {v}"
        for n, v in got.items()
        if n in PEERS
    )
    cell = lambda name: f"{v:.3f}" if isinstance(v := got.get(name), float) else ""  # noqa: E731 - one line beside its use
    mark = "" if not target else f"{target} {'✅' if ours >= target else '❌'}"
    return [f"`{scheme.name}`", cell("fast"), cell("reference"), mark, cell("limit"), peers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("schemes", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    weight = torch.randn(N, K).mul_(0.02).bfloat16()
    table = default_registry().schemes
    names = args.schemes or [n for n in table if n != "bf16"] + [
        "nf4:double",
        "fp4:double",
        "mxfp4:mse",
        "nvfp4:mse",
    ]
    rows = [row(table[name], weight, args.rounds) for name in names]
    columns = [
        "scheme",
        "compiled",
        "reference",
        "must reach",
        "limit",
        "peers (how many times faster ours is)",
    ]
    notes = [
        "GB/s of BF16 weights on one thread. Compiled: with numba; empty where the reference does the work. Limit: a copy on the",
        "same thread, which reads the weight and writes the bytes of the scheme. Peers quantize the same weight in the same run;",
        "compressed-tensors: scales, codes and packing.",
    ]
    text = markdown("Quantizing a weight on one core", columns, rows, notes)
    if args.schemes:
        print(text)
    else:
        write("quantize.md", text)


if __name__ == "__main__":
    main()
