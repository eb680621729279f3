"""What holds of every scheme and every option: layout, idempotence, extremes, refusals, chunks, order of
rows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from core_peers import normal
from core_references import DTYPES, check_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quantport import numerics
from quantport.errors import WeightError
from quantport.numerics import blocks, gguf
from quantport.scheme import Scheme
from quantport.scheme.catalog import BUILTIN

SOME = settings(max_examples=4, deadline=None)
OPTIONS = (
    "mxfp8:floor",
    "mxfp8:mse",
    "mxfp6_e2m3:rceil",
    "mxfp6_e3m2:ceil",
    "mxfp4:floor",
    "mxfp4:mse",
    "mxfp4_dualscale:floor",
    "nvfp4:mse",
    "nf4:double",
    "fp4:double",
    "int4_weight_only:hadamard",
    "int4_mse:hadamard",
    "mxfp4:hadamard",
    "nf4:double:hadamard",
)
NAMES = [*(name for name in BUILTIN if name != "bf16"), *OPTIONS]
GGUF = [name for name in NAMES if BUILTIN[name].weight.element.block]
OTHERS = [name for name in NAMES if name not in GGUF]
# quantizing what was dequantized gives the same values where amax is a code of the format, and scales are
# searched in order
FIXED = ("fp6", "nf4", "fp4", "q4_0", "q8_0", "nvfp4")
STABLE = [
    n
    for n in NAMES
    if n in FIXED or (n.startswith(("fp8", "mxfp")) and not n.endswith(("dualscale", "hadamard")))
]


def stored_of(w: Tensor, name: str) -> dict[str, Tensor]:
    """Quantizes, and checks shapes, dtypes and bytes against the layout."""
    scheme = BUILTIN[name]
    stored = numerics.quantize_weight(w, scheme, "w")
    assert {key: (tuple(t.shape), t.dtype) for key, t in stored.items()} == scheme.layout(*w.shape)
    assert sum(t.nbytes for t in stored.values()) == scheme.bytes(*w.shape)
    return stored


def values_of(w: Tensor, name: str) -> Tensor:
    value = numerics.dequantize_weight(stored_of(w, name), BUILTIN[name], w.shape[1])
    assert value.shape == w.shape
    assert value.dtype is torch.float32
    return value


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(a[key].contiguous().view(torch.uint8), b[key].contiguous().view(torch.uint8)) for key in a
    )


@pytest.mark.parametrize("name", NAMES)
@SOME
@given(n=st.integers(0, 9), k=st.integers(0, 600), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
def test_any_shape_and_dtype(name, n, k, dtype, seed):
    """Odd sizes, groups of one element, nothing at all; values are near, in whatever dtype the weight
    comes.
    """
    w = normal(n, k, seed=seed, spread=0.5).to(dtype)
    value = values_of(w, name)
    if w.numel():
        bound = {2: 0.55, 3: 0.4, 4: 0.35, 5: 0.15, 6: 0.15, 8: 0.07}[BUILTIN[name].weight.element.bits]
        assert (value - w).norm() <= bound * w.float().norm()


@pytest.mark.parametrize("name", NAMES)
def test_the_dtype_of_the_weight_does_not_matter(name):
    """A bf16 weight gives the bytes of the same values in fp32; but dual scale rounds in between, to the
    weight's dtype.
    """
    w = normal(8, 520).bfloat16()
    if not name.startswith("mxfp4_dualscale"):
        assert equal(stored_of(w, name), stored_of(w.float(), name))
    half = normal(8, 520, spread=0.5).half()
    if not name.startswith("mxfp4_dualscale"):
        assert equal(stored_of(half, name), stored_of(half.float(), name))


@pytest.mark.parametrize("name", STABLE)
@pytest.mark.parametrize("seed", range(3))
def test_quantizing_twice_changes_nothing(name, seed):
    value = values_of(normal(16, 600, seed=seed, spread=0.5), name)
    assert torch.equal(values_of(value, name), value)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name):
    for w in (torch.zeros(3, 300), -torch.zeros(3, 300)):
        assert not values_of(w, name).any()
    w = normal(4, 512)
    w[1] = 0
    w[:, 256:] = 0
    if not BUILTIN[name].rotation:
        value = values_of(w, name)
        assert not value[1].any()
        assert not value[:, 256:].any()


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("top", [2.0**-133, 2.0**-126, 1e-30, 1e30, 2.0**122], ids=str)
def test_tiny_and_huge_weights_are_finite(name, top):
    """From the smallest subnormal of bf16 up: no NaN, no Inf, no error above amax."""
    w = (normal(4, 256, spread=0.0) * 0.2).clamp(-1, 1)
    w[2] = 1
    w = (w.double() * top).float()
    value = values_of(w, name)
    assert value.isfinite().all()
    assert (value - w).abs().max() <= w.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*NAMES, "mxfp8:rceil"])
def test_the_largest_numbers_come_back_finite_or_are_refused(name, dtype):
    """Sums of two of these overflow. In bf16 only a code beyond amax is refused, a rotation, and scales in
    fp16; in fp16 also what an e8m0 scale rounds beyond 65504.
    """
    scheme, top = BUILTIN[name], torch.finfo(dtype).max
    share = torch.linspace(-1, 1, 128)
    for row in (
        torch.full((128,), 1.0),
        torch.full((128,), -1.0),
        share,
        -share.abs(),
        share * 0.9,
        share * 0.5,
    ):
        w = (row.double() * top).to(dtype)[None]
        if may_overflow(w, scheme):
            continue
        stored = stored_of(w, name)
        plain = replace(scheme, rotation=0)
        assert numerics.dequantize_weight(stored, plain, 128, dtype).isfinite().all()


def may_overflow(w: Tensor, scheme: Scheme) -> bool:
    """Whether a weight is refused, which none of bf16 in a float format is but for a rotation."""
    try:
        numerics.quantize_weight(w, scheme, "w")
    except WeightError as error:
        why = str(error)
    else:
        return False
    assert "overflow" in why
    quant, fp16 = scheme.weight, w.dtype is torch.float16
    assert (
        scheme.rotation
        or quant.element.block
        or not quant.element.exponent
        or (fp16 and quant.scale == "e8m0")
    )
    return True


@pytest.mark.parametrize("name", ["int8", "int4_weight_only", "q8_0", "mxfp4", "nvfp4"])
def test_a_refusal_at_the_top_is_of_values_and_not_of_their_neighbourhood(name):
    """The same magnitude with the other sign, whose code is not beyond it, is quantized."""
    w = torch.full((1, 128), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    if name != "q8_0":
        assert values_of(w, name).isfinite().all()
    if name.startswith("int"):
        with pytest.raises(WeightError, match="overflow"):
            stored_of(-w, name)


@pytest.mark.parametrize("name", OTHERS)
def test_one_outlier_spoils_no_other_row(name):
    w = normal(4, 512, spread=0.0)
    alone = values_of(w, name)
    w[2, 5] = 500
    value = values_of(w, name)
    if BUILTIN[name].rotation == 0:
        assert abs(value[2, 5] - 500) <= 500 / 4
    quant = BUILTIN[name].weight
    if quant.block_shape[0] == 1 and quant.outer_block != (0, 0) and not quant.scale_quant:
        assert torch.equal(value[[0, 1, 3]], alone[[0, 1, 3]])


@pytest.mark.parametrize("name", NAMES)
def test_equal_rows_and_permuted_rows(name):
    """Scales of one row each see nothing of the others; one scale of all sees them in any order."""
    if BUILTIN[name].weight.block_shape[0] == 128:
        return  # blocks of 128 rows
    w = normal(12, 520)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(values_of(w[order], name), values_of(w, name)[order])
    value = values_of(w[:1].repeat(5, 1), name)
    assert torch.equal(value, value[:1].expand(5, -1))


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_strides_do_not_show(name, monkeypatch):
    w = normal(140, 260)
    before, expected = w.clone(), stored_of(w, name)
    assert torch.equal(w, before), "the weight is left alone"
    assert equal(stored_of(w.t().contiguous().t(), name), expected)
    for chunk in (1, 700, 10_000):
        monkeypatch.setattr(blocks, "CHUNK", chunk)
        monkeypatch.setattr(gguf, "CHUNK", chunk)
        assert equal(stored_of(w, name), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_inf_are_refused_by_name_or_read_as_zero(name, bad):
    for n, k, i, j in ((5, 300, 4, 299), (3, 512, 0, 0), (1, 1, 0, 0)):
        w = normal(n, k)
        w[i, j] = bad
        with pytest.raises(WeightError) as caught:
            numerics.quantize_weight(w, BUILTIN[name], "layers.3.q_proj")
        check_parts(caught.value, "layers.3.q_proj", "NaN", "nonfinite='zero'")
        found = numerics.quantize_weight(w, BUILTIN[name], nonfinite="zero")
        w[i, j] = 0
        assert equal(found, stored_of(w, name))


@pytest.mark.parametrize("name", [name for name in BUILTIN if BUILTIN[name].activation])
def test_activations_with_nan_do_not_raise(name):
    """NaN in one token is NaN in its row of the result, and in no other row."""
    x, w = normal(3, 256, spread=0.1), normal(8, 256)
    x[1, 7] = torch.nan
    y = numerics.linear(x, stored_of(w, name), BUILTIN[name])
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", ["int4_mse", "int4_hqq"])
def test_offsets_beyond_bf16_are_refused(name):
    """fp32 values above the largest bf16: the offset would be Inf."""
    with pytest.raises(WeightError, match="overflow") as caught:
        numerics.quantize_weight(torch.full((2, 64), 3.4e38), BUILTIN[name], "layers.1.k_proj")
    check_parts(caught.value, "layers.1.k_proj", "fp8_weight_only")


class Divisors(TorchDispatchMode):
    """Collects the Python numbers that tensors are divided by, where torch on GPUs multiplies by their
    reciprocals instead; and those that are divided by tensors, where it does so on every device.
    """

    def __init__(self):
        super().__init__()
        self.found, self.reciprocals = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, aten = func(*args, **(kwargs or {})), torch.ops.aten
        of_number = len(args) > 1 and not isinstance(args[1], Tensor)
        inverted = any(args[0] is x for x in self.reciprocals)
        if func.overloadpacket is aten.reciprocal:
            self.reciprocals.append(out)
        elif of_number and (
            func.overloadpacket in (aten.div, aten.div_) or (func.overloadpacket is aten.mul and inverted)
        ):
            self.found.append(args[1])
        return out


@pytest.mark.parametrize("name", [*NAMES, "mxfp8:rceil"])
def test_every_division_is_rounded_once_on_every_device(name):
    with Divisors() as divisors:
        stored = numerics.quantize_weight(torch.randn(8, 512), BUILTIN[name])
        numerics.linear(torch.randn(2, 512), stored, BUILTIN[name])
    assert all(abs(math.frexp(number)[0]) == 0.5 for number in divisors.found), (
        "a reciprocal is exact of powers of two only"
    )


def test_a_number_divided_by_a_tensor_is_seen():
    with Divisors() as divisors:
        torch.ones(1) / 3
        5 / torch.ones(1)
        1 / torch.ones(1)
    assert divisors.found == [3, 5, 1]
