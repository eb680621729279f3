"""Three quantized checkpoints, of three libraries, each kept as it is, converted, and added to.

Run it from the root of the repository: ``python examples/checkpoints/keep_convert_add.py DIRECTORY``. It
needs ``pip install 'quantport[transformers]' bitsandbytes torchao``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import quantport

HEAD = dict.fromkeys(("lm_head", "model.embed_tokens"), "int8_weight_only")  # one weight under two names
MODEL = Path(__file__).parents[1] / "models" / "tiny-llama"


def with_transformers(config: object, directory: Path) -> Path:
    """Quantizes with a library behind Transformers, and saves as Transformers does."""
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(directory)
    return directory


def with_quantport(scheme: str, directory: Path) -> Path:
    """Quantizes here, and saves so that Transformers loads it."""
    return quantport.save(quantport.load(MODEL, scheme), directory, format="compressed-tensors")


def main(room: Path) -> None:
    """Makes the checkpoints and loads each in three ways."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    made = (
        with_transformers(nf4, room / "bitsandbytes"),
        with_transformers(TorchAoConfig(Int8WeightOnlyConfig(version=2)), room / "torchao"),
        with_quantport("int4_weight_only:g64", room / "compressed-tensors"),
    )
    for directory in made:
        kept = quantport.load(directory)  # its bits, as they are
        converted = quantport.load(directory, "fp8_weight_only")  # decoded once, quantized once
        more = quantport.load(directory, config={"targets": HEAD})
        for what, model in (("kept", kept), ("converted", converted), ("added to", more)):
            plan = model.quantport_plan
            schemes = sorted({step.scheme for step in plan.quantized})
            print(f"{plan.format_name}, {what}: {', '.join(schemes)}, {plan.after / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
