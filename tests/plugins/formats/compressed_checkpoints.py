"""Checkpoints that compressed-tensors 0.20 makes: its own arguments, quantization, packing and decoding."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.mxfp6.helpers import unpack_fp6_from_uint8
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from format_checks import Made, quantizable, tiny
from torch import Tensor


def preset(name: str, *, group: int = 0, inputs: bool = True, **weights: object) -> QuantizationScheme:
    """A scheme of the library, with other groups or arguments of weights, or without activations."""
    known = preset_name_to_scheme(name, ["Linear"]).model_dump()
    known["weights"] |= ({"group_size": group} if group else {}) | weights
    if not inputs:
        known["input_activations"] = None
    return QuantizationScheme(**known)


def static(name: str, **inputs: object) -> QuantizationScheme:
    """A preset whose activations have one scale, which is stored."""
    known = preset_name_to_scheme(name, ["Linear"]).model_dump()
    own = {"strategy": "tensor", "dynamic": False, "observer": "minmax"}
    known["input_activations"] = {**(known["input_activations"] or {}), **own, **inputs}
    return QuantizationScheme(**known)


def blocks_of(weight: Tensor, rows: int, columns: int) -> Tensor:
    """Every block of a matrix as a row: ``[down, across, elements]``; zeros beside the last ones."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
    return padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).movedim(1, 2).flatten(2)


def compress(weight: Tensor, scheme: QuantizationScheme, kind: str) -> dict[str, Tensor]:
    """What the library stores of a weight, scales in its dtype."""
    args, (n, k) = scheme.weights, weight.shape
    shape = {
        "tensor": (n, k),
        "channel": (1, k),
        "block": args.block_structure,
        "group": (1, args.group_size),
        "tensor_group": (1, args.group_size),
    }[args.strategy]
    state = {"weight": weight}
    factor = None
    if args.strategy == "tensor_group":
        factor = state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    blocks = blocks_of(weight, *shape)
    scale, zero = calculate_qparams(blocks.amin(2), blocks.amax(2), args, global_scale=factor)
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    return dict(BaseCompressor.get_value_from_registry(kind).compress(state, scheme))


def of_inputs(scheme: QuantizationScheme, number: int) -> dict[str, Tensor]:
    """The scale that the library stores for inputs from -3 to some number, and their zero point."""
    args = scheme.input_activations
    if args is None or args.dynamic or args.strategy != "tensor":
        return {}
    low, high = torch.tensor([-3.0]), torch.tensor([2.0 + number % 5])
    scale, zero = calculate_qparams(low.bfloat16(), high.bfloat16(), args)
    return {"input_scale": scale} | ({} if args.symmetric else {"input_zero_point": zero})


def decode(state: Mapping[str, Tensor], scheme: QuantizationScheme, kind: str) -> Tensor:
    """The values by the library, in fp32 arithmetic: its scales are widened first, or it would round."""
    scale, packed = state["weight_scale"], state.get("weight_packed")
    if kind.startswith(("mx", "nv")):
        scale = scale.float() if kind.startswith("nv") else decompress_mx_scale(scale).float()
        codes = state.get("weight")
        if kind == "mxfp6-pack-quantized":
            codes = unpack_fp6_from_uint8(packed, len(packed), packed.shape[1] // 3 * 4, torch.float32)
        elif packed is not None:
            codes = unpack_fp4_from_uint8(packed, len(packed), packed.shape[1] * 2, torch.float32)
        factor = state.get("weight_global_scale")
        return dequantize(codes, scale, args=scheme.weights, dtype=torch.float32, global_scale=factor).float()
    state = {**state, "weight_scale": scale.float()}
    return BaseCompressor.get_value_from_registry(kind).decompress(state, scheme)["weight"]


Choice = Callable[[str], tuple[QuantizationScheme, str, str] | None]


def made(
    scheme: QuantizationScheme, kind: str, held: str, model: str = "llama", dtype: torch.dtype | None = None
) -> Made:
    """A checkpoint all of whose linear layers have one scheme; ``held`` is what it is kept in."""
    return mixed(lambda _: (scheme, kind, held), kind, model, dtype)


def mixed(choice: Choice, kind: str, model: str = "llama", dtype: torch.dtype | None = None) -> Made:
    """A checkpoint with a scheme, a format and what it is kept in for each module, or none."""
    config, tensors = tiny(model)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        config["dtype"] = str(dtype).removeprefix("torch.")
    values, held, groups, ignore, inputs = {}, {}, {}, ["lm_head"], {}
    for name in quantizable(tensors):
        module = name.removesuffix(".weight")
        chosen = choice(module)
        if chosen is None:
            ignore.append(module)
            continue
        scheme, form, kept = chosen
        state = compress(tensors.pop(name), scheme, form)
        tensors |= {f"{module}.{key}": value for key, value in state.items()}
        values[name], held[name] = decode(state, scheme, form), kept
        own = of_inputs(scheme, len(values))
        tensors |= {f"{module}.{key}": value for key, value in own.items()}
        if own:
            inputs[name] = own["input_scale"].item(), int(own.get("input_zero_point", torch.zeros(1)))
        groups.setdefault((id(scheme), form), scheme)
    described = QuantizationConfig(
        config_groups={
            f"group_{i}": {**scheme.model_dump(), "format": form}
            for i, ((_, form), scheme) in enumerate(groups.items())
        },
        format=kind,
        ignore=ignore,
        quantization_status="compressed",
    ).model_dump(mode="json")
    return Made({**config, "quantization_config": described}, tensors, values, schemes=held, inputs=inputs)


def with_targets(scheme: QuantizationScheme, *targets: str) -> QuantizationScheme:
    """The scheme for other targets."""
    return scheme.model_copy(update={"targets": list(targets)})


def inside(name: str, expression: str) -> bool:
    """Whether an expression matches from the start of a name, as the library asks."""
    return re.match(expression, name) is not None
