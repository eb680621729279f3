"""The configuration that ``from_pretrained`` takes."""

from __future__ import annotations

from enum import Enum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from quantport.engine import METHOD, LibraryConfig


class Method(str, Enum):
    """The name, as Diffusers asks for it: ``quant_method.value``."""

    QUANTPORT = METHOD


class QuantportConfig(LibraryConfig, QuantizationConfigMixin):  # type: ignore[misc]  # diffusers is not typed here
    """What to quantize, and how: ``from_pretrained(path, quantization_config=QuantportConfig("int8"))``.

    Arguments and errors as of ``LibraryConfig``.
    """

    quant_method = Method.QUANTPORT

    def to_diff_dict(self) -> dict[str, Any]:
        """What is printed: all that was said."""
        return self.to_dict()
