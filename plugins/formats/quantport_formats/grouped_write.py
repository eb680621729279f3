"""Writing GPTQ and AWQ: integers of 4 or 8 bits with a scale in fp16 for each group of a row.

GPTQ is written in its first version, which every loader reads: zero points less one. AWQ is written as
``gemm``. The layouts are those of `quantport_formats.gptq` and `quantport_formats.awq`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import Joined, SavedModel, TensorLayout
from quantport.errors import SaveError
from quantport.numerics.packing import pack_int4, unpack_int4
from quantport_formats.writing import OWN, Writing, Written, written_weights

_ZEROS = {4: 0x77777777, 8: 0x7F7F7F7F}  # the middle of the codes less one, in each code of a word
_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight, in the order in which a word of AWQ has them


def gptq(asked: str, model: SavedModel) -> Writing:
    """As `quantport_formats.writing.WrittenFormat.writing`: symmetric codes of 4 or 8 bits."""
    weights = list(written_weights(asked, model.layers))
    for weight in weights:
        _check(asked, weight, (4, 8))
    settings = {weight.stem: (weight.scheme.weight.element.bits, _group(weight)) for weight in weights}
    bits, group = _most(settings.values())
    dynamic: dict[str, Any] = {
        f"+:^{re.escape(stem)}$": {"bits": own[0], "group_size": own[1]}
        for stem, own in settings.items()
        if own != (bits, group)
    }
    dynamic |= {f"-:^{re.escape(path)}$": {} for path in model.kept_linear if path != "lm_head"}
    described = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": True,
        "desc_act": False,
        "lm_head": "lm_head" in settings,
        **({"dynamic": dynamic} if dynamic else {}),
    }
    return Writing(described, joined=[_joined(weight, _gptq_layout, _gptq_tensors) for weight in weights])


def awq(asked: str, model: SavedModel) -> Writing:
    """As `quantport_formats.writing.WrittenFormat.writing`: codes of 4 bits, in groups of one size."""
    weights = list(written_weights(asked, model.layers))
    for weight in weights:
        _check(asked, weight, (4,))
    groups = {weight.stem: _group(weight) for weight in weights}
    group = _most(groups.values())
    for stem, own in groups.items():
        if own != group:
            found = f"{stem} in groups of {own}, and others in groups of {group}"
            raise SaveError(asked, found, f"groups of one size, format='gptq', or {OWN}")
    described = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "modules_to_not_convert": list(model.kept_linear),
    }
    return Writing(described, joined=[_joined(weight, _awq_layout, _awq_tensors) for weight in weights])


_ROWS = 512  # that are unpacked at a time


def _check(asked: str, weight: Written, bits: Sequence[int]) -> None:
    """Refuses what the formats cannot hold: other numbers, scales that are not fp16, parts of words."""
    scheme, quant = weight.scheme, weight.scheme.weight
    width = quant.element.bits
    integers = quant.format in ("int4", "int8") and width in bits and quant.block_shape[0] == 1
    if not integers or scheme.activation or scheme.rotation or quant.zero_point:
        found, kinds = f"{weight.stem} in scheme {scheme.name}", ["int4_weight_only", "int8_weight_only"]
        suggestion = " or ".join(f"{kind}:g128:fp16" for kind in kinds[: len(bits)])
        raise SaveError(asked, found, f"{suggestion}, or {OWN}")
    if quant.scale != "fp16":
        base = f"int{width}_weight_only:{f'g{quant.group_size}' if quant.group_size else 'channel'}"
        found = f"{weight.stem} in scheme {scheme.name}, whose scales in {quant.scale} fp16 may not hold"
        raise SaveError(asked, found, f"{base}:fp16, or {OWN}")
    per_word = 32 // width
    if weight.n % per_word or weight.k % per_word or weight.k % (quant.group_size or weight.k):
        found = f"{weight.stem} [{weight.n}, {weight.k}] in groups of {quant.group_size or weight.k}"
        raise SaveError(asked, found, f"multiples of {per_word}, and groups that divide them, or {OWN}")


def _group(weight: Written) -> int:
    return weight.scheme.weight.group_size or -1


def _most(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _joined(
    weight: Written,
    layout: Callable[[Written], TensorLayout],
    tensors: Callable[[Written, Mapping[str, Tensor]], Mapping[str, Tensor]],
) -> Joined:
    given = weight.scheme.layout(weight.n, weight.k)
    return Joined(weight.stem, given, layout(weight), partial(tensors, weight))


def _gptq_layout(weight: Written) -> TensorLayout:
    n, k, per_word = weight.n, weight.k, 32 // weight.scheme.weight.element.bits
    groups = weight.scheme.weight.scale_shape(n, k)[1]
    return {
        "qweight": ((k // per_word, n), torch.int32),
        "qzeros": ((groups, n // per_word), torch.int32),
        "scales": ((groups, n), torch.float16),
        "g_idx": ((k,), torch.int32),
    }


def _gptq_tensors(weight: Written, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    bits = weight.scheme.weight.element.bits
    words = stored["weight_packed"] if bits == 4 else _unsigned(stored["weight"])
    shape, dtype = _gptq_layout(weight)["qzeros"]
    inputs = torch.arange(weight.k, dtype=torch.int32, device="cpu")
    return {
        "qweight": words.t(),
        "qzeros": torch.full(shape, _ZEROS[bits], dtype=dtype, device="cpu"),
        "scales": stored["weight_scale"].t(),
        "g_idx": inputs // (weight.scheme.weight.group_size or weight.k),
    }


def _unsigned(codes: Tensor) -> Tensor:
    """int8 ``[n, k]`` plus 128, four to an int32."""
    return codes.view(torch.uint8).bitwise_xor(0x80).view(torch.int32)


def _awq_layout(weight: Written) -> TensorLayout:
    n, k = weight.n, weight.k
    groups = weight.scheme.weight.scale_shape(n, k)[1]
    return {
        "qweight": ((k, n // 8), torch.int32),
        "qzeros": ((groups, n // 8), torch.int32),
        "scales": ((groups, n), torch.float16),
    }


def _awq_tensors(weight: Written, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    packed, scale = stored["weight_packed"], stored["weight_scale"]
    shape, dtype = _awq_layout(weight)["qweight"]
    words = torch.empty(shape, dtype=dtype, device="cpu")
    for start in range(0, weight.n, _ROWS):
        codes = unpack_int4(packed[start : start + _ROWS], weight.k)
        words[:, start // 8 : (start + len(codes)) // 8] = _interleaved(codes)
    zeros = torch.zeros_like(scale, dtype=torch.int8)
    return {"qweight": words, "qzeros": _interleaved(zeros), "scales": scale.t()}


def _interleaved(codes: Tensor) -> Tensor:
    """Codes less their middle, int8 ``[n, m]``, as words of AWQ: int32 ``[m, n / 8]``."""
    return pack_int4(codes.t().reshape(codes.shape[1], -1, 8)[:, :, _OUTPUTS].flatten(1))
