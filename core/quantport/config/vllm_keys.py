"""How others spell a configuration: vLLM, vLLM-Omni and Transformers; and what a wrong one is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import NoneType
from typing import Any

from pydantic import ValidationError

from quantport.errors import ConfigError, needed, one_of, shown
from quantport.model.patterns import MODULE

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
_VLLM_WEIGHTS = {
    "fp8_per_tensor_static": "fp8_per_tensor",
    "fp8_per_channel_static": "fp8_per_channel",
    "fp8_per_block_static": "fp8_per_block",
    "int8_per_channel_static": "int8_weight_only",
}


def weight_of(value: Any) -> Any:
    """Reads vLLM's ``{"weight": ..., "activation": ...}``: the weight names the scheme."""
    if isinstance(value, Mapping) and "weight" in value and set(value) <= {"weight", "activation"}:
        weight = value["weight"]
        return _VLLM_WEIGHTS.get(weight, weight) if isinstance(weight, str) else weight
    return value


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
    """Whether a mapping maps components to configurations, and is none itself."""
    known = {*fields, *OTHER_KEYS}
    configs = [v for v in value.values() if isinstance(v, Mapping)]
    plain = all(v is None or isinstance(v, Mapping) for v in value.values())
    # a null, or a value that is a configuration
    meant = len(configs) < len(value) or any(set(v) & known for v in configs)
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
