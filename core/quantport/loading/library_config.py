"""The configuration under which other libraries take quantport as one of their quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

from quantport.checkpoint.quantport_format import MARK
from quantport.config import QuantConfig
from quantport.errors import ConfigError
from quantport.plugins.registry import Registry, default_registry

METHOD = "quantport"
Merge = Callable[[Any, Any], Any]


class LibraryConfig:
    """Every key of ``QuantConfig``, and no other, in the shape that quantizers of Hugging Face have: a
    ``quant_method``, and plain data to and fro. An integration derives from it and from the class of its
    library.

    Args:
        scheme: Scheme of every layer; None keeps what a quantized checkpoint has, and lets the device choose
            for any other.
        quant_method: ``quantport``, as the dict form says.
        keys: The other keys of ``QuantConfig``.

    Attributes:
        config: The checked configuration.
        registry: Where the names of schemes come from; None for that of the process.

    Raises:
        ConfigError: an unknown key, scheme or value.
    """

    quant_method: Any = METHOD
    registry: Registry | None = None

    def __init__(self, scheme: str | None = None, *, quant_method: str = METHOD, **keys: Any) -> None:
        if quant_method != METHOD:
            found = f"quant_method={quant_method!r}"
            raise ConfigError("a configuration of quantport", found, f"quant_method={METHOD!r}, or without")
        asked: Mapping[str, Any] = keys if scheme is None else {"scheme": scheme, **keys}
        registry = self.registry or default_registry()
        self.config = QuantConfig.parse(asked, registry.schemes)

    def to_dict(self) -> dict[str, Any]:
        """The dict form, plain data for JSON: what was said, with the names of schemes resolved."""
        return {"quant_method": METHOD, **self.config.model_dump(mode="json", exclude_unset=True)}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.config == other.config

    __hash__ = None  # type: ignore[assignment]  # as of the other configurations, which change


def is_marked(stored: Any) -> bool:
    """Whether a ``quantization_config`` is the mark of what only quantport reads."""
    return isinstance(stored, Mapping) and stored.get("quantized_by") == MARK["quantized_by"]


def merge_or_take_ours(merge: Merge, kind: type[LibraryConfig]) -> Merge:
    """How a library settles the configuration of a checkpoint and the one that is passed, where either may be
    quantport's: the one that is passed decides, and what quantport has quantized needs none.

    Args:
        merge: Of the library, which answers everything else: stored and passed configuration -> that which
            counts.
        kind: The configuration of its integration.
    """

    @wraps(merge)
    def merged(stored: Any, asked: Any) -> Any:
        if isinstance(asked, kind):
            return asked
        if isinstance(asked, Mapping) and asked.get("quant_method") == METHOD:
            return kind(**asked)
        if not is_marked(stored):
            return merge(stored, asked)
        if asked is None:
            return kind()
        raise ConfigError(
            f"load it with a {type(asked).__name__}",
            "quantport has quantized the checkpoint",
            f"no quantization_config, or a {kind.__name__}",
        )

    return merged
