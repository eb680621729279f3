"""Code books: formats whose codes are indices into a table. NF4 and FP4 for weights, an 8-bit one for their
scales.

Sources: QLoRA, arXiv 2305.14314 (NF4: quantiles of the normal distribution; double quantization);
bitsandbytes ``functional.py`` (the values, and FP4's order of codes); Dettmers, arXiv 1511.04561 (the dynamic
8-bit code).
"""

from __future__ import annotations

import torch
from torch import Tensor

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # twelfths; codes 8 to 15 are the negatives


def _dynamic() -> tuple[float, ...]:
    """The signed dynamic 8-bit code: 7 decades, and in decade i the midpoints of 2**i equal parts of [0.1,
    1].
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        means = ((edges[:-1] + edges[1:]) / 2.0) * 10 ** (i - 6)
        values += [*means.tolist(), *(-means).tolist()]
    return tuple(sorted(values))


CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": _NF4,
    "fp4": tuple(sign * v / 12 for sign in (1, -1) for v in _FP4),
    "dynamic8": _dynamic(),
}


def codebook(name: str, device: torch.device) -> Tensor:
    """Value of every code: fp32. Made anew at each call, since a tensor that is kept may outlive the mode it
    was made in.
    """
    return torch.tensor(CODEBOOKS[name], dtype=torch.float32, device=device)


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` for a table ``[size]`` and integers of any shape; fake tensors of absent devices can
    do this too.
    """
    return table.index_select(0, index.reshape(-1).int()).view(index.shape)


def nearest(x: Tensor, name: str) -> Tensor:
    """Index of the nearest value of a code book: fp32, any shape, to uint8. A tie goes to the smaller value.

    Source: bitsandbytes compares with midpoints, ``x > midpoint`` meaning the upper value.
    """
    values, codes = codebook(name, x.device).sort(stable=True)
    if name == "fp4":  # it has two zeros: the first is used
        keep = [i for i in range(16) if i != 8]
        values, codes = values[keep], codes[keep]
    rank = torch.bucketize(x, (values[1:] + values[:-1]) / 2, out_int32=True)
    return lookup(codes.to(torch.uint8), rank) if name == "fp4" else rank.to(torch.uint8)
