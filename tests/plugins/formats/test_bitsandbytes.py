"""bitsandbytes checkpoints, made and decoded by bitsandbytes itself."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from core_models import same_bits
from format_checks import Made, converts, held, keeps, overlays, quantizable, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import junk
from torch import Tensor

import quantport
from quantport.checkpoint import Checkpoint
from quantport.errors import CheckpointError
from quantport.scheme.catalog import BUILTIN
from quantport_formats.bitsandbytes import Bitsandbytes

CHECKED_BY = "bitsandbytes"

STATE = "quant_state.bitsandbytes__"


def four_bits(kind: str = "nf4", size: int = 64, nested: bool = False, model: str = "llama") -> Made:
    config, tensors = tiny(model)
    values = {}
    for name in quantizable(tensors):
        packed, state = bnb.functional.quantize_4bit(
            tensors[name].float(), blocksize=size, compress_statistics=nested, quant_type=kind
        )
        values[name] = bnb.functional.dequantize_4bit(packed, state).float()
        tensors[name] = packed
        tensors |= {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    scheme = kind if size == 64 else f"{kind}:g{size}"
    return Made({**config, "quantization_config": said}, tensors, values, scheme)


def eight_bits(exact: bool = True) -> Made:
    """``exact`` gives the values as one rounding of fp32 has them."""
    config, tensors = tiny()
    values = {}
    for name in quantizable(tensors):
        codes, rows, _ = bnb.functional.int8_vectorwise_quant(tensors[name].half())
        values[name] = bnb.functional.int8_vectorwise_dequant(codes, rows)
        if exact:
            values[name] = codes.float() * (rows / 127).view(-1, 1)
        stem = name.removesuffix(".weight")
        tensors |= {name: codes, f"{stem}.SCB": rows, f"{stem}.weight_format": torch.tensor(0).byte()}
    said = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return Made({**config, "quantization_config": said}, tensors, values, "int8_weight_only")


def said_of(nested: bool, kind: str) -> Any:
    if nested:
        return pytest.warns(UserWarning, match="scales of 7 weights, stored in 8 bits, are held in fp32")
    if kind == "8 bits":
        return pytest.warns(UserWarning, match=r"7 weights of LLM.int8\(\) .* activations in 16 bits")
    return contextlib.nullcontext()


@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_kept_to_the_bit(kind, size, nested, tmp_path):
    with said_of(nested, kind):
        keeps(four_bits(kind, size, nested), tmp_path)


def test_experts(tmp_path):
    keeps(four_bits(model="qwen3_moe"), tmp_path)


def test_blocks_that_reach_over_rows_are_decoded(tmp_path):
    made = four_bits("nf4", 512)
    with pytest.warns(UserWarning, match=r"7 weights \(.*\) are decoded"):
        model = quantport.load(made.write(tmp_path), device="cpu")
    assert not held(model)
    modules = dict(model.named_modules())
    for name, values in made.values.items():
        weight = modules[name.removesuffix(".weight")].weight
        assert same_bits(weight.detach(), values.to(torch.bfloat16)), name


@pytest.mark.parametrize(("size", "nested"), [(512, True), (512, False), (64, True)])
def test_rows_are_read_alone(size, nested, tmp_path):
    made = four_bits("nf4", size, nested)
    with contextlib.closing(Checkpoint.open(made.write(tmp_path))) as source:
        found = Bitsandbytes().recognize(source, made.config, BUILTIN)
        assert found is not None
        for name, values in made.values.items():
            assert same_bits(found.source.read(name, slice(3, 10)), values[3:10]), name


def test_eight_bits_are_kept(tmp_path):
    with said_of(False, "8 bits"):
        keeps(eight_bits(), tmp_path)


def test_eight_bits_are_bitsandbytes_own_up_to_a_unit_in_the_last_place():
    once, twice = eight_bits(), eight_bits(exact=False)
    for name, values in once.values.items():
        bits = (values.view(torch.int32).long() - twice.values[name].view(torch.int32).long()).abs()
        assert bits.max() <= 1, name


@pytest.mark.parametrize("kind", ["nf4", "8 bits"])
def test_it_becomes_another_scheme(kind, tmp_path):
    with said_of(False, kind):
        converts(eight_bits() if kind == "8 bits" else four_bits(kind), tmp_path, "fp8_per_channel")


def test_what_was_left_is_quantized(tmp_path):
    overlays(four_bits(), tmp_path, "lm_head")


def test_rows_in_the_order_of_a_gpu_are_refused_when_they_are_read(tmp_path):
    made = eight_bits()
    made.tensors |= {n: torch.tensor(2).byte() for n in made.tensors if n.endswith("weight_format")}
    with pytest.raises(CheckpointError, match="the order of one GPU"), said_of(False, "8 bits"):
        quantport.load(made.write(tmp_path), device="cpu")


def test_other_values_of_codes_are_refused_when_they_are_read(tmp_path):
    made = four_bits()
    made.tensors |= {n: torch.zeros(16) for n in made.tensors if n.endswith(".quant_map")}
    with pytest.raises(CheckpointError, match="other values than nf4 has"):
        quantport.load(made.write(tmp_path), device="cpu")


def state_with(made: Made, name: str, **changes: Any) -> Tensor:
    state = next(n for n in made.tensors if n.startswith(name) and STATE in n)
    said = json.loads(bytes(made.tensors[state].tolist()))
    text = json.dumps({**said, **changes}).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


DAMAGE: dict[str, Callable[[Made, str], dict[str, Tensor | None]]] = {
    "no scales": lambda made, name: {f"{name}.absmax": None},
    "no codes": lambda made, name: {name: None},
    "no map": lambda made, name: {f"{name}.quant_map": None},
    "no nested scales": lambda made, name: {f"{name}.nested_absmax": None},
    "codes of another shape": lambda made, name: {name: made.tensors[name].view(-1)},
    "codes of another dtype": lambda made, name: {name: made.tensors[name].view(torch.int8)},
    "no JSON": lambda made, name: {f"{name}.{STATE}nf4": torch.zeros(9, dtype=torch.uint8)},
    "another shape": lambda made, name: {f"{name}.{STATE}nf4": state_with(made, name, shape=[8, 8])},
    "no shape": lambda made, name: {f"{name}.{STATE}nf4": state_with(made, name, shape=None)},
    "no size": lambda made, name: {f"{name}.{STATE}nf4": state_with(made, name, blocksize=0)},
    "another type": lambda made, name: {f"{name}.{STATE}nf4": state_with(made, name, quant_type="fp4")},
    "no offset": lambda made, name: {f"{name}.{STATE}nf4": state_with(made, name, nested_offset="0")},
    "a format from the future": lambda made, name: {f"{name}.{STATE}nf3": state_with(made, name)},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(damage, tmp_path):
    made = four_bits(nested=True)
    name = next(n for n in made.tensors if n.endswith("q_proj.weight"))
    for key, tensor in DAMAGE[damage](made, name).items():
        made.tensors.pop(key, None)
        if tensor is not None:
            made.tensors[key] = tensor
    refused(made, tmp_path)


@pytest.mark.parametrize("part", ["SCB", "weight"])
def test_damaged_rows_are_refused(part, tmp_path):
    made = eight_bits()
    name = next(n for n in made.tensors if n.endswith(f"q_proj.{part}"))
    made.tensors[name] = torch.ones(3, 3)
    refused(made, tmp_path)


def refused(made: Made, folder: Path) -> None:
    made.write(folder)
    for call in (quantport.plan, quantport.load):
        with pytest.raises(CheckpointError) as caught:
            call(folder, device="cpu")
        assert "bitsandbytes" in caught.value.asked


@settings(max_examples=200, deadline=None)
@given(
    changes=st.dictionaries(
        st.sampled_from(["shape", "blocksize", "quant_type", "nested_offset", "nested_blocksize"]),
        junk | st.lists(st.integers(-2, 2**40), min_size=2, max_size=2),
    )
)
def test_any_state_is_read_or_refused(changes, tmp_path_factory):
    made = four_bits_once()
    name = next(n for n in made.tensors if n.endswith("q_proj.weight"))
    few = {key: tensor for key, tensor in made.tensors.items() if key.startswith(name)}
    few[f"{name}.{STATE}nf4"] = state_with(made, name, **changes)
    folder = Made({}, few, {}).write(tmp_path_factory.mktemp("state"))
    with contextlib.closing(Checkpoint.open(folder)) as source, contextlib.suppress(CheckpointError):
        found = Bitsandbytes().recognize(source, made.config, BUILTIN)
        assert found is not None
        assert found.layers()


ONCE: list[Made] = []


def four_bits_once() -> Made:
    if not ONCE:
        ONCE.append(four_bits(nested=True))
    return ONCE[0]
