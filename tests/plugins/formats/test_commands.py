"""The command line on one checkpoint of each format: inspect, plan, run and compare, quantize."""

from __future__ import annotations

import json
import string

import pytest
import test_auto_round
import test_awq
import test_bitsandbytes
import test_compressed_tensors
import test_fp8
import test_gpt_oss
import test_gptq
import test_hqq
import test_modelopt
import test_msmodelslim
import test_mxfp8
import test_quanto
import test_quark
import test_torchao
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import quantport_formats
from quantport.cli import app

MADE = {
    "compressed-tensors": test_compressed_tensors.mixture,
    "fp8": lambda: test_fp8.quantized("llama", "block"),
    "modelopt": lambda: test_modelopt.made("FP8"),
    "mxfp8": test_mxfp8.quantized,
    "quark": lambda: test_quark.made("int8"),
    "gptq": lambda: test_gptq.stored(4, 32, symmetric=False),
    "awq": lambda: test_awq.stored("gemm", 32),
    "auto-round": lambda: test_auto_round.stored("auto_round:auto_gptq"),
    "bitsandbytes": test_bitsandbytes.four_bits,
    "torchao": lambda: test_torchao.stored("int4 zeros"),
    "mxfp4": lambda: test_gpt_oss.made()[0],
    "hqq": test_hqq.stored,
    "quanto": test_quanto.stored,
    "msmodelslim": test_msmodelslim.stored,
}
# `test_gguf_real.py` runs a GGUF file, which has its tokenizer inside; `test_not_read.py` has what is
# refused, `test_pytorch.py` files that other formats recognize
ELSEWHERE = ("gguf", "not-read", "pytorch")


def ask(*words):
    """What a command prints as JSON."""
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(params=MADE)
def folder(request, tmp_path):
    """A checkpoint with a tokenizer of letters."""
    out = MADE[request.param]().write(tmp_path / "model")
    letters = {letter: i for i, letter in enumerate(["?", *string.ascii_letters, " ", ".", ","])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(out)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    return request.param, out, tmp_path


@pytest.mark.filterwarnings("ignore::UserWarning")  # what is named is tested where the format is
def test_every_command(folder):
    name, model, room = folder
    found = ask("inspect", model, "--device", "cpu")
    assert found["format"] == name
    kept = ask("plan", model, "--device", "cpu")
    assert kept["bytes_before"] == found["bytes"]
    converted = ask("plan", model, "--device", "cpu", "--scheme", "int8_weight_only")
    assert any(layer["asked"] == "int8_weight_only" for layer in converted["layers"])
    text = ("--text", room / "text.txt", "--windows", 1, "--prompt", "the lazy", "--tokens", 2)
    done = ask("run", model, "--device", "cpu", "--compare", *text)
    assert abs(done["compare"]["kl"]) < 0.01
    to = "quantport" if name == "mxfp4" else "compressed-tensors"  # which has no experts as GPT-OSS has them
    written = ask(
        *("quantize", model, room / "out", "--device", "cpu", "--scheme", "int8_weight_only"),
        *("--format", to),
    )
    again = ask("inspect", room / "out", "--device", "cpu")
    assert again["format"] == to
    assert written["bytes_written"] > again["bytes"]


def test_no_format_is_left_out():
    names = {known.name for known in quantport_formats.quantport_checkpoint_formats()}
    assert names == {*MADE, *ELSEWHERE}
