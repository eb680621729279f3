"""The commands that look and tell, in every format, and what they say of a wrong request."""

from __future__ import annotations

import json

import pytest
from core_fakes import FakeBackend, backend_plugin
from core_models import DENSE, MOE, SCHEMES, Tiny, made, write
from typer.testing import CliRunner

import quantport
from quantport.cli import app
from quantport.plugins.registry import Registry, default_registry

ASKING = (
    ("devices",),
    ("matrix", "--device", "cpu:x86_vnni"),
    ("plan", str(DENSE), "--scheme", "int8"),
    ("doctor",),
)


def ask(*args: object, code: int = 0):
    """Runs a command; stderr must be empty when it went well, and stdout when it did not."""
    result = CliRunner().invoke(app, [str(a) for a in args], prog_name="quantport")
    assert result.exit_code == code, (result.output, result.exception)
    if code == 0:
        assert not result.stderr
    return result


def parts(result) -> dict[str, str]:
    """The three parts of an error, which stderr must hold and nothing else."""
    assert not result.stdout
    lines = result.stderr.splitlines()
    assert lines[0].endswith("Error")
    found = {name: text for name, _, text in (line.partition(": ") for line in lines[1:])}
    assert list(found) == ["asked", "found", "try"]
    assert all(found.values())
    return found


@pytest.mark.parametrize("args", ASKING, ids=lambda a: a[0])
def test_every_format_of_every_asking_command(args):
    table = ask(*args).stdout
    assert all(line == line.rstrip() for line in table.splitlines()), "no padding in pipes"
    assert "\x1b" not in table
    data, again = (json.loads(ask(*args, *how).stdout) for how in (["--json"], ["--format", "json"]))
    if args[0] == "plan":
        assert data.pop("bytes_free") > 0 < again.pop("bytes_free")  # at the moment
    assert data == again
    assert ask(*args, "--format", "markdown").stdout.count("|---") >= 1 or args[0] != "matrix"
    page = ask(*args, "--format", "html").stdout
    assert page.startswith("<!doctype html>")
    assert "<table>" in page


def test_two_formats_are_a_conflict():
    done = ask("devices", "--json", "--format", "html", code=2)
    assert json.loads(done.stdout)["error"]["asked"] == "--json and --format html"
    assert not done.stderr


def test_version_and_help():
    assert ask("--version").stdout == f"quantport {quantport.__version__}\n"
    text = ask("--help").stdout
    assert all(
        name in text
        for name in ("devices", "matrix", "plan", "run", "quantize", "bench", "doctor", "Exit codes")
    )


@pytest.mark.parametrize("name", ["devices", "matrix", "plan", "run", "quantize", "bench", "doctor"])
def test_help_of_every_command_has_an_example_that_parses(name):
    text = ask(name, "--help").stdout
    assert "Examples" in text
    assert f"quantport {name}" in text
    assert "--json" in text
    assert "--format" in text


def test_unknown_words_are_met_with_the_known_ones():
    assert "Did you mean 'plan'?" in ask("plann", code=2).stderr
    assert "--scheme" in ask("plan", DENSE, "--schema", "int8", code=2).stderr
    assert "table" in ask("devices", "--format", "xml", code=2).stderr
    assert "weight_only" in ask("plan", DENSE, "--fallback", "none", code=2).stderr
    assert ask("plan", DENSE, "--num-tokens", "0", code=2).stderr
    assert ask("plan", code=2).stderr


@pytest.mark.parametrize("option", ["--num-tokens", "--rows"])
def test_the_number_of_tokens_has_two_spellings(option):
    data = json.loads(ask("plan", DENSE, "--scheme", "int8", "--json", option, "7").stdout)
    assert data["rows"] == 7


def test_devices():
    first = json.loads(ask("devices", "--json").stdout)[0]
    assert first["device"].startswith(quantport.devices()[0].kind)
    assert set(first) >= {"device", "arch", "title", "name", "memory", "native", "features"}


def test_matrix_without_a_filter_is_an_overview():
    text = ask("matrix").stdout
    assert "Linear layers" in text
    assert "MoE experts" in text
    assert all(scheme in text for scheme in SCHEMES)
    assert "✅ native: as asked" in text
    cells = json.loads(ask("matrix", "--json").stdout)
    assert len(cells) == len(quantport.matrix())
    assert all(c["kernel"] for c in cells)


def test_matrix_of_one_architecture_cites_its_sources():
    text = " ".join(ask("matrix", "--device", "npu:ascend910b").stdout.split())
    for cell in quantport.matrix(device="npu:ascend910b"):
        claim = cell.choice.claim
        assert claim
        assert f"{cell.choice.kernel}: {claim.evidence}: {claim.source}" in text
    assert "npu.quant_matmul: simulated: torch_npu" in text


def test_matrix_filters():
    cells = json.loads(
        ask("matrix", "--scheme", "fp8", "--device", "cuda:sm_80", "--layer", "linear", "--json").stdout
    )
    assert [
        (c["scheme"], c["device"], c["layer"], c["effective" if "effective" in c else "precision"])
        for c in cells
    ] == [("fp8_per_tensor", "cuda:sm_80", "linear", "W8A16")]
    assert "no e4m3fn matrix instruction" in ask("matrix", "-s", "fp8", "-d", "cuda:sm_80").stdout
    assert "did you mean 'sm_89'" in parts(ask("matrix", "--device", "cuda:sm_8", code=2))["try"]
    assert "did you mean 'int8'" in parts(ask("matrix", "--scheme", "int9", code=2))["try"]


def test_acceptance_moe_on_ampere_is_weight_only_and_says_why():
    asked = ("plan", MOE, "--scheme", "fp8_per_tensor", "--device", "cuda:sm_80")
    text = ask(*asked).stdout
    assert "W8A16 weight-only" in text
    assert "reason: fp8_per_tensor: sm_80" in text
    assert "no e4m3fn matrix instruction" in text
    error = parts(ask(*asked, "--fallback", "error", code=2))
    assert "no e4m3fn matrix instruction" in error["found"]
    assert "fallback" in error["try"]


def test_acceptance_moe_on_hopper_quantizes_activations_per_token():
    made_plan = json.loads(
        ask("plan", MOE, "--scheme", "fp8_per_tensor", "--device", "cuda:sm_90", "--json").stdout
    )
    linear = [g for g in made_plan["groups"] if g["kind"] == "linear" and g["asked"]]
    assert linear
    assert {g["activations"] for g in linear} == {"e4m3fn per token"}
    assert (
        "e4m3fn per token" in ask("plan", MOE, "--scheme", "fp8_per_tensor", "--device", "cuda:sm_90").stdout
    )


def test_plan_says_everything():
    data = json.loads(ask("plan", DENSE, "--scheme", "int8", "--device", "cpu:x86_vnni", "--json").stdout)
    assert data["bytes_before"] > data["bytes_after"] > 0
    assert sum(g["bytes_after"] for g in data["groups"]) == data["bytes_after"]
    assert {
        "source",
        "device",
        "rows",
        "config",
        "fallback",
        "groups",
        "layers",
        "reasons",
        "warnings",
        "kept",
    } <= set(data)
    group = next(g for g in data["groups"] if g["layers"] == "model.layers.*.mlp.down_proj")
    assert group["count"] == sum(1 for x in data["layers"] if x["name"].endswith("mlp.down_proj"))
    assert group["shapes"][0]["n"]
    assert any("embedding" in text for text in data["kept"])


def test_plan_of_a_group_can_be_pasted_as_a_pattern():
    data = json.loads(ask("plan", DENSE, "--scheme", "int8", "--json").stdout)
    for group in data["groups"]:
        if group["asked"] and "*" in group["layers"]:
            again = json.loads(
                ask("plan", DENSE, "--scheme", "int8", "--ignore", group["layers"], "--json").stdout
            )
            assert (
                sum(1 for x in again["layers"] if x["asked"])
                == sum(1 for x in data["layers"] if x["asked"]) - group["count"]
            )


def test_plan_warns_of_slow_paths_and_names_those_of_unknown_speed():
    text = ask("plan", DENSE, "--scheme", "fp8_per_tensor", "--device", "rocm:gfx90a").stdout
    assert "warning: " in text
    assert "slower than BF16" in text
    assert "nobody measured the speed of int8" in text


@pytest.mark.parametrize(
    ("scheme", "on", "said"),
    [
        ("int8", "cuda:sm_90", "unknown, nobody measured it here; `quantport bench --scheme int8 --size"),
        ("fp8_per_channel", "cuda:sm_80", "fp8_per_channel as W8A16 by cuda.triton_weight_only"),
        ("int8", "rocm:gfx90a", "unknown, nobody measured it here"),
        ("fp8_per_tensor", "rocm:gfx90a", "slower than BF16: it writes and reads"),
    ],
)
def test_plan_says_the_speed_or_that_it_is_unknown(scheme, on, said):
    (text,) = json.loads(ask("plan", DENSE, "--scheme", scheme, "--device", on, "--json").stdout)["speed"]
    assert said in text
    assert ("unknown" in text) == ("quantport bench" in text)


def test_plan_lets_the_device_choose():
    assert "scheme chosen for this device: " in ask("plan", DENSE).stdout


def test_plan_takes_a_config_file_and_ignores(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"scheme": "int8", "ignore": ["*.q_proj"]}')
    data = json.loads(ask("plan", DENSE, "--config", config, "--ignore", "*.k_proj", "--json").stdout)
    asked = {x["name"].rpartition(".")[2]: x["asked"] for x in data["layers"]}
    assert (asked["q_proj"], asked["k_proj"], asked["v_proj"]) == (None, None, "int8")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "a JSON list"),
        ('{"schema": "int8"}', "schema"),
        ("\udcff", ""),
    ],
)
def test_a_wrong_config_file(tmp_path, text, found):
    config = tmp_path / "config.json"
    if text is not None:
        config.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert found in str(parts(ask("plan", DENSE, "--config", config, code=2)))


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (("plan", "/no/such/place", "--scheme", "int8"), "/no/such/place"),
        (("plan", DENSE, "--scheme", "int9"), "did you mean 'int8'"),
        (("plan", DENSE, "--device", "cude"), "did you mean 'cuda'"),
        (("plan", DENSE, "--device", "cpu:7"), "cpu:7"),
        (("plan", DENSE, "--scheme", "int8", "--ignore", "*.q_prjo"), "q_proj"),
        (("plan", DENSE, "--scheme", "int8", "--ignore", "re:("), "re:("),
        (("plan", DENSE, "--scheme", "int8", "--ignore", "lm_haed"), "lm_haed"),
    ],
    ids=lambda a: str(a[-1]),
)
def test_wrong_requests(args, found):
    assert found in str(parts(ask(*args, code=2)))


def test_a_truncated_checkpoint(tmp_path):
    folder = write(tmp_path / "broken", made(Tiny))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "model.safetensors" in str(parts(ask("plan", folder, "--scheme", "int8", code=2)))


@pytest.fixture
def registry(monkeypatch):
    """Makes a host of given plugins the host of the doctor."""

    def use(*points):
        with pytest.warns(RuntimeWarning) if len(points) > 1 else Nothing():
            found = Registry(points, only=[])
        monkeypatch.setattr("quantport.cli.doctor.default_registry", lambda: found)
        return found

    return use


class Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None


def test_doctor_of_a_sound_installation():
    data = json.loads(ask("doctor", "--json").stdout)
    assert data["ok"]
    assert data["versions"]["quantport"] == quantport.__version__
    assert all(data["versions"][name] for name in ("python", "torch", "transformers"))
    assert "no problem found" in ask("doctor").stdout


def test_doctor_names_what_was_set_aside_and_fails(monkeypatch, registry):
    good = backend_plugin(monkeypatch, "good", FakeBackend("good", found=()))
    bad = backend_plugin(monkeypatch, "bad", OSError("driver is gone"))
    registry(good, bad)
    result = ask("doctor", "--json", code=1)
    data = json.loads(result.stdout)
    assert not data["ok"]
    assert ("bad", "OSError: driver is gone") in [(p["plugin"], p["error"]) for p in data["problems"]]
    assert "driver is gone" in ask("doctor", code=1).stdout


def test_doctor_survives_advice_that_raises(monkeypatch, registry):
    backend = FakeBackend("acme")
    backend.advice = lambda: (_ for _ in ()).throw(RuntimeError("no advice"))
    registry(backend_plugin(monkeypatch, "acme", backend))
    assert "RuntimeError: no advice" in ask("doctor", code=1).stdout


def test_doctor_shows_advice_without_failing(monkeypatch):
    room = default_registry().backends["cpu"]
    monkeypatch.setattr(type(room), "advice", lambda self: ("install the thing",))
    assert "advice: cpu: install the thing" in ask("doctor").stdout


def test_doctor_of_a_wrong_environment(monkeypatch):
    monkeypatch.setenv("QUANTPORT_DEVICE", "toaster")
    assert "toaster" in ask("doctor", code=1).stdout
