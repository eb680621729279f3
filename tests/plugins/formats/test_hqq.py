"""HQQ checkpoints, packed by hand; that the layouts are its own is checked with weights that hqq 0.2.8
quantized, packed and dequantized in fp32 (``Quantizer.quantize``, ``dequantize``): ``data/hqq.safetensors``.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from core_models import same_bits
from format_checks import Made, contradicts, converts, keeps, overlays, quantizable, tiny
from safetensors.torch import load_file, save_file

from quantport.checkpoint import Checkpoint
from quantport.scheme.catalog import BUILTIN
from quantport_formats.hqq import Hqq

CHECKED_BY = "hqq 0.2.8"
pytestmark = pytest.mark.filterwarnings("ignore:.*two roundings:UserWarning")
PACKED = Path(__file__).parent / "data" / "hqq.safetensors"
WHOLE = ("8.1", "8.0", "4.0", "3.0", "2.0", "1.0")  # integer zero points, or decoded: exact


def said(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def stored(group: int = 32, kind: str = "llama") -> Made:
    """4 bits, groups of inputs, integer zero points."""
    config, tensors = tiny(kind)
    values = {}
    for name in quantizable(tensors):
        weight, stem = tensors.pop(name).float(), name.removesuffix(".weight")
        grouped = weight.view(-1, group)
        low, high = grouped.amin(1, True), grouped.amax(1, True)
        scale = ((high - low) / 15).half()
        zero = (-low / scale.float()).round().half()
        codes = (grouped / scale.float() + zero).round().clamp(0, 15)
        half = len(codes) // 2
        parts = {
            "W_q": codes[:half].byte() << 4 | codes[half:].byte(),
            **{"scale": scale, "zero": zero, "shape": torch.tensor(weight.shape)},
            **{"nbits": torch.tensor(4), "axis": torch.tensor(1), "group_size": torch.tensor(group)},
            **{"packing": said("4bit_u8"), "quant_scale": torch.zeros((), dtype=torch.uint8)},
            **{"quant_zero": torch.zeros((), dtype=torch.uint8), "compute_dtype": said("torch.float16")},
        }
        tensors |= {f"{stem}.{key}": part for key, part in parts.items()}
        values[name] = ((codes - zero) * scale.float()).view(weight.shape)
    quantizer = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}
    made = Made({**config, "quantization_config": quantizer}, tensors, values)
    made.scheme = f"int4_weight_only:g{group}:fp32:asym"
    return made


@pytest.mark.parametrize("group", [32, 64])
def test_it_is_kept_to_the_bit(group, tmp_path):
    keeps(stored(group), tmp_path)


def test_experts(tmp_path):
    keeps(stored(kind="qwen3_moe"), tmp_path)


def test_it_becomes_another_scheme(tmp_path):
    converts(stored(), tmp_path)


def test_what_was_left_is_quantized(tmp_path):
    overlays(stored(), tmp_path, "lm_head")


def layer(key, folder):
    """What a layer that hqq packed is read as, and its values by hqq."""
    parts = {name.removeprefix(f"{key}."): t for name, t in load_file(PACKED).items() if name.startswith(key)}
    parts = {name: tensor for name, tensor in parts.items() if "." not in name}
    value = parts.pop("value")
    save_file({f"x_proj.{name}": tensor for name, tensor in parts.items()}, folder / "model.safetensors")
    source = Checkpoint.open(folder)
    return source, Hqq().recognize(source, {}, BUILTIN), value


@pytest.mark.parametrize(
    "key", ["8.1", "8.0", "4.1", "4.1.float", "4.0", "3.1", "3.0", "2.1", "2.0", "1.1", "1.0"]
)
def test_a_layer_that_hqq_packed(key, tmp_path):
    source, found, value = layer(key, tmp_path)
    with contextlib.closing(source):
        read = found.source.read("x_proj.weight")
        some = found.source.read("x_proj.weight", slice(3, 8))
        assert same_bits(some, read[3:8])
        assert set(found.source.tensors) == {"x_proj.weight"}
        assert bool(found.quantized()) == key.startswith(("8.1", "4.1", "3.1", "2.1", "1.1"))
        if key in WHOLE:
            assert same_bits(read, value)
        else:  # two roundings, of numbers up to twice the largest value of the grid
            assert (read - value).abs().max() <= value.abs().max() * 2 * 2**-23
            assert not same_bits(read, value.half().float())


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"scale": torch.ones(5, 1), "zero": torch.ones(5, 1)}, "5 scales"),
        ({"zero": torch.ones(5, 1)}, "shape"),
        ({"W_q": torch.zeros(3, 32, dtype=torch.uint8)}, "codes of shape"),
        ({"shape": torch.tensor([3])}, "shape"),
        ({"nbits": torch.tensor(8)}, "8 bits"),
        ({"axis": torch.tensor(2)}, "axis 2"),
        ({"packing": said("5bit")}, "packing"),
        ({"quant_zero": torch.ones((), dtype=torch.uint8)}, "quantized too"),
        ({"scale": None}, "no such tensor"),
        ({"nbits": None}, "no such tensor"),
    ],
    ids=["scales", "zeros", "codes", "vector", "bits", "axis", "packing", "nested", "no scale", "no bits"],
)
def test_a_contradiction_is_refused(change, found, tmp_path):
    contradicts(stored(), tmp_path, {f".{key}": tensor for key, tensor in change.items()}, found)
