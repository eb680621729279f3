"""Quantized weights times activations in 16 bits: every 4-, 6- and 8-bit format, on every architecture that
Triton compiles for.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from quantport.backend import Packed, Request, Scheme, StoredWeight, WeightSpec
from quantport_triton.kernels.base import TritonKernel
from quantport_triton.kernels.tiling import split_k
from quantport_triton.kernels.weights import FORMATS, Stored, stored
from quantport_triton.launch import Config, launch, target_of
from quantport_triton.tuned import tuned_config, tuned_kernel


class TritonWeightOnly(TritonKernel):
    """W4A16, W6A16 and W8A16: codes are decoded in registers, next to the matrix unit.

    With few tokens the codes are read once. With many (``tuned``), where the matrix unit is the limit and not
    the memory, each call decodes the weight once for the vendor's own matmul.
    """

    family = "weight_only"
    tolerance = 2.0**-7

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        blocks = quant.block_shape[0] > 0 and quant.group_size % 8 == 0
        return quant.format in FORMATS and (blocks or (quant.block_shape == (0, 0) and not quant.zero_point))

    def slow(self, request: Request) -> str:
        k, bits = request.weight.k, request.weight.scheme.weight.element.bits
        if bits != 6 and k * bits % 32:
            return f"codes are read byte by byte: K is {k}, not a multiple of {32 // bits}"
        if self.kernel_of(request) == "dequantize":
            copy = "it writes and reads a 16-bit copy of the weight at every call"
            return f"at {request.num_tokens} rows {copy}"
        return ""

    @property
    def keeps_layout(self) -> bool:
        return True

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        packed = super().pack(stored_weight, spec)
        # Makes the table of a code book now, since a CUDA graph that captures a forward must not.
        stored(packed, spec)
        return packed

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        target, num_tokens = target_of(x.device), x.shape[0]
        kernel = tuned_kernel(target, self.family, num_tokens)
        if kernel == "dequantize":
            return torch.nn.functional.linear(x, dequantized(x, packed, spec), bias)
        weight = stored(packed, spec)
        config = _in_words(tuned_config(target, self.family, num_tokens), weight)
        return (_gemv if kernel == "gemv" else _gemm)(x, weight, bias, spec, config)


def _in_words(config: Config, weight: Stored) -> Config:
    """The configuration with ``BW``, the words of a block along K, in place of ``BK``, its codes."""
    blocks = {
        ("BW" if key == "BK" else key): size // (weight.codes_per_word if key == "BK" else 1)
        for key, size in config.blocks.items()
    }
    return Config(blocks, config.warps, config.stages)


def dequantized(x: Tensor, packed: Packed, spec: WeightSpec) -> Tensor:
    """The weight ``[N, K]`` in the dtype and on the device of ``x``, as ``numerics.dequantize_weight``."""
    from quantport_triton.ops import weight_only as ops

    weight = stored(packed, spec)
    config = _in_words(tuned_config(target_of(x.device), "weight_only", sys.maxsize), weight)
    values = x.new_empty(spec.n, spec.k)
    grid = (-(-weight.numbers["words_per_row"] // config.blocks["BW"]), -(-spec.n // config.blocks["BN"]))
    numbers = {"N": spec.n, "K": spec.k, **weight.numbers}
    launch(ops.dequantize, grid, config, {**weight.tensors, "y": values}, numbers, **weight.constants)
    return values


def _gemv(x: Tensor, weight: Stored, bias: Tensor | None, spec: WeightSpec, config: Config) -> Tensor:
    from quantport_triton.ops import weight_only as ops

    y = x.new_empty(x.shape[0], spec.n)
    tensors = {"x": x, **weight.tensors, "bias": y if bias is None else bias, "y": y}
    numbers = {"N": spec.n, "K": spec.k, **weight.numbers}
    grid = (-(-spec.n // config.blocks["BN"]), x.shape[0])
    launch(ops.gemv, grid, config, tensors, numbers, **weight.constants, BIAS=bias is not None)
    return y


def _gemm(x: Tensor, weight: Stored, bias: Tensor | None, spec: WeightSpec, config: Config) -> Tensor:
    from quantport_triton.ops import weight_only as ops

    m, blocks = x.shape[0], dict(config.blocks)
    tiles = (-(-spec.n // blocks["BN"]), -(-m // blocks["BM"]))
    split = split_k(
        tiles[0] * tiles[1], blocks.pop("PROGRAMS"), weight.numbers["words_per_row"] // blocks["BW"]
    )
    y = x.new_empty(m, spec.n)
    out = y if split == 1 else x.new_empty(split, m, spec.n, dtype=torch.float32)
    tensors = {"x": x, **weight.tensors, "bias": y if bias is None else bias, "y": out}
    config = Config({**blocks, "SPLIT": split}, config.warps, config.stages)
    numbers = {"M": m, "N": spec.n, "K": spec.k, **weight.numbers}
    launch(ops.gemm, (*tiles, split), config, tensors, numbers, **weight.constants, BIAS=bias is not None)
    if split > 1:
        tensors = {"parts": out, "scale": tensors["scale"], "bias": tensors["bias"], "y": y}
        constants = {key: weight.constants[key] for key in ("SCALE_ROWS", "GROUP")}
        config = Config({"SPLIT": split, "BN": 256})
        numbers, grid = {"M": m, "N": spec.n}, (-(-spec.n // 256), m)
        launch(ops.add, grid, config, tensors, numbers, **constants, BIAS=bias is not None)
    return y
