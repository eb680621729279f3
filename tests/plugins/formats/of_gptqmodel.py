"""Runs in the environment of GPTQModel: loads a checkpoint with Transformers, and writes the weights that its
layers multiply by.

    python of_gptqmodel.py OUT.safetensors CHECKPOINT
"""

from __future__ import annotations

import sys


def main(out: str, checkpoint: str) -> None:
    """Writes ``[n, k]`` in FP16 for each layer: what it makes of the columns of the unit matrix."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16, device_map="cpu")
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "qweight"):
            with torch.no_grad():
                found[name] = layer(torch.eye(layer.in_features, dtype=torch.float16)).t().contiguous()
    save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
