"""Keys and values as they are stored: attention takes them so, everything else sees plain tensors."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from quantport.kvcache import KVKernel, cache_dtype, decode, encode
from quantport.kvcache.stored_states import MAX_QUERY_ROWS, StoredStates

transformers = pytest.importorskip("transformers")
layers = pytest.importorskip("quantport.kvcache.layers")
TOKENS, WIDTH, HEADS, RATIO = 9, 16, 2, 3
INT8 = cache_dtype("int8")


class Counting(KVKernel):
    """A device that attends through torch, and counts."""

    calls = 0

    def serves(self, quant, key_width, value_width, dtype):
        return key_width == WIDTH

    def encode(self, states, rows, quant):
        for x, to in zip(states, rows, strict=True):
            to.copy_(encode(x, INT8))

    def attend(self, query, rows, quant, mask, scale):
        self.calls += 1
        keys, values = (decode(r, r.shape[-1] - 2, INT8, query.dtype) for r in rows)
        return sdpa(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)


def states(tokens: int, seed: int = 0, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, 2, HEADS, tokens, width, generator=torch.Generator().manual_seed(seed))
    return keys, values


def filled(size: int | None = None, kernel: KVKernel | None = None):
    """A layer that holds tokens, and its kernel."""
    kernel = kernel or Counting()
    find = lambda _: kernel  # noqa: E731
    layer = layers.KVLayer(INT8, find) if size is None else layers.FixedKVLayer(INT8, find, size)
    layer.update(*states(TOKENS))
    return layer, kernel


def stored(size: int | None = None) -> tuple[Tensor, Tensor, Counting]:
    """What a step returns."""
    layer, kernel = filled(size)
    keys, values = layer.update(*states(1, seed=1))
    assert type(keys) is type(values) is StoredStates
    return keys, values, kernel


def plain(x: Tensor) -> Tensor:
    return decode(encode(x, INT8), WIDTH, INT8, torch.float32)


KEYS, VALUES = (
    torch.cat([plain(a), plain(b)], 2) for a, b in zip(states(TOKENS), states(1, seed=1), strict=True)
)
QUERY = torch.randn(2, HEADS * RATIO, 1, WIDTH, generator=torch.Generator().manual_seed(5))
MASK = torch.ones(2, 1, 1, TOKENS + 1, dtype=torch.bool)
MASK[0, ..., :3] = False


def repeated(x: Tensor) -> Tensor:
    """As ``transformers.integrations.sdpa_attention.repeat_kv``."""
    b, h, t, w = x.shape
    return x[:, :, None, :, :].expand(b, h, RATIO, t, w).reshape(b, h * RATIO, t, w)


def packed(x: Tensor) -> Tensor:
    """As ``pack_gqa``."""
    return x.reshape(2, HEADS, RATIO, WIDTH)


FUSED = {
    "gqa": lambda k, v: sdpa(QUERY, k, v, enable_gqa=True),
    "repeated": lambda k, v: sdpa(QUERY, repeated(k), repeated(v), attn_mask=MASK),
    "packed": lambda k, v: sdpa(packed(QUERY), k, v, attn_mask=MASK, scale=0.3),
    "a mask of two dimensions": lambda k, v: sdpa(packed(QUERY), k, v, MASK[0, 0]),
    "an added mask": lambda k, v: sdpa(packed(QUERY), k, v, MASK.float()),
}


@pytest.mark.parametrize("size", [None, 12])
@pytest.mark.parametrize("call", FUSED)
def test_attention_takes_rows_as_they_are(call, size, monkeypatch):
    keys, values, kernel = stored(size)
    monkeypatch.setattr(StoredStates, "dense", property(lambda _: pytest.fail("they were read back")))
    assert (keys.shape, keys.dtype, keys.device.type) == (KEYS.shape, torch.float32, "cpu")
    assert torch.allclose(FUSED[call](keys, values), FUSED[call](KEYS, VALUES), atol=1e-6)
    assert kernel.calls == 1


def autocast(k, v):
    with torch.autocast("cpu", torch.bfloat16):
        return sdpa(packed(QUERY), k, v)


def with_gradient(k, v):
    query = packed(QUERY).requires_grad_()
    sdpa(query, k, v).sum().backward()
    return query.grad


def one_changed(k, v):
    k.mul_(2)
    return sdpa(packed(QUERY), k, v)


def mapped(k, v):
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.vmap(lambda q: sdpa(q, k, v))(packed(QUERY)[None])


READ = {
    "eager attention": lambda k, v: (QUERY @ repeated(k).mT).softmax(-1) @ repeated(v),
    "causal": lambda k, v: sdpa(packed(QUERY), k, v, is_causal=True),
    "dropout": lambda k, v: sdpa(packed(QUERY), k, v, dropout_p=1.0),
    "many queries": lambda k, v: sdpa(QUERY.expand(2, 6, MAX_QUERY_ROWS, WIDTH), k, v, enable_gqa=True),
    "a part of the tokens": lambda k, v: sdpa(packed(QUERY), k[:, :, 2:], v[:, :, 2:]),
    "values of another kind": lambda k, v: sdpa(packed(QUERY), k, v + 0),
    "other repeats": lambda k, v: sdpa(repeated(QUERY[:, :2]), repeated(k), repeated(v).clone()),
    "joined": lambda k, v: torch.cat([k, v], 2),
    "a list": lambda k, v: torch.stack(list(k[0]) + list(v[0])),
    "transposed": lambda k, v: k.transpose(1, 2).contiguous(),
    "a copy": lambda k, v: copy.deepcopy(k),
    "a pickle": lambda k, v: pickle.loads(pickle.dumps(v)),
    "numbers": lambda k, v: torch.tensor(k.tolist()),
    "expanded otherwise": lambda k, v: k[:, :, None].expand(2, HEADS, 2, -1, WIDTH),
    "reshaped otherwise": lambda k, v: k[:, :, None, :, :].reshape(-1),
    "from C++": lambda k, v: torch._C._nn.gelu(k),
    "autocast": autocast,
    "a gradient": with_gradient,
    "changed in place": one_changed,
    "vmap": mapped,
}


@pytest.mark.parametrize("call", READ)
def test_everything_else_sees_what_is_read_back(call):
    keys, values, kernel = stored()
    found, expected = READ[call](keys, values), READ[call](KEYS.clone(), VALUES.clone())
    assert type(found) is Tensor
    assert torch.equal(found, expected)
    assert kernel.calls == 0


@pytest.mark.parametrize(
    "bad",
    [
        lambda k, v: sdpa(packed(QUERY)[..., :8], k, v),
        lambda k, v: sdpa(QUERY, k, v),
        lambda k, v: sdpa(packed(QUERY).double(), k, v),
        lambda k, v: sdpa(packed(QUERY), k, v, attn_mask=MASK[..., :4]),
    ],
)
def test_what_torch_refuses_is_refused(bad):
    for k, v in (stored()[:2], (KEYS, VALUES)):
        with pytest.raises(RuntimeError):
            bad(k, v)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([None, 40]),
    st.lists(st.sampled_from(["step", "crop", "reset", "reorder", "copy"]), max_size=12),
)
def test_states_of_before_stay_what_they_were(size, operations):
    """Whatever is written over them: the layer and a plain tensor go the same way."""
    layer, _ = filled(size)
    expected = [plain(x) for x in states(TOKENS)]
    kept: list[tuple[Tensor, Tensor]] = []
    for i, operation in enumerate(["step", *operations, "step"]):
        if operation == "step":
            new = states(1, seed=10 + i)
            found = layer.update(*new)
            expected = [torch.cat([e, plain(x)], 2) for e, x in zip(expected, new, strict=True)]
            kept += zip(found, expected, strict=True)
        elif operation == "crop":
            layer.crop(-1)
            expected = [e[:, :, :-1] for e in expected]
        elif operation == "reset":
            layer.reset()
            expected = [e[:, :, :0] for e in expected]
        elif operation == "reorder":
            layer.reorder_cache(torch.tensor([1, 0]))
            expected = [e[[1, 0]] for e in expected]
        else:
            layer = copy.deepcopy(layer) if i % 2 else pickle.loads(pickle.dumps(_plain_finder(layer)))
    assert all(torch.equal(found + 0, e) for found, e in kept)


def _find(_: torch.device) -> KVKernel:
    return Counting()


def _plain_finder(layer):
    layer.kernels = _find
    return layer


def test_a_layer_that_grows_copies_seldom_and_shares_nothing():
    layer, _ = filled()
    layer.update(*states(1))
    where = layer.keys.data_ptr()
    for _ in range(40):
        layer.update(*states(1))
    assert layer.keys.data_ptr() == where
    other, _ = filled()
    other.keys, other.values = layer.keys, layer.values  # as a prefix that two continue
    other.update(*states(1, seed=3))
    before = layer.keys.clone()
    layer.update(*states(1, seed=4))
    other.update(*states(1, seed=5))
    assert torch.equal(layer.keys[:, :, : before.shape[2]], before)
    assert torch.equal(layer.keys[:, :, -1:], encode(states(1, seed=4)[0], INT8))


def test_memory_made_in_inference_mode_is_written_outside_of_it():
    with torch.inference_mode():
        layer, _ = filled()
        layer.update(*states(1, seed=1))
    keys, _ = layer.update(*states(1, seed=2))
    assert torch.equal(keys[:, :, :-1], KEYS)


def test_prompts_and_other_widths_are_read_back():
    layer, kernel = filled()
    assert type(layer.update(*states(layers.FEW_TOKENS))[0]) is StoredStates
    assert type(layer.update(*states(layers.FEW_TOKENS + 1))[0]) is Tensor
    layer = layers.KVLayer(INT8, lambda _: kernel)
    assert type(layer.update(*states(1, width=WIDTH + 1))[0]) is Tensor


def test_states_that_nobody_holds_cost_nothing():
    layer, _ = filled()
    gc.disable()
    try:
        for _ in range(3):
            layer.update(*states(1))
        assert [ref() for ref in layer._returned] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("breaks", [False, True])
def test_compiled_code_reads_back(breaks):
    layer, kernel = filled(40)
    kept, _ = layer.update(*states(1, seed=2))
    layer.crop(-1)

    def update(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return layer.update(keys, values)

    update = torch.compiler.disable(update) if breaks else update

    def step(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return sdpa(2 * query, *update(keys, values)) + 1

    with torch.no_grad():
        found = torch.compile(step, backend="eager", fullgraph=not breaks)(packed(QUERY), *states(1, seed=1))
        assert torch.allclose(found, sdpa(2 * packed(QUERY), KEYS, VALUES) + 1, atol=1e-6)
    assert kernel.calls == 0
    assert torch.equal(kept[:, :, -1:], plain(states(1, seed=2)[0])), "it was read back in time"
