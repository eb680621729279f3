"""The compiled kernels of the quantized KV cache: rows as core's, and attention as torch's over what is read
back.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

import quantport
from quantport.backend import BackendError
from quantport.kvcache import cache_dtype, decode, encode
from quantport.plugins.registry import default_registry
from quantport_cpu import jit

UNAVAILABLE = jit.why_unavailable()
pytestmark = pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE or "numba is installed")

if not UNAVAILABLE:
    from quantport_cpu.jit.kv_cache import CpuKVKernel

NAMES = ("fp8_e4m3", "fp8_e5m2", "int8", "int4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = 3e-6  # of fp32 sums over at most 5000 tokens
special = st.sampled_from([0.0, -0.0, 1.0, 7.5, 448.0, 464.0, 57344.0, 6e4, 2.0**-14, 2.0**-24, 1e-7])


def quant(name: str):
    return cache_dtype(name).quant


def inside(shape: tuple[int, ...], row: int) -> Tensor:
    """Rows in the middle of larger memory."""
    batch, heads, tokens = shape
    return torch.full((batch, heads, tokens + 3, row), 77, dtype=torch.uint8)[:, :, 2 : 2 + tokens]


def encoded(keys: Tensor, values: Tensor, name: str) -> list[Tensor]:
    """By the kernel, after which nothing else was written."""
    rows = [inside(x.shape[:3], cache_dtype(name).row_bytes(x.shape[3])) for x in (keys, values)]
    CpuKVKernel().encode((keys, values), (rows[0], rows[1]), quant(name))
    whole = [r._base for r in rows]
    assert all(bool((w[:, :, :2] == 77).all()) and bool((w[:, :, -1] == 77).all()) for w in whole)
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_core(name, dtype):
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(2, 3, 70, 128, generator=generator)
    keys *= torch.logspace(-7, 4, 420).view(2, 3, 70, 1)
    keys, values = keys.to(dtype), torch.randint(-15, 16, (2, 3, 70, 64), generator=generator).to(dtype) / 2
    keys[0, 0, 0], values[..., 0] = 0, 7.5
    for found, states in zip(encoded(keys, values, name), (keys, values), strict=True):
        assert torch.equal(found, encode(states, cache_dtype(name)))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(DTYPES),
    st.lists(special | st.floats(-6e4, 6e4, width=16), min_size=16, max_size=16),
    st.integers(-30, 30),
)
def test_every_row_is_that_of_core(name, dtype, numbers, power):
    row = torch.tensor(numbers, dtype=torch.float64) * (1.0 if dtype is torch.float16 else 2.0**power)
    states = row.to(dtype).view(1, 1, 1, 16)
    for found in encoded(states, -states, name)[:1]:
        assert torch.equal(found, encode(states, cache_dtype(name)))


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_stays_in_its_row(name):
    keys = torch.randn(1, 2, 3, 32, generator=torch.Generator().manual_seed(2))
    keys[0, 0, 0, 5], keys[0, 1, 2, 7] = torch.nan, -torch.inf
    found, _ = encoded(keys, keys, name)
    read = decode(found, 32, cache_dtype(name), torch.float32)
    expected = decode(encode(keys, cache_dtype(name)), 32, cache_dtype(name), torch.float32)
    assert torch.equal(read.isnan(), expected.isnan())
    assert torch.equal(read.nan_to_num(), expected.nan_to_num())
    out = attended(torch.randn(1, 2, 1, 32), found[:, :1, :1], found[:, 1:, :1], name)
    assert out.isnan().all()


def attended(query: Tensor, keys: Tensor, values: Tensor, name: str, mask: Tensor | None = None) -> Tensor:
    return CpuKVKernel().attend(query, (keys, values), quant(name), mask, query.shape[-1] ** -0.5)


def error(
    name: str, shape: tuple[int, ...], ratio: int, q_tokens: int, widths: tuple[int, int], masked: str
) -> float:
    """Largest difference from torch in fp64, over the largest value."""
    generator, kind = torch.Generator().manual_seed(sum(shape)), cache_dtype(name)
    (batch, heads, tokens), k_width = shape, widths[0]
    states = [torch.randn(*shape, width, generator=generator) for width in widths]
    rows = [
        inside(shape, kind.row_bytes(width)).copy_(encode(x, kind))
        for x, width in zip(states, widths, strict=True)
    ]
    query = torch.randn(batch, heads * ratio, q_tokens, k_width, generator=generator)
    mask = {
        "none": None,
        "padding": torch.rand(batch, 1, 1, tokens, generator=generator) > 0.3,
        "causal": torch.ones(1, 1, q_tokens, tokens, dtype=torch.bool).tril(tokens - q_tokens),
        "added": torch.randn(1, heads * ratio, q_tokens, tokens, generator=generator),
        "lowest": torch.where(torch.rand(batch, 1, q_tokens, tokens, generator=generator) > 0.3, 0.0, -3e38),
    }[masked]
    if masked == "padding":
        mask[..., -1] = True
    found = attended(query, *rows, name, mask)
    keys, values = (decode(r, w, kind, torch.float32).double() for r, w in zip(rows, widths, strict=True))
    exact = mask.double() if mask is not None and mask.is_floating_point() else mask
    expected = scaled_dot_product_attention(query.double(), keys, values, attn_mask=exact, enable_gqa=True)
    assert found.dtype is torch.float32
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("masked", ["none", "padding", "causal", "added", "lowest"])
@pytest.mark.parametrize("name", NAMES)
def test_attention_is_that_over_what_is_read_back(name, masked):
    assert error(name, (2, 2, 133), 4, 2, (128, 128), masked) < TOLERANCE
    assert error(name, (1, 2, 37), 3, 1, (128, 128), masked) < TOLERANCE


@pytest.mark.parametrize("width", [32, 64, 80, 96, 256])
def test_every_width_of_a_head(width):
    for name in ("int4", "fp8_e5m2"):
        assert error(name, (1, 2, 150), 4, 1, (width, width), "padding") < TOLERANCE
    assert error("int8", (1, 2, 150), 2, 1, (width, 48), "none") < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 127, 128, 129, 255, 511, 513, 1024, 5001])
def test_every_length(tokens):
    for ratio in (1, 4):
        assert error("int8", (1, 2, tokens), ratio, 1, (128, 128), "none") < TOLERANCE


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_sums(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert error("fp8_e4m3", (1, 1, 4500), 7, 1, (128, 128), "padding") < TOLERANCE
    finally:
        torch.set_num_threads(before)


def test_a_query_that_may_attend_to_nothing_gets_zeros():
    rows = encode(torch.randn(1, 2, 300, 32), cache_dtype("int8"))
    mask = torch.zeros(1, 1, 2, 300, dtype=torch.bool)
    mask[:, :, 1, 290:] = True
    out = attended(torch.randn(1, 2, 2, 32), rows, rows, "int8", mask)
    assert not out[:, :, 0].any()
    assert out[:, :, 1].abs().min() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_is_in_the_dtype_of_the_query(dtype):
    rows = encode(torch.randn(1, 2, 40, 32), cache_dtype("int8"))
    query = torch.randn(1, 4, 1, 32).to(dtype)
    wide = attended(query.float(), rows, rows, "int8")
    assert torch.equal(attended(query, rows, rows, "int8"), wide.to(dtype))


def test_what_it_serves():
    serves = CpuKVKernel().serves
    assert serves(quant("int4"), 80, 128, torch.float16)
    assert not serves(quant("int4"), 40, 128, torch.bfloat16)
    assert not serves(quant("int8"), 64, 64, torch.float64)


def test_rows_that_do_not_lie_one_behind_the_other_are_refused():
    rows = encode(torch.randn(1, 2, 40, 32), cache_dtype("int8"))
    with pytest.raises(BackendError, match="contiguous heads"):
        attended(torch.randn(1, 2, 1, 32), rows[:, :, ::2], rows[:, :, ::2], "int8")
    with pytest.raises(BackendError, match="contiguous heads"):
        attended(torch.randn(1, 2, 1, 64), rows, rows, "int8")
    with FakeTensorMode(), pytest.raises(BackendError, match="some of them are fake"):
        attended(torch.randn(1, 2, 1, 32), rows, rows, "int8")


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-qwen3-moe"])
def model(request):
    transformers = pytest.importorskip("transformers")
    path = Path(__file__).parents[3] / "examples" / "models" / request.param
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "drafts": {"prompt_lookup_num_tokens": 3},
    "a cache of fixed size": {},
}


@pytest.mark.parametrize("mode", GENERATE)
def test_a_model_writes_what_it_writes_over_tokens_that_are_read_back(model, mode, monkeypatch):
    ids = torch.arange(5, 45).view(2, 20) * 37 % 2000
    ids = ids[:1] if mode == "drafts" else ids
    mask = torch.ones_like(ids)
    mask[0, :4] = mode == "drafts"  # padding on the left, which drafts do not take
    calls: list[tuple[int, ...]] = []
    plain = CpuKVKernel.attend
    monkeypatch.setattr(CpuKVKernel, "attend", lambda *args: calls.append(args[1].shape) or plain(*args))

    def generate():
        cache = quantport.kv_cache(model, "int8", max_length=40 if "fixed" in mode else None)
        options = {"max_new_tokens": 8, "do_sample": False, **GENERATE[mode]}
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)

    found = generate()
    assert len(calls) >= 7 * model.config.num_hidden_layers or mode == "drafts"
    assert calls
    monkeypatch.setattr(default_registry(), "kv_kernel", lambda _: None)
    count = len(calls)
    assert torch.equal(found, generate())
    assert len(calls) == count
