"""What is asked of a checkpoint that is quantized: to keep it as it is, or to quantize some of it anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quantport.checkpoint import Recognized
from quantport.config import QuantConfig
from quantport.config.resolve import StoredSchemes, needs_default
from quantport.errors import ConfigError
from quantport.model.layers import Layer
from quantport.model.roles import SkipCode
from quantport.scheme.catalog import Schemes

_CACHE = {"kv_cache_dtype", "kv_cache_skip_layers"}
_RUNTIME = {"fallback", *_CACHE}  # not in the weights: it may change from run to run


def with_stored(checkpoint: Recognized, requested: QuantConfig, schemes: Schemes) -> QuantConfig:
    """The configuration of a checkpoint that is quantized: nothing is quantized anew that nobody asked for.

    The KV cache and the fallback are what was saved too, unless ``requested`` says another.

    Raises:
        ConfigError: something is to be quantized anew whose values the format cannot give.
    """
    keys = requested.model_fields_set
    if not (checkpoint.converts or requested.model_dump(exclude_defaults=True).keys() <= _RUNTIME):
        raise ConfigError(
            f"quantize {checkpoint.source.directory} while loading",
            f"it is a {checkpoint.format_name} checkpoint: quantized already",
            f"load it without scheme=; of config= only {', '.join(sorted(_RUNTIME))}",
        )
    asked, updates = requested.model_dump(exclude_unset=True), dict[str, Any]()
    if needs_default(requested):
        for part in asked["components"].values() if requested.components else (asked,):
            if part is not None and not part.get("scheme"):
                part |= {"linear": None, "moe": None} | part
    saved = checkpoint.kv_cache()
    if not keys & _CACHE:
        updates |= {"kv_cache_dtype": saved.dtype, "kv_cache_skip_layers": saved.skip_layers}
    if "fallback" not in keys and checkpoint.fallback():
        updates["fallback"] = checkpoint.fallback()
    return QuantConfig.parse({**asked, **updates}, schemes)


def stored_schemes(checkpoint: Recognized, layers: Iterable[Layer]) -> StoredSchemes:
    """The schemes that the weights of layers are stored in, of those that a module can hold so; the others
    are decoded, where the format can do that.
    """
    quantized = checkpoint.quantized()
    homes = {
        layer.home
        for layer in layers
        if not checkpoint.converts or layer.skip_reason is None or layer.skipped_as(SkipCode.ROLE)
    }
    return {
        name: {weight: stored.scheme.name for weight, stored in weights.items()}
        for name, weights in quantized.items()
        if name in homes
    }
