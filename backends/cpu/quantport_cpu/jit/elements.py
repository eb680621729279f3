"""The number formats that kernels are made for, as plain numbers that no default of torch can change.

What is compiled into a kernel is a constant in ``ELEMENTS`` or in the source of this package, so that the key
of the cache on disk covers it (``store.key``).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from quantport.backend import FORMATS, Format, numerics


class Element(NamedTuple):
    """A number format of at most 8 bits.

    Attributes:
        name: Its name.
        bits: Bits of a code.
        exponent: Exponent bits, 0 where it is no float.
        mantissa: Mantissa bits.
        high: Largest value.
        values: The value of each code, fp32, of a format of 4 bits or a code book; empty for others.
        midpoints: Between the values of a code book, ascending, fp32; empty for others.
        codes: The codes of a code book by ascending value, with one of two zeros; empty for others.
    """

    name: str
    bits: int
    exponent: int
    mantissa: int
    high: float
    values: tuple[float, ...] = ()
    midpoints: tuple[float, ...] = ()
    codes: tuple[int, ...] = ()

    @property
    def codebook(self) -> bool:
        """Whether codes are indices into a table of values."""
        return bool(self.midpoints)


def _element(f: Format) -> Element:
    values = tuple(numerics.values_of(f.name).tolist()) if f.bits == 4 and not f.block else ()
    if not f.codebook:
        return Element(f.name, f.bits, f.exponent, f.mantissa, float(f.high), values)
    codes = sorted(range(len(values)), key=values.__getitem__)
    codes = [code for i, code in enumerate(codes) if not i or values[code] != values[codes[i - 1]]]
    ascending = np.array([values[code] for code in codes], np.float32)
    midpoints = tuple(float((a + b) / np.float32(2)) for a, b in pairwise(ascending))
    return Element(f.name, f.bits, f.exponent, f.mantissa, float(f.high), values, midpoints, tuple(codes))


ELEMENTS = {name: _element(f) for name, f in FORMATS.items() if f.bits <= 8}
# Formats as literals of compiled code.
NUMBERS = {name: i for i, name in enumerate(ELEMENTS)}


def element_of(number: int) -> Element:
    """The format behind a literal."""
    return list(ELEMENTS.values())[number]
