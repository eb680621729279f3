"""Writing compressed-tensors: the schemes whose stored tensors that format has, with the configuration that
vLLM and Transformers read.

Source: compressed-tensors 0.20, ``quantization/quant_scheme.py``, ``quantization/quant_args.py`` and
``compressors``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import Rewrite, SavedModel
from quantport.errors import SaveError
from quantport.scheme import Quant, Scheme
from quantport_formats.writing import Writing, written_weights

_VERSION = "0.20.0"  # of the library whose configuration this is
_PER_WORD = 4  # int8 codes in an int32


def writing(asked: str, model: SavedModel) -> Writing:
    """As `quantport_formats.writing.WrittenFormat.writing`."""
    changes: dict[str, Rewrite] = {}
    further: dict[str, Tensor] = {}
    groups: dict[Scheme, list[str]] = {}
    for path, stem, scheme, n, k in written_weights(asked, model.layers):
        _check(asked, scheme, experts=bool(model.layers[path].experts))
        group = scheme.weight.group_size
        if group and scheme.weight.block_shape[0] == 1 and k % group:
            found = f"{path}, whose {k} columns are no whole groups of {group}"
            raise SaveError(asked, found, "a group size that divides them, or format='quantport'")
        groups.setdefault(scheme, []).append(stem)
        _rewrite(stem, scheme, n, k, changes, further)
    return Writing(_described(groups, model.kept_linear), changes, further)


def _check(asked: str, scheme: Scheme, *, experts: bool) -> None:
    name = scheme.name.partition(":")[0]
    if name not in _KINDS or scheme.rotation or scheme.weight.zero_point:
        suggestion = f"one of {', '.join(_KINDS)}, or format='quantport'"
        raise SaveError(asked, f"scheme {scheme.name!r}, which compressed-tensors cannot hold", suggestion)
    if experts and scheme.weight.unit == "nvfp4":
        found = "experts in NVFP4, whose factors Transformers does not keep apart when it fuses them"
        raise SaveError(asked, found, "mxfp4_weight_only or int4_weight_only, or format='quantport'")


def _rewrite(
    stem: str, scheme: Scheme, n: int, k: int, changes: dict[str, Rewrite], further: dict[str, Tensor]
) -> None:
    """How the stored tensors of one weight are written."""
    if scheme.weight.format == "int8" and scheme.activation is None:
        words = (n, -(-k // _PER_WORD)), torch.int32
        changes[f"{stem}.weight"] = Rewrite(f"{stem}.weight_packed", _packed_int8, words)
    if scheme.weight.format == "int4" or (scheme.weight.format == "int8" and scheme.activation is None):
        further[f"{stem}.weight_shape"] = torch.tensor([n, k], dtype=torch.int64, device="cpu")
    if scheme.weight.block_shape == (0, 0):
        one = (1,), torch.float32
        changes[f"{stem}.weight_scale"] = Rewrite(f"{stem}.weight_scale", lambda scale: scale.view(1), one)


def _packed_int8(codes: Tensor) -> Tensor:
    """Four codes plus 128 to an int32, the first in the lowest bits; rows are filled up with zero bits."""
    unsigned = (codes.to(torch.int16) + 128).to(torch.uint8)
    filled = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % _PER_WORD))
    return filled.contiguous().view(torch.int32)


def _described(groups: Mapping[Scheme, Sequence[str]], kept: Sequence[str]) -> dict[str, Any]:
    """``quantization_config``: one group of layers for each scheme, the largest of which is all that no other
    group and ``ignore`` name.
    """
    most = max(groups, key=lambda scheme: len(groups[scheme]))
    described = {}
    for i, (scheme, stems) in enumerate(groups.items()):
        activation = scheme.activation
        described[f"group_{i}"] = {
            "targets": ["Linear"] if scheme is most else list(stems),
            "weights": _arguments(scheme.weight, dynamic=False),
            "input_activations": None
            if activation is None
            else _arguments(activation, dynamic=not scheme.static),
            "output_activations": None,
            "format": _KINDS[scheme.name.partition(":")[0]],
        }
    kinds = {group["format"] for group in described.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "config_groups": described,
        "ignore": list(kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": _VERSION,
    }


def _arguments(quant: Quant, *, dynamic: bool) -> dict[str, Any]:
    """``QuantizationArgs`` of an operand."""
    down, across = quant.block_shape
    out: dict[str, Any] = {
        "num_bits": quant.element.bits,
        "type": "int" if quant.format.startswith("int") else "float",
        "symmetric": not quant.zero_point,
        "dynamic": dynamic,
        "observer": None if dynamic else "minmax",
    }
    if quant.format == "e2m1":
        nv = quant.scale == "e4m3fn"
        local = "local" if nv and dynamic else dynamic
        scale = "torch.float8_e4m3fn" if nv else "torch.uint8"
        return out | {
            "strategy": "tensor_group" if nv else "group",
            "group_size": across,
            "dynamic": local,
            "scale_dtype": scale,
        }
    if down > 1:
        return out | {"strategy": "block", "block_structure": [down, across]}
    if across:
        return out | {"strategy": "group", "group_size": across}
    return out | {"strategy": "tensor" if not down else "token" if dynamic else "channel"}


_KINDS = {
    "int8": "int-quantized",
    "int8_weight_only": "pack-quantized",
    "int4_weight_only": "pack-quantized",
    "int4_weight_only_g32": "pack-quantized",
    "fp8_per_tensor": "float-quantized",
    "fp8_per_channel": "float-quantized",
    "fp8_per_block": "float-quantized",
    "fp8_weight_only": "float-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp4_weight_only": "mxfp4-pack-quantized",
    "nvfp4_weight_only": "nvfp4-pack-quantized",
}
"""The ``format`` of each scheme that can be written; of NVFP4 with activations the factor is calibrated."""
