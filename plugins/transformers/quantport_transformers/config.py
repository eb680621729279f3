"""The configuration that ``from_pretrained`` takes."""

from __future__ import annotations

from transformers.utils.quantization_config import QuantizationConfigMixin

from quantport.engine import LibraryConfig


class QuantportConfig(LibraryConfig, QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed here
    """What to quantize, and how: ``from_pretrained(path, quantization_config=QuantportConfig("int8"))``.

    Arguments and errors as of ``LibraryConfig``.
    """
