"""GPTQ and AWQ as they are written, loaded by Transformers with GPTQModel, in the environment of
``ci/loaders``; in the nightly run.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from core_models import DENSE, same_bits
from format_checks import held
from safetensors.torch import load_file

import quantport

GPTQMODEL = Path(__file__).parents[3] / ".venv-gptqmodel" / "bin" / "python"


@pytest.mark.skipif(not GPTQMODEL.exists(), reason=f"no {GPTQMODEL}: ci/loaders makes it")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("gptq", "int4_weight_only:g64:fp16"),
        ("gptq", "int8_weight_only:g64:fp16"),
        ("awq", "int4_weight_only:g64:fp16"),
    ],
)
def test_layers_multiply_by_the_same_values(name, scheme, tmp_path):
    model = quantport.load(DENSE, scheme, device="cpu")
    quantport.save(model, tmp_path / "model", format=name)
    script, out = Path(__file__).with_name("of_gptqmodel.py"), tmp_path / "out.safetensors"
    done = subprocess.run(
        [GPTQMODEL, script, out, tmp_path / "model"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = load_file(out)
    values = {stem.removesuffix(".weight"): of for stem, (_, of) in held(model).items()}
    assert found.keys() == values.keys()
    for stem, of in values.items():
        assert same_bits(found[stem], of.half()), stem
