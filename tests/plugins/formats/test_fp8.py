"""FP8 checkpoints as DeepSeek, Qwen and Transformers have them."""

from __future__ import annotations

import pytest
import torch
from format_checks import Made, converts, keeps, overlays, quantizable, tiny

import quantport
from quantport.errors import CheckpointError

CHECKED_BY = "by hand"


def quantized(
    kind: str,
    scales: str,
    static: str = "",
    dtype: torch.dtype = torch.float32,
    size: int = 128,
    **changes: int,
) -> Made:
    """By hand: ``value = code * scale`` in fp32; ``static`` names the scales of activations, ``size`` is that
    of experts.
    """
    config, tensors = tiny(
        kind, **changes, **({"moe_intermediate_size": size} if kind == "qwen3_moe" else {})
    )
    method = {"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic"}
    if scales == "block":
        method["weight_block_size"] = [128, 128]
    values, inputs = {}, {}
    for name in quantizable(tensors):
        w, stem = tensors[name].float(), name.removesuffix(".weight")
        n, k = w.shape
        rows, columns = {"block": (128, 128), "row": (1, k), "tensor": (n, k)}[scales]
        down, across = -(-n // rows), -(-k // columns)
        padded = torch.nn.functional.pad(w, (0, across * columns - k, 0, down * rows - n))
        blocks = padded.view(down, rows, across, columns)
        scale = (blocks.abs().amax((1, 3)) / 448).to(dtype)
        if dtype is torch.uint8:
            exponent = torch.ceil(torch.log2(blocks.abs().amax((1, 3)) / 448)) + 127
            scale, used = exponent.to(torch.uint8), torch.exp2(exponent - 127)
        else:
            used = scale.float()
        spread = used.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:n, :k]
        tensors[name] = (w / spread).to(torch.float8_e4m3fn)
        values[name] = tensors[name].float() * spread
        if scales == "block":
            tensors[f"{stem}.weight_scale_inv"] = scale
        else:
            tensors[f"{stem}.weight_scale"] = scale if scales == "row" else scale.view(())
        if static:
            tensors[f"{stem}.{static}"] = torch.tensor(0.1 + 0.01 * len(values))
            inputs[name] = tensors[f"{stem}.{static}"].item(), 0
    scheme = {"block": "fp8_per_block", "row": "fp8_per_channel", "tensor": "fp8_per_tensor"}[scales]
    return Made(
        {**config, "quantization_config": method},
        tensors,
        values,
        scheme + ":static" * bool(static),
        inputs=inputs,
    )


CASES = {
    "blocks": ("llama", "block"),
    "experts": ("qwen3_moe", "block"),
    "rows": ("llama", "row"),
    "tensor": ("llama", "tensor"),
    "experts per tensor": ("qwen3_moe", "tensor"),
    "bf16 scales": ("llama", "block", "", torch.bfloat16),
    "exponents": ("llama", "block", "", torch.uint8),
    "static": ("llama", "tensor", "input_scale"),
    "static in blocks": ("llama", "block", "activation_scale"),
    "static of experts": ("qwen3_moe", "tensor", "input_scale"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_kept_to_the_bit(case, tmp_path):
    keeps(quantized(*case), tmp_path)


@pytest.mark.parametrize("case", [CASES["blocks"], CASES["experts"], CASES["tensor"]])
def test_it_becomes_another_scheme(case, tmp_path):
    converts(quantized(*case), tmp_path)


def test_what_was_left_is_quantized(tmp_path):
    overlays(quantized("llama", "block"), tmp_path, "lm_head")


def test_scales_of_activations_that_nobody_asked_for_are_named(tmp_path):
    made = quantized("llama", "tensor", "input_scale")
    made.config["quantization_config"]["activation_scheme"] = "dynamic"
    with pytest.warns(UserWarning, match=r"7 static scales of activations .* are not used"):
        model = quantport.load(made.write(tmp_path), device="cpu")
    assert {step.scheme for step in model.quantport_plan.quantized} == {"fp8_per_tensor"}


def test_one_scale_under_the_names_of_transformers(tmp_path):
    """``weight_scale_inv`` without dimensions, as of Ministral 3."""
    made = quantized("llama", "tensor", "activation_scale")
    for name in made.values:
        made.tensors[f"{name}_scale_inv"] = made.tensors.pop(f"{name}_scale")
    keeps(made, tmp_path)


def stacked_per_tensor(made):
    """The experts of a checkpoint as Transformers saves them: stacks, and a scale for each expert."""
    path, experts = "model.layers.0.mlp.experts", range(4)
    for of in ("gate", "up", "down"):
        for e in experts:  # gate and up of an expert have one scale
            stem = f"{path}.{e}.{'gate' if of == 'up' else of}_proj"
            made.values[f"{path}.{e}.{of}_proj.weight"] = (
                made.tensors[f"{path}.{e}.{of}_proj.weight"].float() * made.tensors[f"{stem}.weight_scale"]
            )
            made.inputs[f"{path}.{e}.{of}_proj.weight"] = made.tensors[f"{stem}.input_scale"].item(), 0

    def stack(of, end):
        return torch.stack([made.tensors[f"{path}.{e}.{of}_proj.{end}"] for e in experts])

    both = torch.cat([stack("gate", "weight"), stack("up", "weight")], 1)
    stacked = {f"{path}.gate_up_proj": both, f"{path}.down_proj": stack("down", "weight")}
    for of, name in (("gate", "gate_up"), ("down", "down")):
        stacked[f"{path}.{name}_proj_scale_inv"] = stack(of, "weight_scale").view(4, 1, 1)
        stacked[f"{path}.{name}_proj_activation_scale"] = stack(of, "input_scale")
    made.tensors = {n: t for n, t in made.tensors.items() if ".experts." not in n} | stacked


def test_stacked_experts_with_a_scale_each(tmp_path):
    made = quantized("qwen3_moe", "tensor", "input_scale")
    stacked_per_tensor(made)
    keeps(made, tmp_path)


@pytest.mark.parametrize("size", [128, 192])
def test_stacked_experts(size, tmp_path):
    """Kept where gate and up begin blocks; of 192 rows they share some, and are decoded."""
    made = quantized("qwen3_moe", "block", size=size)
    path = "model.layers.0.mlp.experts"
    stacked = {}
    for end in ("weight", "weight_scale_inv"):
        new = end.removeprefix("weight")
        parts = {
            p: [made.tensors.pop(f"{path}.{e}.{p}_proj.{end}") for e in range(4)]
            for p in ("gate", "up", "down")
        }
        both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        stacked[f"{path}.gate_up_proj{new}"] = torch.stack(both)
        stacked[f"{path}.down_proj{new}"] = torch.stack(parts["down"])
    if size == 192:
        scales = stacked[f"{path}.gate_up_proj_scale_inv"]
        stacked[f"{path}.gate_up_proj_scale_inv"] = scales[:, :3].contiguous()  # 384 rows are three blocks
        made.values = {name: value for name, value in made.values.items() if ".experts." not in name}
    made.tensors |= stacked
    keeps(made, tmp_path)


def test_scales_of_activations_that_are_powers_of_two_are_named(tmp_path):
    made = quantized("llama", "block")
    made.config["quantization_config"]["scale_fmt"] = "ue8m0"
    with pytest.warns(UserWarning, match="not powers of two as scale_fmt ue8m0 asks for"):
        quantport.load(made.write(tmp_path), device="cpu")


@pytest.mark.parametrize("damage", ["absent", "shape", "block"])
def test_what_is_wrong_is_refused(damage, tmp_path):
    made = quantized("llama", "block")
    name = next(n for n in made.tensors if n.endswith("_scale_inv"))
    if damage == "absent":
        del made.tensors[name]
    elif damage == "shape":
        made.tensors[name] = torch.ones(3, 3)
    else:
        made.config["quantization_config"]["weight_block_size"] = [64, 64]
    for call in (quantport.plan, quantport.load):
        with pytest.raises(CheckpointError) as caught:
            call(made.write(tmp_path), device="cpu")
        assert "as fp8" in caught.value.asked
