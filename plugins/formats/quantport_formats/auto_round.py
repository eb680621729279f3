"""AutoRound, and Intel Neural Compressor through it: the tensors of GPTQ or of AWQ, with bits, group sizes
and symmetry that may differ between layers (``extra_config``).

``packing_format`` says which: ``auto_round:auto_gptq`` stores zero points less one, ``auto_round`` and
``auto_round:gptqmodel`` as they are, ``auto_round:auto_awq`` is AWQ's ``gemm``.

Source: AutoRound 0.16.1, ``export/export_to_autoround/export.py`` (which module packs), ``inference/
convert_model.py`` (other spellings) and ``inference/backend.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantport.checkpoint import CheckpointFormat, Recognized, TensorSource, read_json
from quantport.errors import CheckpointError, shown
from quantport.scheme.catalog import Schemes
from quantport_formats.awq import read_awq
from quantport_formats.common import held_dtype, quant_method, quantizer_config
from quantport_formats.gptq import Settings, read_gptq
from quantport_formats.grouped import number

_METHODS = ("auto-round", "intel/auto-round", "auto_round", "inc")
_LESS_ONE = ("auto", "auto_round:auto_gptq", "auto_round:gptq")
_AS_THEY_ARE = ("auto_round", "auto_round:gptqmodel")
_AWQ = ("auto_round:auto_awq", "auto_round:awq")


class AutoRound(CheckpointFormat):
    """``quant_method: auto-round``, ``intel/auto-round`` or ``inc``, in ``config.json`` or
    ``quantization_config.json``.
    """

    name = "auto-round"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        said, method = quantizer_config(config), quant_method(config)
        if not said:
            said = read_json(source.directory / "quantization_config.json")
            method = str(said.get("quant_method") or "").lower()
        if method not in _METHODS:
            return None
        packing, asked = said.get("packing_format") or "auto", f"read {source.directory} as auto-round"
        known = (*_LESS_ONE, *_AS_THEY_ARE, *_AWQ)
        if packing not in known:
            suggestion = "export it as auto_round, auto_gptq or auto_awq, or load it with AutoRound"
            raise CheckpointError(asked, f"packing_format {shown(packing)}", suggestion)
        if not any(name.endswith(".qweight") for name in source.tensors):
            raise CheckpointError(asked, "no tensor of codes (.qweight)", "the complete checkpoint")
        act_bits = number(said, self.name, "act_bits")
        if act_bits is not None and act_bits < 16:
            suggestion = "a checkpoint that quantizes weights alone, or load it with AutoRound"
            raise CheckpointError(asked, f"activations of {act_bits} bits", suggestion)
        dtype = held_dtype(source, config)
        if packing in _AWQ:
            return read_awq(self.name, source, said, schemes, dtype)
        settings = _settings(said, less_one=packing in _LESS_ONE)
        return read_gptq(self.name, source, said, schemes, dtype, settings)


def _settings(said: Mapping[str, Any], less_one: bool) -> Settings:
    """What holds for every layer."""
    extra = said.get("extra_config")
    own = (
        [entry for entry in extra.values() if isinstance(entry, Mapping)]
        if isinstance(extra, Mapping)
        else []
    )
    symmetric = said.get("sym") is True and all(entry.get("sym", True) is True for entry in own)
    return Settings(
        bits=None if own else number(said, "auto-round", "bits"),
        group_size=number(said, "auto-round", "group_size"),
        symmetric=symmetric,
        in_order=True,
        less_one=less_one,
    )
