"""The commands that do something: run, quantize and bench."""

from __future__ import annotations

import json
import math
import platform
import shutil
from pathlib import Path

import pytest
import torch
from core_models import DENSE, MOE, same_state
from test_cli import ask, parts
from torch import nn

import quantport
from quantport.cli import baseline, bench_linear, compare
from quantport.device import Device

TEXT = DENSE.parent / "eval.txt"
QUICK = ("--tokens", "4", "--windows", "2")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A checkpoint of Transformers that takes no time: random, 64 positions, with the tokenizer of the
    example.
    """
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=2048,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DENSE / name, folder)
    return folder


def test_run_prints_text_then_plan_then_comparison(small):
    result = ask(
        "run", small, "--scheme", "int8", "--prompt", "The following", "--compare", "--text", TEXT, *QUICK
    )
    places = [
        result.stdout.index(text) for text in ("The following", "W8A", "total: ", "perplexity", "tokens/s  ")
    ]
    assert places == sorted(places)


def test_run_as_json(small):
    data = json.loads(
        ask("run", small, "--scheme", "int4", "--compare", "--text", TEXT, *QUICK, "--json").stdout
    )
    compare = data["compare"]
    assert data["tokens_per_second"] > 0
    assert compare["window"] == 64, "no window is longer than the model's positions"
    assert compare["tokens_scored"] == 2 * 63
    assert compare["bytes"] < compare["bytes_bf16"]
    assert compare["perplexity"] > 1
    assert compare["kl"] >= 0
    assert 0 <= compare["top1"] <= 1
    assert compare["text_bf16"].startswith("The following exceptions are")
    assert data["plan"]["groups"]


@pytest.mark.parametrize("form", ["markdown", "html"])
def test_run_in_other_formats(small, form):
    text = ask("run", small, "--scheme", "int8", "--tokens", "2", "--format", form).stdout
    assert "The following exceptions are" in text
    assert "tokens/s after a warm-up" in text


def test_acceptance_run_compare_on_the_example():
    data = json.loads(ask("run", DENSE, "--scheme", "int8", "--compare", *QUICK, "--json").stdout)
    numbers = [v for v in data["compare"].values() if isinstance(v, float)]
    assert len(numbers) >= 6
    assert all(math.isfinite(v) for v in numbers)
    assert data["text"].startswith("The following exceptions are")


@pytest.mark.slow
@pytest.mark.parametrize("model", [DENSE, MOE], ids=lambda p: p.name)
def test_run_compare_at_full_length(model):
    assert "perplexity" in ask("run", model, "--scheme", "int8", "--compare").stdout


def test_run_compiled_without_a_compiler(small, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    error = parts(ask("run", small, "--scheme", "int8", "--tokens", "2", "--compile", code=2))
    assert "no C++ compiler" in error["found"]


def test_quantize_then_run_the_result(small, tmp_path):
    out = tmp_path / "new" / "ümläut out"
    data = json.loads(ask("quantize", small, out, "--scheme", "int8", "--json").stdout)
    assert data["directory"] == str(out)
    assert data["bytes_written"] >= data["plan"]["bytes_after"]
    same_state(quantport.load(out), quantport.load(small, "int8"))
    direct = json.loads(ask("run", small, "--scheme", "int8", "--tokens", "4", "--json").stdout)
    again = json.loads(ask("run", out, "--tokens", "4", "--json").stdout)
    assert again["text"] == direct["text"]


def test_compare_of_a_quantized_checkpoint_needs_its_original(small, tmp_path):
    out = tmp_path / "out"
    ask("quantize", small, out, "--scheme", "int8", "--format", "quantport")
    error = parts(ask("run", out, "--compare", "--text", TEXT, code=2))
    assert "--baseline" in error["try"]
    assert "it is quantized itself" in parts(ask("run", out, "--compare", "--baseline", out, code=2))["found"]
    assert "no config.json" in parts(ask("run", out, "--compare", "--baseline", tmp_path, code=2))["found"]
    data = json.loads(
        ask("run", out, "--compare", "--baseline", small, "--text", TEXT, *QUICK, "--json").stdout
    )
    assert data["compare"]["kl"] < 1


def test_quantize_refuses_a_taken_directory_before_it_works(small, tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(
            "quantport.cli.run_model.quantize_checkpoint", lambda *a, **k: pytest.fail("it loaded first")
        )
        said = parts(ask("quantize", small, taken, "--scheme", "int8", code=2))["try"]
        assert said == "a new or empty directory"  # what holds no weights is not replaced
        (taken / "model.safetensors").write_bytes(b"")
        assert "--overwrite" in parts(ask("quantize", small, taken, "--scheme", "int8", code=2))["try"]
        (taken / "model.safetensors").unlink()
        assert (
            "no weights"
            in parts(ask("quantize", small, taken, "--scheme", "int8", "--overwrite", code=2))["found"]
        )
        assert "a file" in parts(ask("quantize", small, taken / "notes.txt", code=2))["found"]
        assert "a file" in parts(ask("quantize", small, taken / "notes.txt" / "x", code=2))["found"]
        assert "is read" in parts(ask("quantize", small, small, "--overwrite", code=2))["found"]
        assert "is read" in parts(ask("quantize", small, small.parent, "--overwrite", code=2))["found"]
        patch.setattr("quantport.cli.run_model.os.access", lambda *a: False)
        assert "no permission" in parts(ask("quantize", small, tmp_path / "new", code=2))["found"]
    assert [p.name for p in taken.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(("size", "most"), [("150KB", 150_000), ("200000", 200_000), ("160KiB", 160 << 10)])
def test_no_file_is_larger_than_asked_for(small, tmp_path, size, most):
    ask("quantize", small, tmp_path / "out", "--scheme", "int8", "--max-shard-size", size)
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 1
    assert max(sizes) < most + 8192, "with its header"
    assert (
        "not an amount"
        in parts(ask("quantize", small, tmp_path, "--max-shard-size", "much", code=2))["found"]
    )


def test_quantize_overwrites_when_asked(small, tmp_path):
    out = tmp_path / "out"
    for scheme in ("int8", "int4"):
        ask("quantize", small, out, "--scheme", scheme, "--overwrite")
    assert json.loads((out / "quantport.json").read_text())["layers"]
    assert "int4" in (out / "quantport.json").read_text()


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (("--tokens", "100"), "64 positions"),
        (("--prompt", "word " * 100), "64 positions"),
        (("--scheme", "int8", "--scheme", "int9"), "int9"),
        (("--compare", "--text", "/no/such/text"), "No such file"),
        (("--chat",), "no chat template"),
        (("--device", "cuda:sm_90"), "simulated"),
    ],
    ids=lambda a: str(a[-1])[:12],
)
def test_wrong_requests_to_run(small, args, found):
    assert found in str(parts(ask("run", small, *args, code=2)))


def test_what_a_comparison_lacks_is_said_before_the_model_is_loaded(small, tmp_path, monkeypatch):
    monkeypatch.setattr(quantport, "load", lambda *a, **k: pytest.fail("it loaded first"))

    def refused(*args):
        return parts(ask("run", small, "--tokens", "2", "--compare", *args, code=2))

    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    assert "at least 64 tokens" in refused("--text", tmp_path / "short.txt")["try"]
    assert "UTF-8" in refused("--text", tmp_path / "binary.txt")["try"]
    assert "directory" in refused("--text", tmp_path)["found"]
    assert "no config.json" in refused("--baseline", tmp_path)["found"]
    assert "64 positions" in refused("--tokens", "64")["found"]


def test_a_comparison_without_a_text_takes_the_help_of_python(small):
    assert not (small.parent / "eval.txt").exists()
    result = ask("run", small, "--scheme", "int8", "--compare", *QUICK, "--json")
    compare = json.loads(result.stdout)["compare"]
    assert compare["source"] == f"the help of Python {platform.python_version()}"
    assert compare["tokens_scored"] == 2 * 63
    own = ask("run", small, "--scheme", "int8", "--compare", "--text", TEXT, *QUICK)
    assert "126 tokens of eval.txt in windows of 64" in own.stdout


def talking(small, folder, template):
    """The model, with a tokenizer that has a chat template."""
    shutil.copytree(small, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return folder


def generated_from(monkeypatch):
    """The prompts, as tokens, that anything is generated from."""
    seen, generate = [], compare.generate
    monkeypatch.setattr(
        compare, "generate", lambda m, ids, *a, **k: seen.append(ids[0].tolist()) or generate(m, ids, *a, **k)
    )
    return seen


def test_a_prompt_goes_through_the_chat_template(small, tmp_path, monkeypatch):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}. {% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    chat, seen = talking(small, tmp_path / "chat", template), generated_from(monkeypatch)
    tokenizer = baseline.tokenizer(chat)
    for args, text in (
        ((), "user: Why. assistant:"),
        (("--chat",), "user: Why. assistant:"),
        (("--no-chat",), "Why"),
    ):
        seen.clear()
        data = json.loads(ask("run", chat, "--prompt", "Why", "--tokens", "3", *args, "--json").stdout)
        assert {tuple(ids) for ids in seen} == {tuple(tokenizer(text).input_ids)}
        assert data["chat"] == (args != ("--no-chat",))
        assert data["text"].startswith("Why") == (args == ("--no-chat",)), "a chat shows the answer"


def test_without_a_template_a_prompt_is_continued(small, monkeypatch):
    data = json.loads(ask("run", small, "--prompt", "The following", "--tokens", "2", "--json").stdout)
    assert data["chat"] is False
    assert data["text"].startswith("The following")


@pytest.mark.parametrize("template", ["{{ raise_exception('no users') }}", "{% if %}", "{{ 1 // 0 }}"])
def test_a_template_that_fails_is_said_before_the_model_is_loaded(small, tmp_path, template, monkeypatch):
    monkeypatch.setattr(quantport, "load", lambda *a, **k: pytest.fail("it loaded first"))
    error = parts(ask("run", talking(small, tmp_path / "chat", template), code=2))
    assert "the chat template raised" in error["found"]
    assert "--no-chat" in error["try"]


def test_run_without_config_or_tokenizer(small, tmp_path):
    assert "no config.json" in parts(ask("run", tmp_path, code=2))["found"]
    shutil.copy(small / "config.json", tmp_path)
    assert "tokenizer.json" in parts(ask("run", tmp_path, code=2))["try"]
    (tmp_path / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in parts(ask("run", tmp_path, code=2))["try"]


def test_a_config_that_is_no_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in parts(ask("run", tmp_path, code=2))["found"]


def test_quantize_of_what_is_quantized(small, tmp_path):
    ask("quantize", small, tmp_path / "once", "--scheme", "int8", "--format", "quantport")
    again = ask("quantize", tmp_path / "once", tmp_path / "twice", "--scheme", "nf4", code=2)
    assert "already" in parts(again)["found"]
    assert not (tmp_path / "twice").exists()


def test_an_empty_prompt_begins_a_text(small):
    assert (
        json.loads(ask("run", small, "--prompt", "", "--tokens", "2", "--json").stdout)["tokens_per_second"]
        > 0
    )


def test_bf16_is_not_called_quantized(small):
    assert ", 0 layers quantized" in ask("plan", small, "--scheme", "bf16").stdout


def test_no_room_for_the_original(small, monkeypatch):
    real = quantport.load

    def tight(*args, **settings):
        model = real(*args, **settings)
        plan = model.quantport_plan
        device = plan.device
        object.__setattr__(plan, "device", Device(device.arch, memory=plan.after + 10))
        return model

    monkeypatch.setattr(quantport, "load", tight)
    result = ask("run", small, "--scheme", "int8", "--compare", "--text", TEXT, *QUICK, code=2)
    assert "BudgetError" in result.stderr


class Fixed(nn.Module):
    """A language model of constant logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.fixed = logits

    def forward(self, ids):
        return type("Out", (), {"logits": self.fixed.expand(*ids.shape, -1)})()


def test_quality_by_hand():
    base, model = torch.tensor([0.0, 0.0]), torch.tensor([math.log(3.0), 0.0])  # 1/2, 1/2 and 3/4, 1/4
    windows = torch.tensor([[0, 0, 1], [1, 1, 0]])
    seen: list[int] = []
    found = compare.quality(Fixed(model), Fixed(base), windows, lambda done, total, _: seen.append(done))
    assert found["perplexity_bf16"] == pytest.approx(2)
    assert found["perplexity"] == pytest.approx(math.exp(-(math.log(0.75) + math.log(0.25)) / 2))
    assert found["kl"] == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), rel=1e-5)
    assert (found["top1"], found["tokens_scored"], found["window"], seen) == (1.0, 4, 3, [1, 2])
    assert compare._exp(1e6) == math.inf


def test_windows_are_full_and_bounded():
    assert compare.cut(list(range(1000)), 64, None).shape == (3, 256)
    assert compare.cut(list(range(1000)), 2, 512).shape == (2, 256)
    assert compare.cut(list(range(1000)), 64, 100).shape == (10, 100)


def test_rates_are_medians_of_turns_after_a_warm_up(monkeypatch):
    calls: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        compare, "generate", lambda model, ids, tokens, least=0: calls.append((model, tokens, least)) or ids
    )
    monkeypatch.setattr(
        compare,
        "timed",
        lambda model, ids, tokens, least: (ids, calls.append((model, tokens, least)) or len(calls)),
    )
    found = compare.rates({"a": "a", "b": "b"}, torch.zeros(1, 1), 9)
    assert calls == [("a", 4, 0), ("b", 4, 0), *[("a", 9, 9), ("b", 9, 9)] * 3]
    assert found == {"a": 5, "b": 6}


def test_bench_quickly():
    asked = (
        "bench",
        "--quick",
        "--size",
        "64",
        "96",
        "--num-tokens",
        "1",
        "--rows",
        "3",
        "--scheme",
        "int8",
        "--scheme",
        "int4_wo",
    )
    data = json.loads(ask(*asked, "--json").stdout)
    assert [(r["scheme"], r["rows"]) for r in data["results"]] == [
        ("int8", 1),
        ("int8", 3),
        ("int4_weight_only", 1),
        ("int4_weight_only", 3),
    ]
    assert all(r["vs_bf16"] > 0 and r["of_limit"] > 0 and not r["cold"] for r in data["results"])
    kernel = bench_linear.select_kernel(
        bench_linear.Request(
            bench_linear.WeightSpec(quantport.schemes["bf16"], 64, 96), "linear", quantport.devices()[0]
        ),
        bench_linear.default_registry().kernels(quantport.devices()[0].kind),
    ).kernel
    assert all((r["vs_prepacked"] is None) == (kernel == "torch.linear") for r in data["results"])
    assert "no measurements" in ask(*asked).stdout


def test_bench_rotates_through_enough_copies_and_no_more():
    effort = bench_linear.Effort()
    for size in (100_000, 4096 * 4096, 4096 * 4096 * 2):
        assert bench_linear.COLD <= effort.copies(size) * size < bench_linear.COLD + size
    assert effort.copies(1 << 30) == 2
    assert effort.copies(1) == bench_linear.MOST


def test_interleaving_takes_turns_and_steps_through_the_copies():
    seen: list[tuple[str, int]] = []
    x = torch.empty(1)
    calls = {name: (lambda i, _x, name=name: seen.append((name, i))) for name in "ab"}
    bench_linear.interleaved(calls, x, rounds=2, seconds=1e-12)
    assert seen[4:] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (("--device", "cuda:sm_90"), "simulated"),
        (("--scheme", "int9"), "did you mean 'int8'"),
        (("--size", "1000000", "1000000"), "smaller --size"),
    ],
    ids=lambda a: a[0],
)
def test_wrong_requests_to_bench(args, found):
    assert found in str(parts(ask("bench", "--quick", *args, code=2)))


@pytest.mark.parametrize("size", [("0", "4"), ("4", "-1"), ("4",)])
def test_sizes_must_be_two_positive_numbers(size):
    assert ask("bench", "--quick", "--size", *size, code=2).stderr
