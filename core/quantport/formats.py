"""Number formats: names, bits and limits.

Sources: OCP Microscaling Formats (MX) v1.0 and OCP 8-bit Floating Point Specification for e4m3fn and e5m2;
two's complement for the integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """One number format.

    Attributes:
        name: Standard name.
        bits: Bits per element.
        storage: The torch dtype of one stored element (int4 codes are packed eight to an int32).
        low: Smallest code value.
        high: Largest code value.
        half_range: What amax is divided by to get a symmetric scale: ``(high - low) / 2``.
    """

    name: str
    bits: int
    storage: torch.dtype
    low: float
    high: float

    @property
    def half_range(self) -> float:
        """Half the span of the codes: 127.5 for int8, 7.5 for int4, 448 for e4m3fn, 57344 for e5m2."""
        return (self.high - self.low) / 2


E4M3FN = Format("e4m3fn", 8, torch.float8_e4m3fn, -448.0, 448.0)
E5M2 = Format("e5m2", 8, torch.float8_e5m2, -57344.0, 57344.0)
INT8 = Format("int8", 8, torch.int8, -128, 127)
INT4 = Format("int4", 4, torch.int32, -8, 7)
BF16 = Format("bf16", 16, torch.bfloat16, -3.3895313892515355e38, 3.3895313892515355e38)

FORMATS = {f.name: f for f in (E4M3FN, E5M2, INT8, INT4, BF16)}
