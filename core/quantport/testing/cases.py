"""What the checks feed to kernels: shapes, rows, dtypes and weights that break careless ones."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from quantport.scheme import Scheme
from quantport.scheme.formats import FORMATS

# (n, k): round; no multiple of 16; one output; one input; half a group of 128; several blocks of 128x128;
# square, which shows a
# weight that is left transposed; 16 times an odd number along K.
SHAPES = ((64, 256), (48, 200), (1, 704), (48, 1), (33, 96), (256, 384), (128, 128), (64, 272))
PLANNED = (*SHAPES, (1, 1), (4096, 4096), (151936, 1024))  # for verdicts, which touch no memory
ROWS = (1, 2, 5, 16, 17, 64, 130)  # both sides of the usual tile sizes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYERS = ("linear", "moe")
POWERS = tuple(2**i for i in range(8))
EXPECTED = (1, 130)  # ``Request.rows`` of a decode step and of a prompt

# What an architecture may list as native: our formats, the wider ones, and those of the vendors' tables.
KNOWN_FORMATS = {
    *FORMATS,
    "fp32",
    "tf32",
    "fp16",
    "bf16",
    "e5m2",
    "e4m3fnuz",
    "e5m2fnuz",
    "mxfp8",
    "mxfp6",
    "mxfp4",
    "nvfp4",
    "hif8",
}
FORMAT_OF = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# A kernel that needs more than this is another scheme: bf16 rounds at 2**-9, an int8 activation at 2**-8 of
# the largest.
MAX_TOLERANCE = 2.0**-5


def beyond() -> list[tuple[int, int]]:
    """Shapes that no table lists, the same in every run: odd multiples of each power of two up to 128, along
    K and along N.

    A refusal that speaks of one multiple must be true of these as well.
    """
    draw = Random(0)
    sizes = [[p * (2 * draw.randrange(max(1, 32 // p), max(3, 160 // p)) + 1) for p in POWERS] for _ in "nk"]
    return [(n, 256) for n in sizes[0]] + [(64, k) for k in sizes[1]]


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal fp32 numbers, the same on every machine."""
    return torch.randn(
        *shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32, device="cpu"
    )


def activations(rows: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Activations ``[rows, k]``; from three rows on one token is all zero and one is a thousand times larger.

    Their mean is 1, like that of the weights, so that no sum cancels to nearly nothing: an error relative to
    the largest output of one token would then say more about the sum than about the kernel.
    """
    x = random(rows, k, seed=seed) + 1
    if rows > 2:
        x[1] = 0
        x[2] *= 1000
    return x.to(dtype)


def plain(n: int, k: int) -> Tensor:
    """A weight as models have them: small, normal, bf16. Its mean is 0.02, see ``activations``."""
    return (random(n, k) * 0.02 + 0.02).to(torch.bfloat16)


def bias(n: int, dtype: torch.dtype) -> Tensor:
    """A bias ``[n]`` of about the size of the outputs, positive as they are."""
    return (random(n, seed=2).abs() + 0.5).to(dtype)


def _zero_rows(n: int, k: int) -> Tensor:
    weight = plain(n, k)
    weight[::3] = 0
    return weight


def _outlier(n: int, k: int) -> Tensor:
    weight = plain(n, k)
    weight[n // 2, k // 2] = 300.0
    return weight


def _one_sided(n: int, k: int) -> Tensor:
    return -plain(n, k).abs()  # reaches the code -128, which has no positive twin


def _only_last_column(n: int, k: int) -> Tensor:
    weight = torch.zeros(n, k, dtype=torch.bfloat16, device="cpu")
    weight[:, -1] = plain(n, 1)[:, 0]
    return weight


SPECIAL: dict[str, Callable[[int, int], Tensor]] = {
    "all zero": lambda n, k: torch.zeros(n, k, dtype=torch.bfloat16, device="cpu"),
    "zero rows": _zero_rows,
    "one outlier": _outlier,
    "negative only": _one_sided,
    "last column only": _only_last_column,
    "huge (1e30)": lambda n, k: random(n, k) * 1e30,
    "tiny (1e-30)": lambda n, k: random(n, k) * 1e-30,
    "equal values": lambda n, k: torch.full((n, k), 0.5, dtype=torch.float16, device="cpu"),
}


def specials(scheme: Scheme) -> list[tuple[str, Callable[[int, int], Tensor]]]:
    """The special weights that a scheme can hold: fp16 scales, as block types have, cannot hold huge ones;
    they are refused.
    """
    small = scheme.weight.element.block > 0 or scheme.weight.scale == "fp16"
    return [(name, make) for name, make in SPECIAL.items() if not (small and name.startswith("huge"))]


def relative_error(y: Tensor, expected: Tensor) -> float:
    """The largest ``max|y - expected| / max|expected|`` of a token, since each token could have come alone.

    Infinite when something is not finite, and when only the expected values are all zero.
    """
    y, expected = y.detach().double().cpu(), expected.detach().double().cpu()
    if not torch.isfinite(y).all():
        return float("inf")
    worst, largest = (y - expected).abs().amax(-1), expected.abs().amax(-1)
    return torch.where(worst == 0, 0.0, worst / largest).max().item()


def kept(tensor: Tensor) -> Tensor:
    """A copy on the CPU, to compare with later; in place for the opaque layouts of oneDNN."""
    return tensor.to("cpu", copy=True) if tensor.layout is torch.strided else tensor.clone()


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(_flat(left), _flat(right))


def _flat(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:  # an opaque layout of oneDNN
        tensor = tensor.to_dense()
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
