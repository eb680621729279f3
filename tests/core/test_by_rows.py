"""A weight that is quantized some rows at a time has the bytes of the whole weight, in every scheme."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from core_models import same_bits
from core_references import check_parts
from hypothesis import given, settings
from hypothesis import strategies as st

from quantport.engine import default_registry
from quantport.errors import WeightError
from quantport.numerics import quantize_weight
from quantport.numerics.by_rows import join_steps, quantize_steps, rows_of_step, spans_rows
from quantport.numerics.sharding import alignment
from quantport.scheme import Quant, Scheme
from quantport.scheme.catalog import BUILTIN

# what no scheme of the catalog has, and a stranger's may: each kind of span, and blocks of rows beside one
OF_STRANGERS = [
    Scheme("column blocks", Quant("int8", (0, 32)), None, ""),
    Scheme("one bf16 scale", Quant("int8", (0, 0), "bf16"), None, ""),
    Scheme("square blocks in one", Quant("e2m1", (4, 16), "e4m3fn", outer_block=(0, 0)), None, ""),
]
OPTIONS = {
    f"{name}:{option}": scheme.option(option)
    for name, scheme in BUILTIN.items()
    for option in scheme.options
    if option in ("mse", "double", "hadamard")
}
SCHEMES = {**BUILTIN, **OPTIONS, **{scheme.name: scheme for scheme in OF_STRANGERS}}
CPU = default_registry().backends["cpu"].quantize_weight


def weight(n, k, seed=0, dtype=torch.bfloat16):
    """Rows of very different sizes, of which some are zero: scales that span them come from one row only."""
    made = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-30, 8, (n, 1), generator=made).float()
    sizes[torch.rand(n, 1, generator=made) < 0.2] = -torch.inf
    return (torch.randn(n, k, generator=made) * sizes.exp2()).to(dtype)


def by_rows(x, scheme, step, fast=None, nonfinite="error"):
    reads = []

    @contextmanager
    def read(start, stop):
        assert 0 < stop - start <= step
        reads.append((start, stop))
        yield x[start:stop]

    def quantize(values, of):
        return quantize_weight(values, of, "w", nonfinite, fast)

    steps = quantize_steps(read, tuple(x.shape), scheme, step, quantize, name="w", nonfinite=nonfinite)
    return join_steps(steps, scheme, tuple(x.shape)), reads


def same(found, expected):
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert same_bits(found[key], tensor), key


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
@pytest.mark.parametrize("fast", [None, CPU], ids=["reference", "compiled"])
def test_every_scheme(scheme, fast):
    n, k = 2 * alignment(scheme, 0) + 5, 288
    for dtype in (torch.bfloat16, torch.float32):
        x = weight(n, k, dtype=dtype)
        expected = quantize_weight(x, scheme, "w", "error", fast)
        for step in {alignment(scheme, 0), 2 * alignment(scheme, 0)}:
            found, reads = by_rows(x, scheme, step, fast)
            same(found, expected)
            passes = 1 + spans_rows(scheme.weight)
            assert len(reads) == passes * -(-n // step)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([s for s in SCHEMES.values() if spans_rows(s.weight)]),
    st.integers(2, 20),
    st.integers(1, 70),
    st.integers(1, 5),
    st.integers(0, 1000),
)
def test_scales_that_span_all_rows(scheme, n, k, steps, seed):
    step = alignment(scheme, 0) * steps
    x = weight(n, k, seed)
    same(by_rows(x, scheme, step, CPU)[0], quantize_weight(x, scheme, fast=CPU))


@pytest.mark.parametrize("name", ["int8", "fp8_per_tensor", "nvfp4", "nf4:double", "mxfp4:hadamard", "q4_k"])
def test_nan_and_inf(name):
    scheme, x = BUILTIN[name], weight(9, 256, 3)
    x[7, 5], x[2, 250] = torch.nan, -torch.inf
    with pytest.raises(WeightError) as caught:
        by_rows(x, scheme, 2)
    check_parts(caught.value, "quantize w", "NaN or Inf")
    expected = quantize_weight(x, scheme, nonfinite="zero")
    same(by_rows(x, scheme, 2, nonfinite="zero")[0], expected)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_what_the_dtype_cannot_hold_is_refused_alike(scheme):
    """Rows of the largest fp16 value: rotated, some are larger."""
    step = alignment(scheme, 0)
    x = torch.full((2 * step + 1, 256), torch.finfo(torch.float16).max, dtype=torch.float16, device="cpu")
    x[1:] /= 1024
    try:
        expected = quantize_weight(x, scheme)
    except WeightError:
        with pytest.raises(WeightError, match="overflow"):
            by_rows(x, scheme, step)
    else:
        same(by_rows(x, scheme, step)[0], expected)


def test_the_rows_of_a_step():
    """It follows from the blocks; a solver of its own may look at the whole weight."""
    assert rows_of_step(BUILTIN["int8"], 1000, 10, 95) == 9
    assert rows_of_step(BUILTIN["fp8_per_block"], 1000, 10, 2000) == 128
    assert rows_of_step(BUILTIN["fp8_per_tensor"], 1000, 10, 1) == 1
    assert rows_of_step(BUILTIN["int8"], 3, 10, 95) == 3
    solved = replace(BUILTIN["int4"], solver=object())
    assert rows_of_step(solved, 1000, 10, 95) == 1000
