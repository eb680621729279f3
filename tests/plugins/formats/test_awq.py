"""AWQ checkpoints, made by hand; that the layouts are AutoAWQ's is checked with layers that AutoAWQ 0.2.9
packed (``WQLinear_GEMM.from_linear``, ``WQLinear_GEMV.from_linear``) and dequantized (``dequantize_gemm``,
which gives the values of either): ``data/awq.safetensors``.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from core_models import same_bits
from format_checks import Made, converts, keeps, overlays, quantizable, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import junk
from packed_words import quantized, words
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantport
from quantport.checkpoint import Checkpoint
from quantport.errors import CheckpointError
from quantport.numerics.packing import unpack_int4
from quantport.scheme.catalog import BUILTIN
from quantport_formats.awq import Awq

CHECKED_BY = "AutoAWQ 0.2.9"

PACKED = Path(__file__).parent / "data" / "awq.safetensors"
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def interleaved(codes: Tensor) -> Tensor:
    """``[rows, n]`` to int32 ``[rows, n / 8]``."""
    mixed = codes.view(codes.shape[0], -1, 8)[:, :, ORDER].flatten(1)
    return words(mixed.t(), 4).t()


def widened(tensor: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, count - tensor.shape[1]))


def stored(version: str, group: int, kind: str = "llama", dtype: torch.dtype = torch.float16) -> Made:
    config, tensors = tiny(kind)
    values, schemes = {}, {}
    for name in quantizable(tensors):
        weight, stem = tensors.pop(name), name.removesuffix(".weight")
        codes, zeros, scales, of, value = quantized(weight, 4, group, symmetric=False)
        if dtype is not torch.float16:
            scales = scales.to(dtype)
            value = (codes - zeros[:, of]).float() * scales.float()[:, of]
        if version == "gemm":
            parts = (interleaved(codes.t()), interleaved(zeros.t()), scales.t())
        else:
            count = -(-scales.shape[1] // 8) * 8
            parts = (words(codes.t(), 4).t(), words(widened(zeros, count).t(), 4).t(), widened(scales, count))
        tensors |= {
            f"{stem}.{key}": part for key, part in zip(("qweight", "qzeros", "scales"), parts, strict=True)
        }
        values[name] = value
        block = "channel" if group in (-1, weight.shape[1]) else f"g{group}"
        schemes[name] = f"int4_weight_only:{block}:fp32:asym"
        if dtype is torch.float32:
            schemes[name] = f"int8_weight_only:{block}:fp32"
    said = {"quant_method": "awq", "bits": 4, "group_size": group, "version": version, "zero_point": True}
    return Made({**config, "quantization_config": said}, tensors, values, schemes=schemes)


@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_it_is_kept_to_the_bit(version, group, tmp_path):
    keeps(stored(version, group), tmp_path)


def test_experts(tmp_path):
    keeps(stored("gemm", 64, "qwen3_moe"), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scales_of_other_dtypes(dtype, tmp_path):
    keeps(stored("gemm", 64, dtype=dtype), tmp_path)


def test_it_becomes_another_scheme(tmp_path):
    converts(stored("gemm", 64), tmp_path)


def test_what_was_left_is_quantized(tmp_path):
    overlays(stored("gemm", 64), tmp_path, "lm_head")


def test_the_configuration_in_a_file_of_its_own(tmp_path):
    made = stored("gemm", 64)
    del made.config["quantization_config"]
    said = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    made.files["quant_config.json"] = json.dumps(said)
    keeps(made, tmp_path)


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_a_layer_that_autoawq_packed(version, tmp_path):
    every = load_file(PACKED)
    parts = {f"x_proj.{key}": every[f"{version}.{key}"] for key in ("qweight", "qzeros", "scales")}
    save_file(parts, tmp_path / "model.safetensors")
    said = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": version}
    with contextlib.closing(Checkpoint.open(tmp_path)) as source:
        found = Awq().recognize(source, {"quantization_config": said}, BUILTIN)
        assert found is not None
        assert same_bits(found.source.read("x_proj.weight"), every["gemm.values"])
        for rows in (slice(3, 10), slice(8, 16), slice(0, 1), slice(31, 32)):
            assert same_bits(found.source.read("x_proj.weight", rows), every["gemm.values"][rows])


DAMAGE: dict[str, dict[str, Any]] = {
    "no scales": {"scales": None},
    "no zeros": {"qzeros": None},
    "no codes": {"qweight": None},
    "fewer zeros": {"qzeros": torch.zeros(2, 3, dtype=torch.int32)},
    "scales that are integers": {"scales": torch.ones(2, 128, dtype=torch.int32)},
    "groups of no size": {"scales": torch.ones(3, 128), "qzeros": torch.zeros(3, 16, dtype=torch.int32)},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors_are_refused(damage, tmp_path):
    made = stored("gemm", 64)
    stem = next(n for n in made.tensors if n.endswith("q_proj.qweight")).removesuffix("qweight")
    for part, tensor in DAMAGE[damage].items():
        del made.tensors[stem + part]
        if tensor is not None:
            made.tensors[stem + part] = tensor
    refused(made, tmp_path)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("gemm", {"bits": 8}),
        ("gemm", {"version": "gemv_fast"}),
        ("gemm", {"version": ["gemm"]}),
        ("gemm", {"version": "gemv"}),
        ("gemv", {"group_size": 24}),
        ("gemv", {"version": "gemm"}),
    ],
    ids=str,
)
def test_contradictions_are_refused(version, said, tmp_path):
    made = stored(version, 32)
    made.config["quantization_config"] |= said
    refused(made, tmp_path)


def refused(made: Made, folder: Path) -> None:
    made.write(folder)
    for call in (quantport.plan, quantport.load):
        with pytest.raises(CheckpointError) as caught:
            call(folder, device="cpu")
        assert "awq" in caught.value.asked


keys = st.sampled_from(["bits", "w_bit", "group_size", "q_group_size", "zero_point", "version"])


@settings(max_examples=200, deadline=None)
@given(changes=st.dictionaries(keys, junk, max_size=3), version=st.sampled_from(["gemm", "gemv"]))
def test_any_configuration_is_read_or_refused(changes, version, both):
    said = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": version, **changes}
    with contextlib.suppress(CheckpointError):
        found = Awq().recognize(both[version], {"quantization_config": said}, BUILTIN)
        assert found is not None
        assert found.layers()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        folders = {v: stored(v, 64).write(tmp_path_factory.mktemp(v)) for v in ("gemm", "gemv")}
        yield {v: stack.enter_context(contextlib.closing(Checkpoint.open(f))) for v, f in folders.items()}


@pytest.mark.parametrize("rows", [8, 16, 24, 20])  # 20 ends inside of words
@pytest.mark.parametrize("k", [64, 60])
def test_rows_are_those_of_the_whole(rows, k):
    torch.manual_seed(k)
    codes = torch.randint(0, 16, (k, 64), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (k // 4, 64), dtype=torch.uint8)
    tensors = {
        "a.qweight": interleaved(codes),
        "a.qzeros": interleaved(zeros),
        "a.scales": torch.rand(k // 4, 64).half(),
    }
    source = Counting(tensors)
    said = {"quant_method": "awq", "bits": 4, "group_size": 4, "version": "gemm"}
    found = Awq().recognize(source, {"quantization_config": said}, BUILTIN)
    (weight,) = found.quantized()["a"].values()
    whole = weight.read(slice(0, 64))
    assert torch.equal(unpack_int4(whole["weight_packed"], k), codes.t().to(torch.int8) - 8)
    source.reads.clear()
    pieces = [weight.read(slice(start, min(start + rows, 64))) for start in range(0, 64, rows)]
    for key, tensor in whole.items():
        assert torch.equal(torch.cat([piece[key] for piece in pieces]), tensor)
    count = 1 if rows % 8 == 0 else 2  # nothing is kept once the last word was asked for
    assert source.reads.count("a.qweight") == count
    assert weight.read(slice(0, 64))["weight_packed"].equal(whole["weight_packed"])
    assert source.reads.count("a.qweight") == count + 1


class Counting:
    """Tensors in memory; notes which are read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.directory, self.reads = tensors, Path("nowhere"), list[str]()

    def read(self, name: str, rows: Any = None) -> Tensor:
        self.reads.append(name)
        return self.tensors[name] if rows is None else self.tensors[name][rows]
