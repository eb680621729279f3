"""Makes quantized caches: one by hand, or a fresh one for each ``generate`` of a model."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from quantport.errors import ConfigError
from quantport.kvcache.rows import AUTO, cache_dtype
from quantport.kvcache.size import skipped
from quantport.plugins.registry import Registry, default_registry

_HOOK = "_prepare_cache_for_generation"  # the place where generate makes its cache


def kv_cache(
    model: Any,
    dtype: str | None = "fp8",
    *,
    skip_layers: Sequence[int] = (),
    max_length: int | None = None,
    offloading: bool = False,
    registry: Registry | None = None,
) -> Any:
    """Makes an empty quantized cache for ``model.generate(..., past_key_values=cache)`` or ``model(...,
    past_key_values=cache)``.

    Each head of each token has its own scale, computed from its own values: there is no calibration, and what
    is stored does not depend on the batch, on other tokens, or on how the prompt was cut. Layers with sliding
    windows or without attention stay as Transformers makes them.

    Args:
        model: A Transformers model, or its configuration.
        dtype: ``fp8`` (``fp8_e4m3``), ``fp8_e5m2``, ``int8``, ``int4``, or ``auto`` for 16 bits.
        skip_layers: Layers that stay in 16 bits; negative ones count from the last.
        max_length: Tokens to allocate at once; more are then refused. None grows as needed.
        offloading: As in Transformers: layers wait in host memory for their turn.
        registry: Where the backends of devices come from; by default that of the process.

    Returns:
        A ``transformers.Cache``: growing, croppable and reorderable, empty.

    Raises:
        ConfigError: unknown dtype, no such layer, or a model without full-attention layers.
    """
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ConfigError(
            f"max_length={max_length!r}", "not a number of tokens", "1 or more, or None to grow as needed"
        )
    caches = _transformers()
    config = getattr(model, "config", model)
    if not hasattr(config, "get_text_config"):
        raise ConfigError(
            f"a KV cache for {type(model).__name__}", "no Transformers configuration", "a Transformers model"
        )
    if config.is_encoder_decoder:
        raise ConfigError(
            f"a KV cache for {type(model).__name__}",
            "an encoder and a decoder, with a cache each",
            "a decoder",
        )
    plain = caches.DynamicCache(config=config.get_text_config(decoder=True), offloading=offloading)
    return _quantized(plain, dtype, skip_layers, max_length, registry or default_registry())


def _quantized(
    plain: Any, dtype: str | None, skip_layers: Sequence[int], max_length: int | None, registry: Registry
) -> Any:
    """Puts quantized layers in place of the full-attention layers of a fresh DynamicCache."""
    ours = importlib.import_module("quantport.kvcache.layers")
    kind, skip = cache_dtype(dtype), skipped(skip_layers, len(plain.layers))
    full = [i for i, layer in enumerate(plain.layers) if type(layer) is _transformers().DynamicLayer]
    if not set(full) - (skip if kind.quant else set()):
        found = (
            f"{len(full)} full-attention layers, all skipped"
            if full
            else f"no full-attention layer in {plain.layers}"
        )
        raise ConfigError(
            f"a KV cache in {kind.name}",
            f"nothing to quantize: {found}",
            "fewer skip_layers, or dtype 'auto'",
        )
    layers, kernels = list(plain.layers), registry.kv_kernel
    for (
        i
    ) in full:  # skipped ones are ours too, in 16 bits: the same checks, and a fixed size where one is asked
        wanted = AUTO if i in skip else kind
        layers[i] = (
            ours.KVLayer(wanted, kernels)
            if max_length is None
            else ours.FixedKVLayer(wanted, kernels, max_length)
        )
    return ours.KVCache(layers, max_length, plain.offloading)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers.cache_utils")
    except ImportError:
        found, suggestion = "Transformers is not installed", "pip install 'quantport[transformers]'"
        raise ConfigError("a quantized KV cache", found, suggestion) from None


class DefaultCache:
    """Stands on one model in front of the method with which ``generate`` prepares its cache.

    It quantizes the cache that the method makes, one of fixed size too (``cache_implementation="static"``). A
    cache that the caller passes and ``use_cache=False`` are left alone. It is an object, so that the model is
    copied and pickled with it.

    Args:
        model: The model.
        dtype: As ``kv_cache_dtype``.
        skip_layers: Layers that stay in 16 bits.
        registry: Where the backends of devices come from.

    Raises:
        ConfigError: what ``kv_cache`` raises, or a model that does not generate with such a cache.
    """

    def __init__(self, model: nn.Module, dtype: str, skip_layers: Sequence[int], registry: Registry) -> None:
        # weakly: a cycle would keep a deleted model until the garbage collector runs
        self._model = weakref.ref(model)
        self.dtype, self.skip_layers, self.registry = dtype, tuple(skip_layers), registry
        self.fresh()
        if not (
            hasattr(type(model), _HOOK) and getattr(model, "_supports_default_dynamic_cache", lambda: True)()
        ):
            suggestion = "a Transformers model that generates with a DynamicCache"
            raise ConfigError(
                f"kv_cache_dtype {dtype!r} for {type(model).__name__}", "it makes no such cache", suggestion
            )

    @property
    def model(self) -> Any:
        """The model that it stands on."""
        return self._model()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _model=weakref.ref(state["_model"]))

    def fresh(self) -> Any:
        """An empty cache, for a forward call without ``generate``."""
        return kv_cache(self.model, self.dtype, skip_layers=self.skip_layers, registry=self.registry)

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Lets Transformers prepare ``model_kwargs``, then quantizes the cache that it made.

        Raises:
            ConfigError: it is of a kind that cannot be quantized, such as one that quantizes by itself.
        """
        passed_in = model_kwargs.get("past_key_values")
        getattr(type(self.model), _HOOK)(self.model, generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("past_key_values")
        if passed_in is not None or made is None:
            return
        caches = _transformers()
        if type(made) is caches.StaticCache:
            length = max(getattr(layer, "max_cache_len", 0) for layer in made.layers)
            config = self.model.config.get_text_config(decoder=True)
            plain = caches.DynamicCache(config=config, offloading=made.offloading)
            made = _quantized(plain, self.dtype, self.skip_layers, length, self.registry)
        elif type(made) is caches.DynamicCache:
            made = _quantized(made, self.dtype, self.skip_layers, None, self.registry)
        else:
            raise ConfigError(
                f"generate with cache_implementation={generation_config.cache_implementation!r}",
                f"it makes a {type(made).__name__}, and the model has kv_cache_dtype {self.dtype!r}",
                "'dynamic', 'static' or 'offloaded', or a model with kv_cache_dtype 'auto'",
            )
        model_kwargs["past_key_values"] = made

    def install(self) -> None:
        """Makes it the default of the model."""
        setattr(self.model, _HOOK, self)


def default_cache(
    model: nn.Module, dtype: str | None, skip_layers: Sequence[int], registry: Registry
) -> DefaultCache | None:
    """The default to install on a model; None for 16 bits, which need none."""
    return (
        None if cache_dtype(dtype).quant is None else DefaultCache(model, str(dtype), skip_layers, registry)
    )


def default_of(model: Any) -> DefaultCache | None:
    """The default that was installed on a model, if one was."""
    found = getattr(model, "__dict__", {}).get(_HOOK)
    return found if isinstance(found, DefaultCache) else None
