"""What every format of others must do: keep the bits, say so in the plan, convert, overlay, refuse damage.

A format's test makes the stored tensors of one model, with the format's own library where that runs here, and
says which values they stand for, decoded by that library or by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from core_models import ids, same_bits
from safetensors.torch import save_file
from torch import Tensor

import quantport
from quantport import numerics
from quantport.errors import CheckpointError
from quantport.modules import QuantExperts, QuantModule

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 1}


def tiny(kind: str = "llama", **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and the BF16 tensors of a small model, as files have them: experts alone."""
    config = {"llama": transformers.LlamaConfig, "qwen3_moe": transformers.Qwen3MoeConfig}[kind](
        **{**SIZES, **(EXPERTS if kind == "qwen3_moe" else {}), **changes}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tensors = {}
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                tensors |= {
                    f"{path}.{e}.gate_proj.weight": gate.clone(),
                    f"{path}.{e}.up_proj.weight": up.clone(),
                }
        elif leaf == "down_proj":
            tensors |= {f"{path}.{e}.down_proj.weight": w.clone() for e, w in enumerate(tensor)}
        else:
            tensors[name] = tensor
    described = json.loads(config.to_json_string())
    described |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    return described, tensors


def quantizable(tensors: Mapping[str, Tensor]) -> list[str]:
    """The weights that quantizers take: those of linear layers, without routers and the head."""
    return [name for name, tensor in tensors.items() if tensor.dim() == 2 and name.endswith("proj.weight")]


@dataclass
class Made:
    """A checkpoint of a format.

    Attributes:
        config: ``config.json`` with ``quantization_config``.
        tensors: What is stored.
        values: What each weight that is stored as codes stands for, fp32 ``[n, k]``, by its name in 16-bit
            checkpoints.
        schemes: The scheme that each of them is kept in, where it is not the same for all.
        scheme: The scheme that they are kept in.
        inputs: The scale and the zero point of the inputs of each of them that has one stored.
        files: Further files.
        metadata: ``__metadata__`` of the file.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    values: dict[str, Tensor]
    scheme: str = ""
    schemes: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, tuple[float, int]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Writes it as a folder of safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        contiguous = {k: v.contiguous() for k, v in self.tensors.items()}
        save_file(contiguous, folder / "model.safetensors", self.metadata or None)
        (folder / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return folder


def held(model: torch.nn.Module) -> dict[str, tuple[str, Tensor]]:
    """For each quantized weight of a model its scheme, and its values as they are held: fp32 ``[n, k]``."""
    out = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantModule):
            for name, spec in module.specs.items():
                values = numerics.dequantize_weight(module.stored_weight(name), spec.scheme, spec.k)
                out[".".join(filter(None, (path, name, "weight")))] = (spec.scheme.name, values)
    return out


def of_inputs(model: torch.nn.Module) -> dict[str, tuple[float, int]]:
    """For each quantized weight with a stored scale of activations that, and their zero point."""
    out = {}
    for path, module in model.named_modules():
        for name in module.specs if isinstance(module, QuantModule) else ():
            stored = module.stored_weight(name)
            if "input_scale" in stored:
                zero = int(stored.get("input_zero_point", torch.zeros(1)))
                out[".".join(filter(None, (path, name, "weight")))] = stored["input_scale"].item(), zero
    return out


def keeps(made: Made, folder: Path) -> torch.nn.Module:
    """Loads it as it is, and checks that each value is the format's own, to the last bit of fp32."""
    made.write(folder)
    planned = quantport.plan(folder, device="cpu")
    model = quantport.load(folder, device="cpu")
    found = held(model)
    assert set(found) == set(made.values)
    for name, (scheme, values) in found.items():
        assert scheme == made.schemes.get(name, made.scheme), name
        assert same_bits(values, made.values[name]), name
    assert of_inputs(model) == made.inputs
    for plan in (planned, model.quantport_plan):
        assert all(step.stored for step in plan.quantized)
        assert {s.layer.name for s in plan.quantized} == {s.layer.name for s in planned.quantized}
    with torch.no_grad():
        assert torch.isfinite(model(ids % SIZES["vocab_size"]).logits).all()
    return model


def converts(made: Made, folder: Path, scheme: str = "int8") -> None:
    """Loads it into another scheme, and checks that each weight is what that scheme makes of the values."""
    made.write(folder)
    model = quantport.load(folder, scheme, device="cpu")
    target = quantport.plan(folder, scheme, device="cpu")
    for step in target.quantized:
        if not step.stored and any(name.startswith(f"{step.layer.home}.") for name in made.values):
            assert step.note.startswith("from "), step.layer.name
    is_made_of(made, model, scheme)


def is_made_of(made: Made, model: torch.nn.Module, scheme: str) -> None:
    """Checks that each weight of a model is what a scheme makes of the values of a checkpoint."""
    for name, (found, values) in held(model).items():
        if name in made.values:
            assert found == scheme
            spec = quantport.scheme.catalog.BUILTIN[scheme]
            stored = numerics.quantize_weight(made.values[name], spec)
            assert same_bits(values, numerics.dequantize_weight(stored, spec, values.shape[1])), name


def overlays(made: Made, folder: Path, rest: str) -> None:
    """Quantizes only what the checkpoint left in 16 bits: a layer that ``rest`` matches."""
    made.write(folder)
    model = quantport.load(folder, config={"targets": {rest: "fp8_per_channel"}}, device="cpu")
    new = [s for s in model.quantport_plan.quantized if not s.stored]
    assert new
    assert {s.requested_scheme for s in new} == {"fp8_per_channel"}
    for name, (scheme, values) in held(model).items():
        if name in made.values:
            assert scheme == made.schemes.get(name, made.scheme)
            assert same_bits(values, made.values[name])


def contradicts(made: Made, folder: Path, changes: Mapping[str, Tensor | None], found: str) -> None:
    """Changes or takes away stored tensors of one layer, and checks that the checkpoint is refused for that.

    Args:
        made: The checkpoint.
        folder: Where to.
        changes: By what follows the path of the layer; None: taken away.
        found: What the error has found.
    """
    for key, tensor in changes.items():
        name = f"model.layers.0.mlp.up_proj{key}"
        made.tensors.pop(name, None)
        made.tensors |= {} if tensor is None else {name: tensor}
    made.write(folder)
    for call in (quantport.plan, quantport.load):
        with pytest.raises(CheckpointError) as caught:
            call(folder, device="cpu")
        assert found in caught.value.found


def experts_of(model: torch.nn.Module) -> list[QuantExperts]:
    """The experts of a model that are quantized."""
    return [m for m in model.modules() if isinstance(m, QuantExperts)]
