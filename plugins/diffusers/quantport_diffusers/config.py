"""The configuration that ``from_pretrained`` takes: every key of quantport's own, and no other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from quantport.engine import ConfigError, QuantConfig, default_registry

METHOD = "quantport"


class Method(str, Enum):
    """The name, as Diffusers asks for it: ``quant_method.value``."""

    QUANTPORT = METHOD


class QuantportConfig(QuantizationConfigMixin):  # type: ignore[misc]  # diffusers is not typed here
    """What to quantize, and how: ``from_pretrained(path, quantization_config=QuantportConfig("int8"))``.

    Args:
        scheme: Scheme of every layer; None keeps what a quantized checkpoint has, and lets the device choose
            for any other.
        quant_method: ``quantport``, as the dict form says.
        keys: The other keys of ``QuantConfig``: ``ignore``, ``targets``, ``num_bf16_fallback_layers``...

    Attributes:
        config: The checked configuration.

    Raises:
        ConfigError: an unknown key, scheme or value.
    """

    def __init__(self, scheme: str | None = None, *, quant_method: str = METHOD, **keys: Any) -> None:
        if quant_method != METHOD:
            found = f"quant_method={quant_method!r}"
            raise ConfigError("a configuration of quantport", found, f"quant_method={METHOD!r}, or without")
        self.quant_method = Method.QUANTPORT
        asked: Mapping[str, Any] = keys if scheme is None else {"scheme": scheme, **keys}
        self.config = QuantConfig.parse(asked, default_registry().schemes)

    def to_dict(self) -> dict[str, Any]:
        """The dict form, plain data for JSON: what was said, with the names of schemes resolved."""
        return {"quant_method": METHOD, **self.config.model_dump(mode="json", exclude_unset=True)}

    to_diff_dict = to_dict

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantportConfig) and self.config == other.config

    __hash__ = None  # type: ignore[assignment]  # as of the other configurations, which change
