"""Checkpoints of NVIDIA ModelOpt: FP8, MXFP8, NVFP4, MXFP4 and INT8, one for all layers or each its own.

Source: nvidia-modelopt 0.47, ``torch/export/quant_utils.py`` and ``convert_hf_config.py``, and the
``dequantize`` of ``torch/quantization/qtensor``. The configuration is ``hf_quant_config.json``, or a copy in
``config.json``.

NVFP4: a block is ``scale * weight_scale_2`` times its codes; here ``scale / global``, where ``global`` is the
reciprocal in fp32. Each of the two is a rounding more: values that are kept are within 2 units in the last
place of fp32 of ModelOpt's own, and equal where the factor is a power of two. Values that are decoded, for
another scheme or to 16 bits, are computed in ModelOpt's order, and are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from quantport.checkpoint import Recognized, Rewrite, SavedModel, TensorSource, read_json
from quantport.errors import CheckpointError, SaveError
from quantport.scheme.catalog import Schemes
from quantport_formats.common import held_dtype, quant_method, quantizer_config
from quantport_formats.compressed_tensors_config import Args, Group
from quantport_formats.module_weights import Names, Weights
from quantport_formats.of_modules import coded_modules, of_modules
from quantport_formats.writing import OWN, Writing, WrittenFormat, as_scalar, one_of, written_weights

_FILE = "hf_quant_config.json"
_SMOOTHED = (".pre_quant_scale", ".svdquant_lora_a", ".svdquant_lora_b", ".weight_quantizer._amax")


def _args(
    kind: str, bits: int, strategy: str, group: int = 0, block: int = 0, *, static: bool = False
) -> Args:
    return Args(bits, kind, strategy, group, (block, block), True, static, group == 32)


_FP8, _FP8_TENSOR = _args("float", 8, "tensor"), _args("float", 8, "tensor", static=True)
_MXFP8, _MXFP4 = _args("float", 8, "group", 32), _args("float", 4, "group", 32)
_NVFP4 = _args("float", 4, "tensor_group", 16)
_INT8 = _args("int", 8, "channel")
_ALGORITHMS: dict[str, tuple[Args, Args | None]] = {
    "FP8": (_FP8, _FP8_TENSOR),
    "FP8_PER_CHANNEL_PER_TOKEN": (_args("float", 8, "channel"), _args("float", 8, "token")),
    "FP8_PB_WO": (_args("float", 8, "block", block=128), None),
    "MXFP8": (_MXFP8, _MXFP8),
    "NVFP4": (_NVFP4, _args("float", 4, "tensor_group", 16, static=True)),
    "W4A16_NVFP4": (_NVFP4, None),
    "W4A8_NVFP4_FP8": (_NVFP4, _FP8_TENSOR),
    "W4A8_MXFP4_FP8": (_MXFP4, _FP8_TENSOR),
    "MXFP4": (_MXFP4, None),
    "W8A16": (_INT8, None),
    "W8A8_SQ_PER_CHANNEL": (_INT8, _args("int", 8, "tensor", static=True)),
}
_WRITTEN = {
    "fp8_per_tensor:static": "FP8",
    "fp8_per_channel": "FP8_PER_CHANNEL_PER_TOKEN",
    "mxfp8": "MXFP8",
    "int8_weight_only": "W8A16",
}
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}  # whose layout it is: readers go by this name
_CACHES = {"FP8": _FP8_TENSOR, "INT8": _args("int", 8, "tensor", static=True), "NVFP4": _NVFP4}


class ModelOpt(WrittenFormat):
    """``quant_method: modelopt``, or ``hf_quant_config.json`` beside tensors that hold codes."""

    name = "modelopt"

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """As `CheckpointFormat.recognize`."""
        modules = list(coded_modules(source))
        named = quant_method(config)
        if not modules or not (named.startswith(self.name) or (not named and _wrote(source))):
            return None
        names = Names("weight", "weight_scale_2", inverse=True)
        weights = Weights(self.name, source, schemes, held_dtype(source, config), names)
        smoothed = next((name for name in source.tensors if name.endswith(_SMOOTHED)), None)
        if smoothed:
            raise weights.wrong(
                f"{smoothed}: activations are scaled before they are multiplied",
                "a checkpoint whose scales were folded into the layers before",
            )
        entry = quantizer_config(config) if named else read_json(source.directory / _FILE)
        entry = {**entry, **_mapping(entry.get("quantization"))}
        layers = _mapping(entry.get("quantized_layers"))
        group_of = partial(_group_of, weights, entry.get("quant_algo"), layers)
        return of_modules(weights, modules, group_of, _cache(weights, entry))

    def writing(self, asked: str, model: SavedModel) -> Writing:
        """As `WrittenFormat.writing`: FP8, MXFP8 and INT8 whose activations are quantized as here, or not."""
        algorithms: dict[str, str] = {}
        changes: dict[str, Rewrite] = {}
        for _, stem, scheme, n, k in written_weights(asked, model.layers):
            held = one_of(scheme, _WRITTEN)
            if held is None or (held == "mxfp8" and k % 32):
                also = ", whose factor divides here and multiplies there" * (scheme.weight.unit == "nvfp4")
                found = f"{stem} [{n}, {k}] in scheme {scheme.name}{also}"
                raise SaveError(asked, found, f"one of {', '.join(_WRITTEN)}, or {OWN}")
            algorithms[stem] = _WRITTEN[held]
            name = f"{stem}.weight_scale"
            if scheme.static:
                changes |= {each: as_scalar(each) for each in (name, f"{stem}.input_scale")}
            elif held != "mxfp8":
                changes[name] = Rewrite(name, torch.flatten, ((n,), torch.float32))
        kinds, kept = set(algorithms.values()), list(model.kept_linear)
        said: dict[str, Any] = {"quant_algo": kinds.pop() if len(kinds) == 1 else "MIXED_PRECISION"}
        if said["quant_algo"] == "MIXED_PRECISION":
            said["quantized_layers"] = {stem: {"quant_algo": kind} for stem, kind in algorithms.items()}
        own = {**said, "kv_cache_quant_algo": None, "exclude_modules": kept}
        return Writing(
            {**said, "quant_method": self.name, "producer": _PRODUCER, "ignore": kept},
            changes,
            files={_FILE: {"producer": _PRODUCER, "quantization": own}},
        )


def _wrote(source: TensorSource) -> bool:
    """Whether ModelOpt left its configuration beside the tensors."""
    try:
        producer = read_json(source.directory / _FILE).get("producer")
    except CheckpointError:
        return False
    return _mapping(producer).get("name") == "modelopt"


def _group_of(weights: Weights, algorithm: Any, layers: Mapping[str, Any], module: str) -> Group:
    named = algorithm
    if algorithm == "MIXED_PRECISION":
        path = module.split(".")
        outwards = (".".join(path[:end]) for end in range(len(path), 0, -1))
        named = next((_mapping(layers[p]).get("quant_algo") for p in outwards if p in layers), None)
    args = _ALGORITHMS.get(named) if isinstance(named, str) else None
    if args is None:
        raise weights.wrong(
            f"{module} with quant_algo {str(named)[:80]!r}", f"one of {', '.join(_ALGORITHMS)}"
        )
    return Group(str(named), (), *args, outputs=False)


def _cache(weights: Weights, entry: Mapping[str, Any]) -> Args | None:
    """As ``kv_cache_quant_algo``, or ``kv_cache_scheme`` in ``config.json``."""
    named = entry.get("kv_cache_quant_algo") or entry.get("kv_cache_scheme")
    scheme = _mapping(named)
    known = _CACHES.get(named) if isinstance(named, str) else None
    if (scheme.get("num_bits"), scheme.get("type")) == (8, "float"):
        known = _FP8_TENSOR
    if named and known is None:
        weights.notices[f"the KV cache stays in 16 bits: {str(named)[:80]} is not known here"] = None
    return known


def _mapping(entry: Any) -> Mapping[str, Any]:
    return entry if isinstance(entry, Mapping) else {}
