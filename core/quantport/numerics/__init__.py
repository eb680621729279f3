"""The reference numerics: what every kernel of every room is judged against. Pure torch, on any device."""

from quantport.numerics.blocks import Blocks, Reduce, check_finite, dequantize, quantize, quantize_blocks
from quantport.numerics.codebooks import codebook
from quantport.numerics.double import dequantize_scales, quantize_scales
from quantport.numerics.elements import bits, converts, decode, encode, raw, values_of
from quantport.numerics.linear import (
    FLOATS,
    dequantize_weight,
    linear,
    quantize_static,
    quantize_weight,
    quantized_values,
    static_values,
)
from quantport.numerics.packing import pack_bits, pack_int4, unpack_bits, unpack_int4
from quantport.numerics.rotation import rotate
from quantport.numerics.scales import global_factor

__all__ = [
    "FLOATS",
    "Blocks",
    "Reduce",
    "bits",
    "check_finite",
    "codebook",
    "converts",
    "decode",
    "dequantize",
    "dequantize_scales",
    "dequantize_weight",
    "encode",
    "global_factor",
    "linear",
    "pack_bits",
    "pack_int4",
    "quantize",
    "quantize_blocks",
    "quantize_scales",
    "quantize_static",
    "quantize_weight",
    "quantized_values",
    "raw",
    "rotate",
    "static_values",
    "unpack_bits",
    "unpack_int4",
    "values_of",
]
