"""Compiles the decode step of a Transformers model: ``generate`` then has a cache of fixed size, and one
graph for each step.
"""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

from torch import nn

from quantport.errors import ConfigError, UnsupportedError
from quantport.loading.kv_caches import default_of

MAX_LENGTH = 1024
ModelT = TypeVar("ModelT", bound=nn.Module)


def compile_decode(model: ModelT, max_length: int = MAX_LENGTH) -> ModelT:
    """Sets up ``model.generate`` to decode with a cache of fixed size and a step that ``torch.compile`` turns
    into one graph, quantized layers being single operators in it.

    The prompt runs as before. The first call compiles, which takes a minute or more; torch keeps the result
    on disk (``TORCHINDUCTOR_CACHE_DIR``), where other processes find it. Results are rounded between
    operators as without it: greedy tokens are those of an eager step over such a cache. Over the cache that
    grows Transformers rounds attention in another way, which shows where two tokens are as likely.

    Args:
        model: A Transformers model that generates, loaded or quantized by quantport or not.
        max_length: Tokens of prompt and answer that the cache holds; every step attends to that many. A call
            for more takes a longer cache, and compiles again.

    Returns:
        The model.

    Raises:
        ConfigError: ``max_length`` is no number of tokens.
        UnsupportedError: the model does not generate, or not in one graph; its KV cache is quantized; or the
            step would run on the CPU and there is no C++ compiler.
    """
    asked = f"compile the decode step of {type(model).__name__}"
    if type(max_length) is not int or max_length < 1:
        raise ConfigError(f"max_length={max_length!r}", "not a number of tokens", "1 or more")
    _refuse(model, asked)
    device: Any = getattr(model, "device", None)
    if device is None or device.type == "cpu":
        _find_compiler(asked)
    step = importlib.import_module("transformers").CompileConfig(
        fullgraph=True, mode=None, options={"emulate_precision_casts": True}
    )
    step._compile_all_devices = True  # Transformers compiles for accelerators only, if it is not told
    settings: Any = model.generation_config
    settings.cache_implementation, settings.max_cache_len = "static", max_length
    settings.compile_config = step
    return model


def _refuse(model: Any, asked: str) -> None:
    """Raises for a model whose step does not become one graph with a static cache."""
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise UnsupportedError(asked, "it does not generate text", "a causal language model of Transformers")
    if not getattr(model, "_can_compile_fullgraph", False) or model.config.is_encoder_decoder:
        found = "Transformers does not compile this architecture as one graph"
        raise UnsupportedError(asked, found, "run it without compiling")
    if default_of(model) is not None:
        found = "its KV cache is quantized, and such a cache runs outside of graphs"
        raise UnsupportedError(asked, found, "load it without kv_cache, or run it without compiling")


def _find_compiler(asked: str) -> None:
    """Raises where inductor would find no C++ compiler, which it says only in the middle of ``generate``."""
    builder = importlib.import_module("torch._inductor.cpp_builder")
    try:
        builder.get_cpp_compiler()
    except Exception as error:  # its own class moved between versions of torch
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        found = f"no C++ compiler that torch can use: {first}"
        suggestion = "install g++, or name one in CXX; or run it without compiling"
        raise UnsupportedError(asked, found, suggestion) from error
