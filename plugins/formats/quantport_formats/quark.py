"""Checkpoints of AMD Quark: FP8, INT8 and MXFP4, one for all layers or each its own.

Source: amd-quark 0.13, ``torch/export/main_export/quant_config_parser.py`` (``get_layer_quant_config``: the
first pattern that matches decides), ``torch/export/nn/modules/realquantizer.py`` and ``torch/utils/pack.py``.
Scales are fp32 or in the dtype of the model, of MXFP4 exponents; integers have zero points though they are
symmetric.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from quantport.checkpoint import CheckpointFormat, Recognized, TensorSource
from quantport.scheme.catalog import Schemes
from quantport_formats.common import held_dtype, quant_method, quantizer_config
from quantport_formats.compressed_tensors_config import Args, Group
from quantport_formats.module_weights import Names, Weights
from quantport_formats.of_modules import coded_modules, of_modules

_KINDS = {"fp8_e4m3": ("float", 8), "int8": ("int", 8), "fp4": ("float", 4)}
_MANY = 1000  # patterns
_NAME = 1000  # characters of one


class Quark(CheckpointFormat):
    """``quant_method: quark``."""

    name = "quark"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        modules = list(coded_modules(source))
        if quant_method(config) != self.name or not modules:
            return None
        names = Names("weight", spare_zeros=True)
        weights = Weights(self.name, source, schemes, held_dtype(source, config), names)
        layers = _Layers(weights, quantizer_config(config))
        return of_modules(weights, modules, layers.group_of, layers.cache)


class _Layers:
    """What the configuration says of each layer.

    Args:
        weights: For errors.
        entry: ``quantization_config``.
    """

    def __init__(self, weights: Weights, entry: Mapping[str, Any]) -> None:
        self._weights, self._entry = weights, entry
        patterns = entry.get("layer_quant_config")
        self._patterns = dict(patterns) if isinstance(patterns, Mapping) else {}
        if len(self._patterns) > _MANY or any(len(pattern) > _NAME for pattern in self._patterns):
            raise weights.wrong(
                f"{len(self._patterns)} patterns of layers", f"at most {_MANY}, and short ones"
            )
        self._groups: dict[str, Group] = {}

    def group_of(self, module: str) -> Group:
        """The group of a module whose weight is stored as codes."""
        matching = (pattern for pattern in self._patterns if fnmatch.fnmatchcase(module, pattern))
        name = next(matching, "")
        if name not in self._groups:
            chosen = self._patterns[name] if name else self._entry.get("global_quant_config")
            self._groups[name] = self._group(name or "global_quant_config", chosen)
        return self._groups[name]

    @cached_property
    def cache(self) -> Args | None:
        """The KV cache that is asked for: the outputs of the projections that it holds."""
        layers = self._entry.get("kv_cache_quant_config")
        first = next(iter(layers.values()), None) if isinstance(layers, Mapping) else None
        outputs = first.get("output_tensors") if isinstance(first, Mapping) else None
        return None if outputs is None else self._args(outputs, "kv_cache_quant_config", active=True)

    def _group(self, name: str, entry: Any) -> Group:
        if not isinstance(entry, Mapping) or entry.get("weight") is None:
            found = f"weights stored as codes, of which {name} says nothing"
            raise self._weights.wrong(found, "quantization_config as it was saved")
        weight = self._args(entry["weight"], name, active=False)
        inputs = entry.get("input_tensors")
        active = None if inputs is None else self._args(inputs, name, active=True)
        return Group(name, (), weight, active, entry.get("output_tensors") is not None)

    def _args(self, entry: Any, name: str, *, active: bool) -> Args:
        """As ``QTensorConfig``."""
        spec = entry if isinstance(entry, Mapping) else {}
        size, kind = spec.get("group_size"), spec.get("dtype")
        bits = _KINDS.get(kind) if isinstance(kind, str) else None
        group = size if isinstance(size, int) and not isinstance(size, bool) and 0 < size < 10_000 else 0
        strategies = {"per_tensor": "tensor", "per_channel": "token" if active else "channel"}
        strategies |= {"per_group": "group"} if group else {}
        scheme = spec.get("qscheme")
        strategy = strategies.get(scheme) if isinstance(scheme, str) else None
        if bits is None or strategy is None:
            raise self._weights.wrong(
                f"{name}: {str(kind)[:80]!r}, qscheme {str(scheme)[:80]!r}, group_size {str(size)[:80]}",
                f"{', '.join(_KINDS)} per_tensor, per_channel or per_group",
            )
        if bits == ("int", 8) and strategy == "group":
            raise self._weights.wrong(f"{name}: int8 per_group", "int8 per_tensor or per_channel")
        symmetric = bits[0] == "float" or spec.get("symmetric") is not False
        exponents = spec.get("scale_format") == "e8m0"
        dynamic = spec.get("is_dynamic") is True
        return Args(
            bits[1],
            bits[0],
            strategy,
            group if strategy == "group" else 0,
            (0, 0),
            symmetric,
            not dynamic,
            exponents,
        )
