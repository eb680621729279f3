"""The configuration of a checkpoint that is quantized already: exactly what it stores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from quantport.checkpoint import Recognized
from quantport.config import QuantConfig
from quantport.errors import ConfigError
from quantport.model.layers import Layer
from quantport.scheme.catalog import Schemes

_CACHE = {"kv_cache_dtype", "kv_cache_skip_layers"}
_RUNTIME = {"fallback", *_CACHE}  # not in the weights: it may change from run to run


def refuse_weights(checkpoint: Recognized, scheme: str | None, config: Any) -> None:
    """Refuses a scheme, or a configuration of the weights, for weights that are quantized already.

    Raises:
        ConfigError: names the format.
    """
    keys: Any = [config]
    if config is None or isinstance(config, Mapping):
        keys = config or ()
    elif isinstance(config, QuantConfig):
        keys = config.model_fields_set
    if scheme is not None or not set(keys) <= _RUNTIME:
        raise ConfigError(
            f"quantize {checkpoint.source.directory} while loading",
            f"it is a {checkpoint.format_name} checkpoint: quantized already",
            f"load it without scheme=; of config= only {', '.join(sorted(_RUNTIME))}",
        )


def as_stored(
    checkpoint: Recognized, layers: Iterable[Layer], requested: QuantConfig, schemes: Schemes
) -> QuantConfig:
    """Every quantized layer by name with the scheme that it has, everything else kept.

    The KV cache and the fallback are what was saved too, unless ``requested`` says another.
    """
    tied = {layer.name: layer.tied for layer in layers}
    targets: dict[str, str | None] = {}
    for name, weights in checkpoint.quantized().items():
        by_weight = {weight: stored.scheme.name for weight, stored in weights.items()}
        most = Counter(by_weight.values()).most_common(1)[0][0]
        others = {weight: scheme for weight, scheme in by_weight.items() if scheme != most}
        dense = {"bf16": None} if others else {}  # beside quantized experts it is what was left alone
        for inner, scheme in {"": most, **others}.items():
            targets[f"{name}.{inner}".rstrip(".")] = dense.get(scheme, scheme)
        targets |= dict.fromkeys(tied[name], most)
    saved = checkpoint.kv_cache()
    cache: dict[str, Any] = {"kv_cache_dtype": saved.dtype, "kv_cache_skip_layers": saved.skip_layers}
    if requested.model_fields_set & _CACHE:
        cache = {key: getattr(requested, key) for key in _CACHE}
    fallback = None if "fallback" in requested.model_fields_set else checkpoint.fallback()
    weights_kept = {"targets": targets, "linear": None, "moe": None, "scheme": None}
    return QuantConfig.parse({**weights_kept, **cache, "fallback": fallback or requested.fallback}, schemes)
