"""Number formats: names, bits and limits.

Sources: OCP 8-bit Floating Point Specification (e4m3fn, e5m2); OCP Microscaling Formats (MX) v1.0 (e3m2,
e2m3, e2m1, e8m0); ml_dtypes ``_finfo.py`` (the fnuz types); QLoRA, arXiv 2305.14314, appendix E, and
bitsandbytes (nf4, fp4); ggml ``ggml-common.h`` (the block types q*); two's complement for the integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """One number format.

    Attributes:
        name: Standard name.
        bits: Bits per element (of a GGUF block type: of its codes, without scales).
        storage: The torch dtype of one unpacked code.
        low: Smallest value.
        high: Largest value.
        exponent: Exponent bits of a float whose codes are a byte or less, and which has a zero of either
            sign; 0 for every other format.
        mantissa: Its mantissa bits.
        block: Elements of one GGUF block; 0 for every other format.
    """

    name: str
    bits: int
    storage: torch.dtype
    low: float
    high: float
    exponent: int = 0
    mantissa: int = 0
    block: int = 0

    @property
    def half_range(self) -> float:
        """Half the span of the values: 127.5 for int8, 7.5 for int4, 448 for e4m3fn, 6 for e2m1."""
        return (self.high - self.low) / 2

    @property
    def is_float8(self) -> bool:
        """Whether torch has this format as a dtype of one byte."""
        return self.storage.itemsize == 1 and self.storage.is_floating_point

    @property
    def codebook(self) -> bool:
        """Whether codes are indices into a table of values."""
        return self.name in ("nf4", "fp4")


FP32 = Format("fp32", 32, torch.float32, -3.4028234663852886e38, 3.4028234663852886e38)
FP16 = Format("fp16", 16, torch.float16, -65504.0, 65504.0)
BF16 = Format("bf16", 16, torch.bfloat16, -3.3895313892515355e38, 3.3895313892515355e38)
E4M3FN = Format("e4m3fn", 8, torch.float8_e4m3fn, -448.0, 448.0, exponent=4, mantissa=3)
E5M2 = Format("e5m2", 8, torch.float8_e5m2, -57344.0, 57344.0, exponent=5, mantissa=2)
E4M3FNUZ = Format("e4m3fnuz", 8, torch.float8_e4m3fnuz, -240.0, 240.0)
E5M2FNUZ = Format("e5m2fnuz", 8, torch.float8_e5m2fnuz, -57344.0, 57344.0)
E8M0 = Format("e8m0", 8, torch.uint8, 2.0**-127, 2.0**127)
E3M2 = Format("e3m2", 6, torch.uint8, -28.0, 28.0, exponent=3, mantissa=2)
E2M3 = Format("e2m3", 6, torch.uint8, -7.5, 7.5, exponent=2, mantissa=3)
E2M1 = Format("e2m1", 4, torch.uint8, -6.0, 6.0, exponent=2, mantissa=1)
INT8 = Format("int8", 8, torch.int8, -128, 127)
INT4 = Format("int4", 4, torch.int8, -8, 7)
UINT4 = Format("uint4", 4, torch.uint8, 0, 15)
NF4 = Format("nf4", 4, torch.uint8, -1.0, 1.0)
FP4 = Format("fp4", 4, torch.uint8, -1.0, 1.0)
Q4_0 = Format("q4_0", 4, torch.uint8, -8, 7, block=32)
Q4_1 = Format("q4_1", 4, torch.uint8, 0, 15, block=32)
Q5_0 = Format("q5_0", 5, torch.uint8, -16, 15, block=32)
Q5_1 = Format("q5_1", 5, torch.uint8, 0, 31, block=32)
Q8_0 = Format("q8_0", 8, torch.uint8, -127, 127, block=32)
Q2_K = Format("q2_k", 2, torch.uint8, 0, 3, block=256)
Q3_K = Format("q3_k", 3, torch.uint8, -4, 3, block=256)
Q4_K = Format("q4_k", 4, torch.uint8, 0, 15, block=256)
Q5_K = Format("q5_k", 5, torch.uint8, 0, 31, block=256)
Q6_K = Format("q6_k", 6, torch.uint8, -32, 31, block=256)
Q8_K = Format("q8_k", 8, torch.uint8, -127, 127, block=256)

FORMATS = {
    f.name: f
    for f in (
        FP32,
        FP16,
        BF16,
        E4M3FN,
        E5M2,
        E4M3FNUZ,
        E5M2FNUZ,
        E8M0,
        E3M2,
        E2M3,
        E2M1,
        INT8,
        INT4,
        UINT4,
        NF4,
        FP4,
        Q4_0,
        Q4_1,
        Q5_0,
        Q5_1,
        Q8_0,
        Q2_K,
        Q3_K,
        Q4_K,
        Q5_K,
        Q6_K,
        Q8_K,
    )
}
