"""Reference weights and the reference linear layer of every scheme."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from quantport.errors import ConfigError, ShapeError, WeightError
from quantport.numerics import gguf
from quantport.numerics.blocks import Reduce, check_finite, dequantize, quantize_blocks
from quantport.numerics.double import dequantize_scales
from quantport.numerics.elements import decode, encode
from quantport.numerics.packing import unpack_bits, unpack_int4
from quantport.numerics.rotation import rotate
from quantport.numerics.scales import scale_values
from quantport.numerics.solvers import checked, solver_of
from quantport.scheme import Quant, Scheme, Solver, Stats
from quantport.scheme.formats import BF16
from quantport.scheme.scheme import INPUT_SCALE, INPUT_ZERO, ORDER

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
Fast = Callable[[Tensor, Scheme], dict[str, Tensor] | None]


def quantize_weight(
    weight: Tensor,
    scheme: Scheme,
    name: str = "weight",
    nonfinite: str = "error",
    fast: Fast | None = None,
    reduce: Reduce | None = None,
    *,
    solver: Solver | None = None,
    stats: Stats | None = None,
) -> dict[str, Tensor]:
    """Quantizes one weight to the stored layout of its scheme.

    Args:
        weight: ``[n, k]``, bf16, fp16 or fp32, on any device.
        scheme: The scheme.
        name: For the error text.
        nonfinite: ``error`` refuses NaN and Inf; ``zero`` reads each of them as 0.
        fast: A backend's ``quantize_weight``: equal to the solver of the scheme's rule, and may decline with
            None. Not asked where another solver decides.
        reduce: For a shard of a larger weight: takes maxima over all shards where a scale spans them.
        solver: Finds codes and scales; by default the one that the scheme names.
        stats: Of the inputs of the layer, for solvers that use them.

    Returns:
        The tensors of ``scheme.layout(n, k)``.

    Raises:
        WeightError: wrong rank or dtype; a NaN or Inf while ``nonfinite="error"``; or values so near the end
            of their dtype that they would come back as Inf.
        ConfigError: the solver cannot solve the scheme, or a shard of a weight; or the scheme stores a scale
            of activations.
        BackendError: the solver returns other tensors than the scheme stores.
    """
    if weight.dim() != 2 or weight.dtype not in FLOATS:
        raise WeightError(
            f"quantize {name} to {scheme.name}",
            f"shape {list(weight.shape)}, dtype {weight.dtype}",
            "a matrix [out, in] in bfloat16, float16 or float32",
        )
    if scheme.static:
        found = "no scale of activations: those are measured on data, by whoever makes a checkpoint"
        raise ConfigError(f"quantize {name} to {scheme.name}", found, f"{scheme.per_token.name!r}")
    if scheme.weight.element is BF16:
        return {"weight": weight.to(torch.bfloat16, copy=True)}
    if scheme.ordered:
        plain = quantize_weight(
            weight, scheme.in_order, name, nonfinite, fast, reduce, solver=solver, stats=stats
        )
        return {**plain, ORDER: torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device)}
    by_rule = solver is None and scheme.solver is None
    solver = solver or solver_of(scheme, reduce)
    if not by_rule:
        if nonfinite == "zero":
            weight = torch.nan_to_num(weight, nan=0.0, posinf=0.0, neginf=0.0)
        check_finite(weight, name, weight)
    rotated = rotate(weight.float(), scheme.rotation) if scheme.rotation else weight
    stored = fast(rotated, scheme) if fast and by_rule and not reduce else None
    if stored is None:
        stored = checked(solver.solve(rotated, scheme, stats), scheme, weight.shape, solver)
    if nonfinite == "zero" and not (_is_bounded(stored, scheme, weight.dtype) or weight.isfinite().all()):
        finite = torch.nan_to_num(weight, nan=0.0, posinf=0.0, neginf=0.0)
        return quantize_weight(finite, scheme, name, "error", fast, reduce, solver=solver, stats=stats)
    check_held(stored, scheme, weight, weight.dtype, name)
    return stored


def check_held(
    stored: dict[str, Tensor], scheme: Scheme, weight: Tensor, dtype: torch.dtype, name: str
) -> None:
    """Refuses a weight that would come back as Inf or NaN in its dtype; a rotation is not undone before.

    Raises:
        WeightError: names the weight.
    """
    if not _is_bounded(stored, scheme, dtype):
        plain = replace(scheme, rotation=0)
        check_finite(dequantize_weight(stored, plain, weight.shape[1], dtype), name, weight)


def _is_bounded(stored: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> bool:
    return bool(_bound(stored, scheme).to(dtype).isfinite().all())


def _bound(stored: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """What no magnitude in a block is above: fp32, not finite where the weight holds a NaN or an Inf."""
    quant = scheme.weight
    if quant.element.block:
        return gguf.scales(stored["weight_blocks"], quant.element) * gguf.LARGEST
    if quant.scale_quant:
        scale = dequantize_scales(stored)
    else:
        scale = scale_values(stored["weight_scale"], quant.scale)
    if "weight_global_scale" in stored:
        scale = scale / stored["weight_global_scale"]
    elif quant.outer_block:
        blocks = stored["weight_outer_scale"].repeat_interleave(quant.outer_block[1] // quant.group_size, 1)
        scale = scale * blocks[:, : scale.shape[1]]
    bound = scale * max(-quant.element.low, quant.element.high)
    return bound + stored["weight_zero"].float().abs() if quant.zero_point else bound


def dequantize_weight(
    stored: dict[str, Tensor], scheme: Scheme, k: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Turns stored tensors back into values ``[n, k]``, rounded once to ``dtype``; a rotation is undone, and
    an order of columns.
    """
    if scheme.ordered:
        plain = dequantize_weight(stored, scheme.in_order, k, dtype)
        return torch.empty_like(plain).index_copy_(1, stored[ORDER].long(), plain)
    if scheme.rotation:
        plain = dequantize_weight(stored, replace(scheme, rotation=0), k)
        return rotate(plain, scheme.rotation).to(dtype)
    quant = scheme.weight
    if quant.element is BF16:
        return stored["weight"].to(dtype)
    if quant.element.block:
        return gguf.dequantize(stored["weight_blocks"], quant.element, k).to(dtype)
    if quant.format == "int4":
        codes = unpack_int4(stored["weight_packed"], k)
    elif quant.element.bits < 8:
        codes = unpack_bits(stored["weight_packed"], k, quant.element.bits)
    else:
        codes = stored["weight"]
    scale = dequantize_scales(stored) if quant.scale_quant else stored["weight_scale"]
    outer = stored.get("weight_global_scale", stored.get("weight_outer_scale"))
    return dequantize(codes, scale, quant, dtype, stored.get("weight_zero"), outer)


def linear(x: Tensor, stored: dict[str, Tensor], scheme: Scheme, bias: Tensor | None = None) -> Tensor:
    """The reference of every kernel: quantize the activations as the scheme says, multiply in fp32, round
    once.

    Args:
        x: ``[M, K]``.
        stored: The tensors of ``scheme.layout(N, K)``.
        scheme: The scheme; without activation quantization the activations are used as they are.
        bias: ``[N]`` or None, added in fp32.

    Returns:
        ``[M, N]`` in the dtype of ``x``.

    Raises:
        ShapeError: the weight has another K.
    """
    shapes = {name: tuple(t.shape) for name, t in stored.items()}
    layout = scheme.layout(next(iter(stored.values())).shape[0], x.shape[1])
    if shapes != {name: shape for name, (shape, _) in layout.items()}:
        raise ShapeError(
            f"multiply activations {list(x.shape)}",
            f"a weight stored as {shapes}",
            "activations as wide as the weight",
        )
    if scheme.ordered:
        plain = {key: tensor for key, tensor in stored.items() if key != ORDER}
        return linear(x.index_select(1, stored[ORDER]), plain, scheme.in_order, bias)
    weight = dequantize_weight(stored, replace(scheme, rotation=0), x.shape[1])
    if scheme.activation is not None and scheme.static:
        values = static_values(x, scheme.activation, stored[INPUT_SCALE], stored.get(INPUT_ZERO))
    else:
        values = quantized_values(rotate(x, scheme.rotation), scheme.activation).float()
    with torch.autocast(x.device.type, enabled=False):  # fp32 means fp32
        return torch.nn.functional.linear(values, weight, None if bias is None else bias.float()).to(x.dtype)


def quantize_static(
    x: Tensor, quant: Quant, scale: Tensor, zero_point: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantizes activations with a scale that is stored: ``code = round(x / scale + zero_point)``, saturated.

    Args:
        x: ``[M, K]``, any floating dtype.
        quant: Their quantization.
        scale: fp32 ``[1]``.
        zero_point: int8 ``[1]`` where the quantization has one.

    Returns:
        Codes ``[M, K]``, and the scale of each token, fp32 ``[M, 1]``: the one that is stored, or NaN where
        an activation is NaN and the codes have none.
    """
    values = x.float() / scale
    if zero_point is not None:
        values.add_(zero_point)
    token = scale.expand(len(x), 1)
    if not quant.element.is_float8:
        token = torch.where(values.isnan().any(1, keepdim=True), torch.nan, token)
    return encode(values, quant.element), token


def static_values(x: Tensor, quant: Quant, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """What is left of activations after `quantize_static`: fp32 ``[M, K]``."""
    codes, token = quantize_static(x, quant, scale, zero_point)
    values = decode(codes, quant.element)
    return (values if zero_point is None else values - zero_point) * token


def quantized_values(x: Tensor, quant: Quant | None) -> Tensor:
    """What is left of activations ``[M, K]`` after quantization: fp32; x itself where there is none."""
    if quant is None:
        return x
    if quant.element.block:
        return gguf.dequantize(gguf.quantize(x, quant.element), quant.element, x.shape[1])
    blocks = quantize_blocks(x, quant)
    return dequantize(blocks.codes, blocks.scale, quant, zero=blocks.zero, outer=blocks.outer)
