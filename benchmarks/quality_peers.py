"""Other implementations on the same weights: each peer is a function from a BF16 weight to its dequantized values.

A peer that is not installed is left out and named. Each package runs with its defaults without calibration.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Values = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One peer implementation.

    Attributes:
        name: For the table.
        scheme: The scheme of quantport that it is compared with; its activations are quantized as that scheme says.
        values: Function from a weight ``[n, k]`` in bf16 to the values of the peer's quantized weight in fp32.
        bits: Bits per weight; None for those of the scheme.
    """

    name: str
    scheme: str
    values: Values
    bits: float | None = None


def compressed_tensors(
    strategy: str, kind: str, num_bits: int, scale_dtype: torch.dtype | None = None, **args: Any
) -> Values:
    """Minimum and maximum of each block, ``calculate_qparams``, ``fake_quantize``: round to nearest as vLLM loads it."""
    q = importlib.import_module("compressed_tensors.quantization")
    forward = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    helpers = importlib.import_module("compressed_tensors.quantization.utils")
    settings = q.QuantizationArgs(
        num_bits=num_bits, type=kind, strategy=strategy, symmetric=True, scale_dtype=scale_dtype, **args
    )
    rows, cols = args.get("block_structure") or {"tensor": (0, 0), "channel": (1, 0)}.get(
        strategy, (1, args.get("group_size"))
    )

    def values(weight: Tensor) -> Tensor:
        n, k = weight.shape
        r, c = rows or n, cols or k
        wide = torch.nn.functional.pad(weight.float(), (0, -k % c, 0, -n % r))
        blocks = wide.view(wide.shape[0] // r, r, wide.shape[1] // c, c)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        outer = helpers.generate_gparam(low.amin(), high.amax()) if strategy == "tensor_group" else None
        if kind == "int" and strategy == "group":  # the scales of a BF16 checkpoint are BF16
            low, high = low.bfloat16(), high.bfloat16()
        scale, zero = helpers.calculate_qparams(low, high, settings, global_scale=outer)
        scale = scale.float()
        whole = wide if strategy != "block" else weight.float()
        return forward.fake_quantize(whole, scale, zero, settings, global_scale=outer)[:n, :k]

    return values


def torchao_mx(dtype: str) -> Values:
    """torchao's MX tensors with RCEIL scales, which its inference configuration uses."""
    mx = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
    mode = importlib.import_module("torchao.prototype.mx_formats.config").ScaleCalculationMode.RCEIL
    return lambda w: mx.MXTensor.to_mx(w, getattr(torch, dtype), 32, mode).dequantize(torch.float32)


def torchao_nvfp4() -> Values:
    """torchao's NVFP4 tensors with a scale for the whole tensor."""
    nv = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")
    return lambda w: nv.NVFP4Tensor.to_nvfp4(
        w, per_tensor_scale=nv.per_tensor_amax_to_scale(w.abs().amax())
    ).dequantize(torch.float32)


def bitsandbytes(kind: str, double: bool) -> Values:
    """bitsandbytes' 4-bit code books in blocks of 64 consecutive weights."""
    f = importlib.import_module("bitsandbytes.functional")

    def values(weight: Tensor) -> Tensor:
        # The same blocks; on the CPU its dequantization fails where 64 does not divide K.
        rows = weight.float().reshape(-1, 64)
        packed, state = f.quantize_4bit(rows, blocksize=64, quant_type=kind, compress_statistics=double)
        return f.dequantize_4bit(packed, state).float().view(weight.shape)

    return values


def gguf(kind: str) -> Values:
    """The quantizers in Python of the gguf package."""
    g = importlib.import_module("gguf")
    of = getattr(g.GGMLQuantizationType, kind)
    return lambda w: torch.from_numpy(g.quants.dequantize(g.quants.quantize(w.float().numpy(), of), of))


def hqq() -> Values:
    """HQQ's own solver: 4 bits, groups of 64; scale and zero point stored in BF16, as ``HQQLinear`` does for a BF16 model."""
    q = importlib.import_module("hqq.core.quantize").Quantizer

    def values(weight: Tensor) -> Tensor:
        codes, meta = q.quantize(
            weight.float(), nbits=4, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32
        )
        meta |= {key: meta[key].bfloat16().float() for key in ("scale", "zero")}
        return q.dequantize(codes, meta).float()

    return values


def _makers() -> list[tuple[str, str, Callable[[], Values], float | None]]:
    e4m3 = torch.float8_e4m3fn
    ct = compressed_tensors
    out: list[tuple[str, str, Callable[[], Values], float | None]] = [
        ("compressed-tensors FP8 tensor", "fp8_per_tensor", lambda: ct("tensor", "float", 8), None),
        ("compressed-tensors FP8 channel", "fp8_per_channel", lambda: ct("channel", "float", 8), None),
        (
            "compressed-tensors FP8 block",
            "fp8_per_block",
            lambda: ct("block", "float", 8, block_structure=[128, 128]),
            None,
        ),
        ("compressed-tensors INT8", "int8", lambda: ct("channel", "int", 8), None),
        (
            "compressed-tensors W4A16 g128",
            "int4_weight_only",
            lambda: ct("group", "int", 4, group_size=128),
            None,
        ),
        (
            "compressed-tensors W4A16 g32",
            "int4_weight_only_g32",
            lambda: ct("group", "int", 4, group_size=32),
            None,
        ),
        ("compressed-tensors W4A8", "int4_w4a8", lambda: ct("group", "int", 4, group_size=128), None),
    ]
    for bits, scheme in ((8, "mxfp8"), (6, "mxfp6_e2m3"), (4, "mxfp4"), (4, "mxfp4_weight_only")):
        name = f"compressed-tensors MXFP{bits}" + ("A16" if scheme.endswith("only") else "")
        out.append((name, scheme, lambda b=bits: ct("group", "float", b, torch.uint8, group_size=32), None))
    for name, scheme in (("NVFP4", "nvfp4"), ("NVFP4A16", "nvfp4_weight_only")):
        out.append(
            (
                f"compressed-tensors {name}",
                scheme,
                lambda: ct("tensor_group", "float", 4, e4m3, group_size=16),
                None,
            )
        )
    for dtype, label, scheme in (
        ("float8_e4m3fn", "MXFP8", "mxfp8"),
        ("float4_e2m1fn_x2", "MXFP4", "mxfp4"),
        ("float4_e2m1fn_x2", "MXFP4 weights", "mxfp4_weight_only"),
    ):
        out.append((f"torchao {label} rceil", scheme, lambda d=dtype: torchao_mx(d), None))
    out += [
        ("torchao NVFP4", "nvfp4", torchao_nvfp4, None),
        ("torchao NVFP4 weights", "nvfp4_weight_only", torchao_nvfp4, None),
    ]
    for kind in ("nf4", "fp4"):
        out.append((f"bitsandbytes {kind.upper()}", kind, lambda k=kind: bitsandbytes(k, False), 4.5))
        out.append(
            (
                f"bitsandbytes {kind.upper()} double",
                f"{kind}:double",
                lambda k=kind: bitsandbytes(k, True),
                4 + 8 / 64 + 32 / 64 / 256,
            )
        )
    out += [(f"gguf {k}", k.lower(), lambda k=k: gguf(k), None) for k in ("Q4_0", "Q8_0")]
    out.append(("HQQ 4 bits g64", "int4_hqq", hqq, None))
    return out


def peers() -> tuple[list[Peer], list[str]]:
    """The peers that are installed, and the names of the others."""
    installed, missing = [], []
    for name, scheme, make, bits in _makers():
        try:
            installed.append(Peer(name, scheme, make(), bits))
        except ImportError:
            missing.append(name)
    return installed, missing
