"""How others spell a configuration: vLLM and vLLM-Omni; and what a wrong one is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from quantport.errors import ConfigError, one_of
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
