"""How others spell a configuration: vLLM, vLLM-Omni and Transformers; and what a wrong one is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import NoneType
from typing import Any

from pydantic import ValidationError

from quantport.errors import ConfigError, needed, one_of, shown
from quantport.model.patterns import MODULE
from quantport.scheme.catalog import Schemes

OTHER_KEYS = {
    "method": "scheme",
    "quant_method": "scheme",
    "quantization": "scheme",
    "global_scheme": "scheme",
    "linear_scheme_override": "linear",
    "moe_scheme_override": "moe",
    "ignored_layers": "ignore",
    "modules_to_not_convert": "ignore",
}
# vLLM's names of weights, and the scheme that they mean there
_VLLM_WEIGHTS = {
    "fp8_per_tensor_static": "fp8_per_tensor",
    "fp8_per_channel_static": "fp8_per_channel",
    "fp8_per_block_static": "fp8_per_block",
    "int8_per_channel_static": "int8_weight_only",
    "int4": "int4_weight_only",
}


# vLLM's names of activations, and a scheme that has them
_VLLM_ACTIVATIONS = {
    "fp8_per_token": "fp8_per_channel",
    "fp8_per_token_dynamic": "fp8_per_channel",
    "fp8_per_block_dynamic": "fp8_per_block",
    "int8_per_token": "int8",
    "int8_per_token_dynamic": "int8",
    "mxfp8": "mxfp8",
    "mxfp4": "mxfp4",
    "nvfp4_per_token": "nvfp4",
}


def scheme_of(value: Any, schemes: Schemes) -> Any:
    """Reads vLLM's ``{"weight": ..., "activation": ...}``: the name of the scheme that has both.

    Without ``activation`` it is that of the weight, which brings its own; null is 16 bits.

    Raises:
        ConfigError: no scheme has these weights with these activations.
    """
    if not (isinstance(value, Mapping) and "weight" in value and set(value) <= {"weight", "activation"}):
        return value
    weight = value["weight"]
    name = _VLLM_WEIGHTS.get(weight, weight) if isinstance(weight, str) else weight
    if "activation" not in value or weight is value["activation"] is None:
        return name
    asked = f"weights {weight!r} with activations {value['activation']!r}"
    return _with_activation(str(name), value["activation"], schemes, asked)


def _with_activation(weight: str, activation: Any, schemes: Schemes, asked: str) -> str:
    """The scheme with these weights, and these activations instead of its own; options stay."""
    if activation is not None and str(activation) not in _VLLM_ACTIVATIONS:
        raise ConfigError(asked, "no activations have this name", one_of(str(activation), _VLLM_ACTIVATIONS))
    base, *options = weight.split(":")
    quant = None if activation is None else schemes[_VLLM_ACTIVATIONS[str(activation)]].activation
    alike = [s for s in schemes.values() if s.weight == schemes[base].weight]
    for scheme in (schemes[base], *alike):
        if scheme.activation == quant:
            return ":".join((scheme.name, *options))
    known = ", ".join(f"{s.name} ({s.summary})" for s in alike)
    raise ConfigError(asked, "no scheme has these weights with these activations", f"one of: {known}")


def of_transformers(key: str, value: Any) -> Any:
    """Reads a value of a key as Transformers means it: ``modules_to_not_convert`` has a rule of its own."""
    if key != "modules_to_not_convert" or not isinstance(value, list | tuple | NoneType):
        return value
    return [MODULE + one if isinstance(one, str) else one for one in value or ()]


def fp8_of_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """Reads ``fp8`` as Transformers and vLLM store it: in blocks where a block size is there, and e4m3."""
    scheme = config.get("scheme")
    if not isinstance(scheme, str) or scheme.lower() != "fp8":
        return config
    if config.get("weight_block_size") is not None:
        config["scheme"] = "fp8_per_block"
    means_nothing_else = {"fmt": "e4m3", "scale_fmt": "float", "expert_dtype": "fp8", "dequantize": False}
    return {k: v for k, v in config.items() if k not in means_nothing_else or v != means_nothing_else[k]}


def is_component_map(value: Mapping[str, Any], fields: Iterable[str]) -> bool:
    """Whether a mapping maps components to configurations, and is none itself. Names of schemes alone do not
    show it: ``{"schem": "int8"}`` is misspelt.
    """
    known = {*fields, *OTHER_KEYS}
    configs = [v for v in value.values() if isinstance(v, Mapping)]
    plain = all(v is None or isinstance(v, Mapping | str) for v in value.values())
    # a null, or a value that is a configuration
    meant = None in value.values() or any(set(v) & known for v in configs)
    return bool(value) and not set(value) & known and plain and meant


def schemes_in(value: object) -> Iterator[str]:
    """The names of schemes in a configuration that may be wrong, its components included."""
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if OTHER_KEYS.get(str(key), key) == "scheme" and isinstance(inner, str):
            yield inner
        yield from schemes_in(inner)


def explain(error: ValidationError, fields: Iterable[str]) -> ConfigError:
    """The first thing that is wrong with a configuration, in three parts."""
    first = error.errors()[0]
    key = ".".join(str(p) for p in first["loc"]) or "configuration"
    if first["type"] == "extra_forbidden":
        found = f"no such key (its value is {shown(first.get('input'))})"
        known = [*fields, *OTHER_KEYS]
        return ConfigError(f"configuration key {key!r}", found, one_of(str(first["loc"][-1]), known))
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    value = shown(first.get("input"))
    if cause is not None:  # a check of ours
        return ConfigError(f"configuration key {key!r} = {value}", str(cause), "see quantport.QuantConfig")
    found = f"a value of type {type(first.get('input')).__name__}"
    return ConfigError(f"configuration key {key!r} = {value}", found, needed(first))
