"""The reference numerics: what every kernel of every room is judged against. Pure torch, on any device."""

from quantport.numerics.blocks import check_finite, dequantize, encode, quantize
from quantport.numerics.linear import dequantize_weight, linear, quantize_weight
from quantport.numerics.nibbles import pack_int4, unpack_int4

__all__ = [
    "check_finite",
    "dequantize",
    "dequantize_weight",
    "encode",
    "linear",
    "pack_int4",
    "quantize",
    "quantize_weight",
    "unpack_int4",
]
