"""How others spell a configuration: vLLM and vLLM-Omni; and what a wrong one is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from quantport.errors import ConfigError, one_of

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


def is_component_map(value: Mapping[str, Any], fields: Iterable[str]) -> bool:
    """Whether a mapping maps components to configurations, and is none itself."""
    known = {*fields, *OTHER_KEYS}
    configs = [v for v in value.values() if isinstance(v, Mapping)]
    plain = all(v is None or isinstance(v, Mapping) for v in value.values())
    # a null, or a value that is a configuration
    meant = len(configs) < len(value) or any(set(v) & known for v in configs)
    return bool(value) and not set(value) & known and plain and meant


def explain(error: ValidationError, fields: Iterable[str]) -> ConfigError:
    """The first thing that is wrong with a configuration, in three parts."""
    first = error.errors()[0]
    key = ".".join(str(p) for p in first["loc"]) or "configuration"
    known = [*fields, *OTHER_KEYS]
    if first["type"] == "extra_forbidden":
        found = f"no such key (its value is {first.get('input')!r})"
        return ConfigError(f"configuration key {key!r}", found, one_of(str(first["loc"][-1]), known))
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    return ConfigError(
        f"configuration key {key!r} = {first.get('input')!r}", first["msg"], "see quantport.QuantConfig"
    )
