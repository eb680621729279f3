"""GPTQ as AutoGPTQ and GPTQModel store it: codes packed along the inputs, zero points along the outputs.

Beside a layer: ``qweight`` int32 ``[k * bits / 32, n]``, ``qzeros`` int32 ``[groups, n * bits / 32]``,
``scales`` ``[groups, n]`` and ``g_idx`` int32 ``[k]``, the group of each input; ``value = (code - zero) *
scale``. Codes of 3 bits cross words. The first version (``checkpoint_format: gptq``) stores each zero point
less one, subtracted from whole words (of 3 bits from each code); the second (``gptq_v2``) as it is.

Sources: AutoGPTQ 0.7.1, ``nn_modules/qlinear/qlinear_cuda_old.py``; GPTQModel 7.7, ``utils/model.py``
(``convert_gptq_v1_to_v2_format``) and ``quantization/config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint import Coded, CodedTensor, Recognized, SavedModel, TensorSource, read_json
from quantport.errors import CheckpointError, shown
from quantport.scheme import Scheme
from quantport.scheme.catalog import Schemes
from quantport.scheme.scheme import ORDER
from quantport_formats.common import activation_order, held_dtype, need, quant_method, quantizer_config
from quantport_formats.grouped import BITS, Columns, Grouped, group_size, matrix, no_strays, number, unpacked
from quantport_formats.grouped_write import gptq
from quantport_formats.writing import Writing, WrittenFormat

_PARTS = (".qzeros", ".g_idx")
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # one in each code of a word
_VERSIONS = {"gptq": True, "gptq_v2": False}  # whether zero points are stored less one


class Gptq(WrittenFormat):
    """``quant_method: gptq``, in ``config.json`` or ``quantize_config.json``."""

    name = "gptq"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        if not any(name.endswith(".qweight") for name in source.tensors):
            return None
        said = quantizer_config(config)
        if not said:
            said = read_json(source.directory / "quantize_config.json")
            if not said or str(said.get("quant_method", "gptq")).lower() != "gptq":
                return None
        elif quant_method(config) != "gptq":
            return None
        return read_gptq(self.name, source, said, schemes, held_dtype(source, config))

    def writing(self, asked: str, model: SavedModel) -> Writing:
        """As `WrittenFormat.writing`."""
        return gptq(asked, model)


@dataclass(frozen=True)
class Settings:
    """What a configuration says of every layer.

    Attributes:
        bits: Of a code; None where layers differ.
        group_size: Inputs of a group, -1 for all; None where nothing is said.
        symmetric: Whether zero points are the middle of the codes, in every layer.
        in_order: Whether groups are runs of inputs, in every layer.
        less_one: Whether zero points are stored less one.
    """

    bits: int | None
    group_size: int | None
    symmetric: bool
    in_order: bool
    less_one: bool


def read_gptq(
    format_name: str,
    source: TensorSource,
    said: Mapping[str, Any],
    schemes: Schemes,
    dtype: torch.dtype,
    settings: Settings | None = None,
) -> Recognized:
    """A checkpoint with the tensors of GPTQ.

    Args:
        format_name: Name of the format.
        source: Its tensors.
        said: Its configuration.
        schemes: Every scheme that is known.
        dtype: Of what it does not quantize.
        settings: What the configuration says, where it is not spelled as GPTQ's.

    Raises:
        CheckpointError: a tensor is absent, or not what the others and the configuration say.
    """
    settings = settings or _settings(source, said)
    stems = [name.removesuffix(".qweight") for name in source.tensors if name.endswith(".qweight")]
    layers = [_Layer(format_name, source, stem, settings) for stem in stems]
    coded = {f"{layer.stem}.weight": layer.coded(schemes, dtype) for layer in layers}
    known = {part for tensor in coded.values() for part in tensor.tensors}
    no_strays(source, format_name, known, _PARTS)
    return Coded(format_name, source, coded, notices=_notices(layers, coded))


def _settings(source: TensorSource, said: Mapping[str, Any]) -> Settings:
    asked = f"read {source.directory} as gptq"
    version = said.get("checkpoint_format") or "gptq"
    if said.get("is_marlin_format"):
        version = "marlin"
    if not isinstance(version, str) or version.lower() not in _VERSIONS:
        raise CheckpointError(
            asked,
            f"checkpoint_format {shown(version)}, the layout of one kernel",
            "checkpoint_format gptq or gptq_v2: save it so with GPTQModel",
        )
    bits = number(said, "gptq", "bits", "w_bit")
    if bits is not None and bits not in BITS:
        raise CheckpointError(asked, f"codes of {bits} bits", f"codes of {', '.join(map(str, BITS))} bits")
    dynamic = said.get("dynamic")
    others = list(dynamic.values()) if isinstance(dynamic, Mapping) else []
    own = [entry for entry in others if isinstance(entry, Mapping)]
    return Settings(
        bits=None if own else bits,
        group_size=number(said, "gptq", "group_size"),
        symmetric=said.get("sym") is True and all(entry.get("sym", True) is True for entry in own),
        in_order=not any(entry.get("desc_act") for entry in (said, *own)),
        less_one=_VERSIONS[version.lower()],
    )


class _Layer:
    """One linear layer, as the shapes of its tensors say."""

    def __init__(self, format_name: str, source: TensorSource, stem: str, settings: Settings) -> None:
        self.format_name, self.source, self.stem, self.settings = format_name, source, stem, settings
        self.qweight, self.qzeros, self.scales, self.g_idx = (
            f"{stem}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")
        )
        self.columns = Columns(source, self.qweight)
        words, n = matrix(source, format_name, self.qweight)
        groups, zeros = matrix(source, format_name, self.qzeros)
        bits = zeros * 32 // n
        if bits not in BITS or n * bits != zeros * 32 or words * 32 % bits:
            raise self._refusal(
                f"{self.qweight} [{words}, {n}] and {self.qzeros} [{groups}, {zeros}]",
                f"codes of {', '.join(map(str, BITS))} bits in both",
            )
        if settings.bits not in (None, bits):
            raise self._refusal(
                f"codes of {bits} bits, of which the configuration says {settings.bits}",
                "the configuration that this checkpoint was saved with",
            )
        k = words * 32 // bits
        group = group_size(k, groups, settings.group_size)
        if group is None:
            said = settings.group_size
            raise self._refusal(f"{groups} groups of {k} inputs, group_size {said}", "groups of one size")
        self.scale_dtype = need(source, format_name, self.scales, (groups, n)).dtype
        self.groups = Grouped(bits, n, k, group, settings.symmetric)
        self.has_order = self.g_idx in source.tensors
        if self.has_order:
            need(source, format_name, self.g_idx, (k,))
        self.in_order = settings.in_order or groups == 1
        if not (self.in_order or self.has_order):
            raise self._refusal(f"desc_act, and no {self.g_idx}", "the complete checkpoint")
        if self.scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise self._refusal(f"{self.scales} of {self.scale_dtype}", "scales that are floats")

    def coded(self, schemes: Schemes, dtype: torch.dtype) -> CodedTensor:
        names = (self.qweight, self.qzeros, self.scales, *((self.g_idx,) if self.has_order else ()))
        scheme = self.groups.scheme(schemes, self.scale_dtype)
        if scheme and not self.in_order:
            scheme = schemes[f"{scheme.name}:actorder"]
        read = partial(self._stored, scheme) if scheme else self._decoded
        return CodedTensor((self.groups.n, self.groups.k), dtype, scheme, names, read=read)

    def _refusal(self, found: str, suggestion: str) -> CheckpointError:
        return CheckpointError(
            f"read {self.stem} of {self.source.directory} as {self.format_name}", found, suggestion
        )

    def _stored(self, scheme: Scheme, expert: int | None, rows: slice) -> Mapping[str, Tensor]:
        """The tensors of the scheme's layout for some rows."""
        groups, order = self.groups, self._order() if self.has_order else None
        zeros, scales = self._zeros(rows), self.source.read(self.scales)[:, rows].t()
        if groups.symmetric and (zeros != groups.middle).any():
            raise self._refusal(
                f"zero points that are not {groups.middle}, of which the configuration says sym: true",
                "sym: false in the configuration",
            )
        words = self.columns.read(rows.start, rows.stop).t().contiguous()
        if scheme.weight.format == "int4" and groups.bits == 4 and not scheme.ordered:
            return groups.stored(scheme, words, zeros, scales)
        codes = unpacked(words, groups.bits)
        if not scheme.ordered:
            return groups.stored(scheme, codes, zeros, scales)
        assert order is not None  # as its tensor is there
        return {**groups.stored(scheme, codes[:, order], zeros, scales), ORDER: order}

    def _order(self) -> Tensor:
        """The inputs in the order of their groups."""
        order = activation_order(self.source.read(self.g_idx).long(), self.groups.group)
        if order is None:
            size, groups = self.groups.group, self.groups.groups
            raise self._refusal(f"{self.g_idx} of other groups", f"groups 0 to {groups - 1} of {size} inputs")
        if self.in_order and (order.diff() < 0).any():
            raise self._refusal(
                f"{self.g_idx} in another order, of which the configuration says nothing",
                "desc_act: true in the configuration",
            )
        return order

    def _decoded(self, expert: int | None, rows: slice) -> Mapping[str, Tensor]:
        """The values of some rows, in fp32."""
        groups, zeros = self.groups, self._zeros(rows)
        scales = self.source.read(self.scales)[:, rows].t().float()
        codes = unpacked(self.columns.read(rows.start, rows.stop).t(), groups.bits)
        zeros, scales = groups.spread(zeros), groups.spread(scales)
        if not self.in_order:
            inputs = self._order().long().argsort()
            zeros, scales = zeros[:, inputs], scales[:, inputs]
        return {"weight": (codes.to(torch.int32) - zeros.to(torch.int32)) * scales}

    def _zeros(self, rows: slice) -> Tensor:
        """Zero points ``[rows, groups]``, uint8."""
        words, bits = self.source.read(self.qzeros), self.groups.bits
        if not self.settings.less_one:
            return unpacked(words, bits)[:, rows].t()
        if bits == 3:
            return (unpacked(words, bits)[:, rows].t() + 1) & 7
        return unpacked(words + _ONES[bits], bits)[:, rows].t()  # carries undo the borrows of the writer


def _notices(layers: list[_Layer], coded: Mapping[str, CodedTensor]) -> tuple[str, ...]:
    out = []
    decoded = [name for name, tensor in coded.items() if tensor.scheme is None]
    if decoded:
        out.append(
            f"{len(decoded)} weights ({decoded[0]}, ...) are decoded to 16 bits, or to the scheme that is "
            "asked for: their scales have 32 bits"
        )
    small = [layer for layer in layers if layer.groups.bits < 4]
    if small:
        bits = ", ".join(sorted({str(layer.groups.bits) for layer in small}))
        out.append(f"{len(small)} weights of {bits} bits are held in codes of 4 bits, to the same values")
    return tuple(out)
