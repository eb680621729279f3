"""The quantized KV cache as a Transformers cache: what is stored, what every operation does to it, and what
it refuses.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantport
from quantport.errors import ConfigError
from quantport.kvcache import KVShape, bytes_per_token, cache_dtype, decode, encode, kv_shape

transformers = pytest.importorskip("transformers")
SOME = settings(max_examples=25, deadline=None)
NAMES = ("fp8_e4m3", "fp8_e5m2", "int8", "int4", "auto")
TOKENS = 9
CONFIG = transformers.LlamaConfig(
    hidden_size=24, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
)
sizes = st.sampled_from([None, TOKENS + 3])
names = st.sampled_from(NAMES)


def states(batch=2, tokens=TOKENS, width=7, dtype=torch.bfloat16, seed=0, heads=2):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, heads, tokens, width, generator=generator).to(dtype)
    return keys, values


def cache_of(name, size=None, **options):
    return quantport.kv_cache(CONFIG, name, max_length=size, **options)


def filled(name, size=None, cuts=(), **kwargs):
    """A cache with both layers filled in chunks, and what the last update of the last layer returned."""
    cache, (keys, values) = cache_of(name, size), states(**kwargs)
    edges = [0, *sorted(cuts), keys.shape[2]]
    out = (keys[:, :, :0], values[:, :, :0])
    for start, stop in pairwise(edges):
        for layer in range(2):
            out = cache.update(keys[:, :, start:stop], values[:, :, start:stop], layer)
    return cache, out


def stored(cache):
    length = cache.get_seq_length()
    return [t[:, :, :length] for layer in cache.layers for t in (layer.keys, layer.values)]


def same(one, other):
    assert one.get_seq_length() == other.get_seq_length()
    assert all(torch.equal(a, b) for a, b in zip(stored(one), stored(other), strict=True))


@SOME
@given(names, sizes, st.sets(st.integers(1, TOKENS - 1)))
def test_chunks_make_no_difference(name, size, cuts):
    whole, expected = filled(name)
    chunked, found = filled(name, size, cuts)
    same(chunked, whole)
    for a, b, x in zip(found, expected, states(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, decode(encode(x, cache_dtype(name)), 7, cache_dtype(name), x.dtype)), (
            "it returns what it stores"
        )


@SOME
@given(names, sizes, st.integers(1, TOKENS))
def test_crop_then_append_is_append(name, size, count):
    cache, _ = filled(name, size)
    cache.crop(-count)
    assert cache.get_seq_length() == TOKENS - count
    keys, values = (x[:, :, TOKENS - count :] for x in states())
    for layer in range(2):
        cache.update(keys, values, layer)
    same(cache, filled(name)[0])
    assert cache.is_croppable


BATCH = {
    "reorder_cache": (torch.tensor([1, 1, 0]), [1, 1, 0]),
    "batch_select_indices": (torch.tensor([2, 0]), [2, 0]),
    "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
}


@SOME
@given(names, sizes, st.sampled_from(sorted(BATCH)))
def test_what_is_done_to_the_batch_is_done_to_what_is_read(name, size, operation):
    argument, order = BATCH[operation]
    cache, before = filled(name, size, batch=3)
    getattr(cache, operation)(argument)
    more = [x[order] for x in states(batch=3, tokens=1, seed=1)]
    for layer in range(2):
        after = cache.update(*more, layer)
    expected = [
        torch.cat((x[order], decode(encode(m, cache_dtype(name)), 7, cache_dtype(name), m.dtype)), 2)
        for x, m in zip(before, more, strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))


@pytest.mark.parametrize("size", [None, TOKENS])
@pytest.mark.parametrize("name", NAMES)
def test_reset_takes_another_batch_and_another_dtype(name, size):
    cache, _ = filled(name, size)
    cache.reset()
    assert cache.get_seq_length() == 0
    keys, values = states(batch=1, tokens=4, dtype=torch.float16)
    for layer in range(2):
        found = cache.update(keys, values, layer)
    assert found[0].shape == keys.shape
    assert found[0].dtype is torch.float16
    assert cache.get_mask_sizes(1, 0) == (5, 0)


def test_offload_and_prefetch_move_rows():
    cache, before = filled("int8")
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    empty = torch.empty(2, 2, 0, 7, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(cache.update(empty, empty, 0), before, strict=True))
    same(copy.deepcopy(cache), cache)


def test_a_fixed_size_is_allocated_once_and_written_in_place():
    cache = cache_of("fp8", 16)
    keys, values = states(tokens=4)
    cache.update(keys, values, 0)
    where, size = cache.layers[0].keys.data_ptr(), cache.nbytes
    cache.update(keys, values, 0)
    cache.crop(-3)
    cache.reset()
    cache.update(keys, values, 0)
    assert (cache.layers[0].keys.data_ptr(), cache.nbytes) == (where, size)
    assert size == 2 * 2 * 2 * 16 * 9  # keys and values, batch, heads, tokens, codes and scale
    assert cache.get_max_length() == 16


WRONG = {
    "batch size 3": {"batch": 3},
    "KV heads 4": {"heads": 4},
    "key size 8": {"width": 8},
    "dtype torch.float32": {"dtype": torch.float32},
    "4 tokens": {"tokens": 4},
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("skip", [(), (0,)])
def test_a_wrong_update_is_refused_and_leaves_nothing(what, skip):
    cache, right = cache_of("int4", TOKENS + 3, skip_layers=skip), states()
    for layer in range(2):
        cache.update(*right, layer)
    before, state = [t.clone() for t in stored(cache)], cache.get_seq_length()
    with pytest.raises(ConfigError, match=what) as caught:
        cache.update(*states(**{"tokens": 1, **WRONG[what]}), 0)
    assert caught.value.suggestion
    assert cache.get_seq_length() == state
    assert all(torch.equal(a, b) for a, b in zip(stored(cache), before, strict=True))


def test_keys_and_values_that_do_not_fit_each_other():
    keys, values = states()
    for bad in (values[:1], values[:, :, :3], values.float(), values.int()):
        cache = cache_of("int8")
        with pytest.raises(ConfigError, match="alike but for the head size"):
            cache.update(keys, bad, 0)
        assert cache.nbytes == 0
    with pytest.raises(ConfigError, match="a model of 2 layers"):
        cache.update(keys, values, 2)


def test_values_may_have_another_width_than_keys():
    keys, values = states()
    found = cache_of("int4").update(keys, values[..., :3], 0)
    assert [x.shape[-1] for x in found] == [7, 3]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"skip_layers": (2,)}, "2 is none of the 2 layers"),
        ({"skip_layers": (-3,)}, "-3 is none"),
        ({"skip_layers": ("0",)}, "'0' is none"),
        ({"skip_layers": (0, -1)}, "all skipped"),
        ({"size": 0}, "not a number of tokens"),
    ],
)
def test_wrong_options(options, found):
    with pytest.raises(ConfigError, match=found):
        cache_of("fp8", **options)


def test_what_has_no_such_cache():
    with pytest.raises(ConfigError, match="no Transformers configuration"):
        quantport.kv_cache(torch.nn.Linear(2, 2), "fp8")
    with pytest.raises(ConfigError, match="an encoder and a decoder"):
        quantport.kv_cache(transformers.T5Config(), "fp8")
    windows = transformers.MistralConfig(num_hidden_layers=2, sliding_window=8)
    with pytest.raises(ConfigError, match="no full-attention layer"):
        quantport.kv_cache(windows, "fp8")


def test_skipped_and_windowed_layers_stay_in_16_bits():
    config = transformers.Qwen3Config(
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention"] * 2,
    )
    cache = quantport.kv_cache(config, "int4", skip_layers=(-2,))
    kinds = [layer.kind.name if hasattr(layer, "kind") else type(layer).__name__ for layer in cache.layers]
    assert kinds == ["int4", "DynamicSlidingWindowLayer", "auto", "DynamicSlidingWindowLayer"]
    keys, values = states()
    assert torch.equal(cache.update(keys, values, 2)[0], keys)
    shape = kv_shape(config.to_dict())
    assert shape.layers == ("full", "window") * 2
    assert bytes_per_token(shape, "int4", (-2,)) == 2 * 32 * (66 + 3 * 256)


COUNTED = [
    ("auto", (), 3072),
    ("fp8", (), 1632),
    ("int8", (0, -1), 4 * 272 + 2 * 512),
    ("int4", (), 864),
    ("fp8_e5m2", (), 1632),
]


@pytest.mark.parametrize(("name", "skip", "expected"), COUNTED)
def test_bytes_per_token_are_those_of_the_cache(name, skip, expected):
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=6
    )
    cache = quantport.kv_cache(config, name, skip_layers=skip)
    for layer in range(6):
        cache.update(*states(batch=1, heads=4, width=32), layer)
    assert kv_shape(config.to_dict()) == KVShape(("full",) * 6, 4, 32)
    assert (
        cache.nbytes
        == TOKENS * expected
        == TOKENS * bytes_per_token(KVShape(("full",) * 6, 4, 32), name, skip)
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_hidden_layers": 2, "num_attention_heads": 4},
        {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "sliding_window": 16},
        {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "kv_lora_rank": 16},
        {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "hidden_size": 64,
            "layer_types": ["full_attention", "new"],
        },
        {"num_hidden_layers": "2", "num_attention_heads": None, "hidden_size": -1},
    ],
)
def test_no_guess_where_the_configuration_says_too_little(config):
    assert kv_shape(config) is None


def test_shapes_of_nested_and_mixed_models():
    text = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "use_sliding_window": False,
        "sliding_window": 9,
    }
    assert kv_shape({"text_config": text, "hidden_size": 1}) == KVShape(("full", "full"), 4, 16)
    mixed = kv_shape({**text, "layer_types": ["linear_attention", "full_attention"]})
    assert bytes_per_token(mixed, "int8") == 2 * 4 * 18


def test_a_fixed_cache_is_cropped_as_a_growing_one():
    cache = cache_of("int8", 8)
    with pytest.raises(ValueError, match="minus the number"):
        cache.layers[0].crop(3)


def test_skip_layers_that_are_no_list_and_a_length_that_is_no_number():
    with pytest.raises(ConfigError, match="not a list of layers"):
        cache_of("fp8", skip_layers=3)
    with pytest.raises(ConfigError, match="max_length=True"):
        cache_of("fp8", True)
