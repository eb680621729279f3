"""Code books: formats whose codes are indices into a table. NF4 and FP4 for weights, an 8-bit one for their scales.

Sources: QLoRA, arXiv 2305.14314 (NF4: quantiles of the normal distribution; double quantization); bitsandbytes
``functional.py`` (the values, and FP4's order of codes); Dettmers, arXiv 1511.04561 (the dynamic 8-bit code).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # twelfths; codes 8 to 15 are the negatives


def _dynamic() -> Tensor:
    """The signed dynamic 8-bit code: 7 decades, and in decade i the midpoints of 2**i equal parts of [0.1, 1]."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2.0) * 10 ** (i - 6)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


CODEBOOKS = {
    "nf4": torch.tensor(_NF4),
    "fp4": torch.tensor([sign * v / 12 for sign in (1, -1) for v in _FP4]),
    "dynamic8": _dynamic(),
}


@cache
def _table(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Midpoints between neighbouring values, and the code of each value, in ascending order of the values."""
    values, codes = CODEBOOKS[name].sort(stable=True)
    keep = torch.ones(len(values), dtype=torch.bool)
    keep[1:] = values[1:] != values[:-1]  # FP4 has two zeros: the first is used
    values, codes = values[keep], codes[keep]
    return ((values[1:] + values[:-1]) / 2).to(device), codes.to(torch.uint8).to(device)


def nearest(x: Tensor, name: str) -> Tensor:
    """Index of the nearest value of a code book: fp32, any shape, to uint8. A tie goes to the smaller value.

    Source: bitsandbytes compares with midpoints, ``x > midpoint`` meaning the upper value.
    """
    midpoints, codes = _table(name, x.device)
    rank = torch.bucketize(x, midpoints, out_int32=True)
    if name == "fp4":
        return codes[rank]
    return rank.to(torch.uint8)
