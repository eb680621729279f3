"""Hostile headers, indexes and configurations from a seed, each read as ``plan`` reads it. A program: tests
run it in a process of its own, whose memory is bounded, and read what it prints: a JSON object for each
failure, and how many cases were run and read without an error.

Usage: ``python core_fuzz.py FIRST_SEED COUNT``. One seed is one case: a failure can be run again alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from core_fakes import Shape
from safetensors.torch import save_file

import quantport
from quantport.cli import page, plans
from quantport.config import QuantConfig
from quantport.config.resolve import resolve
from quantport.errors import QuantportError
from quantport.model.layers import find_layers
from quantport.scheme.catalog import BUILTIN

MEGABYTES, SECONDS = 512, 2  # of memory beside that of the imports, and of CPU for one case
NAMES = (
    *("model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.experts.{}.up_proj.weight"),
    *("model.layers.{}.mlp.experts.gate_up_proj", "model.layers.{}.mlp.experts.down_proj", "lm_head.weight"),
    *(
        "model.embed_tokens.weight",
        "experts.{}.w1.weight",
        "a.weight_scale",
        "x",
        "",
        ".",
        "..weight",
        "\0",
        "é",
    ),
)
KEYS = (
    *("num_hidden_layers", "num_local_experts", "n_layer", "hidden_size", "num_attention_heads", "head_dim"),
    *("layer_types", "sliding_window", "tie_word_embeddings", "text_config", "quantization_config", "dtype"),
    *("weight_map", "metadata", "model_type", "architectures", "num_key_value_heads", "auto_map"),
)
SETTINGS = (
    *QuantConfig.model_fields,
    *("method", "quant_method", "modules_to_not_convert", "ignored_layers", "fmt", "bits", "vae", "", "re:"),
)
PATTERNS = (
    *(
        r"re:(.|.)*[^\w.]",
        "re:(.*)*$",
        r"re:(?:[a-z.]|.)*\d$",
        "re:((a{100}){100}){100}",
        "re:(",
        "*" * 50,
        "[",
        "re:" + "(" * 400,
    ),
    *("re:" + "(" * 400, r"module:(.|.)*(?:!|\?)", "re:(?:(?:x?){40}x){40}", "re:.*" * 20, "*q_proj"),
    "re:" + "a?" * 300 + "a" * 300,
)


class Slow(BaseException):  # no error of the code under test, which must not catch it
    """A case takes too long."""


def number(r: random.Random) -> Any:
    """Numbers that code forgets."""
    wide = r.choice(
        (0, 1, -1, 2, 3, 8, 255, 2**31, 2**63 - 1, 2**63, 2**64 + 1, 10**13, 10**30, 10**400, -(2**70))
    )
    return r.choice(
        (wide, wide, float(r.choice((0.5, 1e300, -1.0))), float("inf"), float("nan"), True, False)
    )


def value(r: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kinds = ("number", "text", "null", "pattern", "scheme", "list", "object")
    kind = r.choice(kinds if depth < 4 else kinds[:4])
    if kind == "number":
        return number(r)
    if kind == "text":
        return r.choice(
            ("", "x" * r.choice((1, 100, 5000)), "\ud800", "\0", "9" * 5000, "null", "../..", "é")
        )
    if kind == "null":
        return None
    if kind == "pattern":
        return r.choice(PATTERNS)
    if kind == "scheme":
        return r.choice(
            (*BUILTIN, "FP8", "awq", "fp8_e4m3", "none", "int4:hadamard", "nf4:double", "::", "int8:")
        )
    if kind == "list":
        return [value(r, depth + 1) for _ in range(r.choice((0, 1, 2, 5)))]
    return {r.choice((*KEYS, *SETTINGS)): value(r, depth + 1) for _ in range(r.choice((0, 1, 2, 5)))}


def setting(r: random.Random, depth: int = 0) -> dict[str, Any]:
    """A configuration: most values are of the type that their key takes."""
    out: dict[str, Any] = {}
    for _ in range(r.choice((1, 1, 2, 4))):
        key = r.choice(SETTINGS)
        patterns = [r.choice(PATTERNS) for _ in range(r.choice((1, 1, 2)))]
        if r.random() < 0.3:
            out[key] = value(r)
        elif key in ("ignore", "ignored_layers", "modules_to_not_convert"):
            out[key] = (
                [pattern.partition(":")[2] or pattern for pattern in patterns] if "not" in key else patterns
            )
        elif key == "targets":
            out[key] = {pattern: r.choice((*BUILTIN, None)) for pattern in patterns}
        elif key in ("components", "vae") and depth < 3:
            out[key] = setting(r, depth + 1)
        else:
            out[key] = r.choice((*BUILTIN, "error", "dynamic", [128, 128], 32, 0, None, [], {}, "fp8"))
    return out


def name(r: random.Random) -> str:
    """The name of a tensor, with numbers that code forgets."""
    odd = r.choice((10**8, 10**13, "9" * 5000, "²", "")) if r.random() < 0.05 else 2
    return r.choice(NAMES).format(*(r.choice((0, 1, odd)) for _ in range(2)))


def header(r: random.Random) -> bytes:
    """A safetensors file: mostly right, with some of it wrong."""
    entries: dict[str, Any] = {}
    at = 0
    for key in dict.fromkeys(name(r) for _ in range(r.choice((1, 2, 5, 20)))):
        shape = [r.choice((0, 1, 2, 4, 8)) for _ in range(r.choice((0, 1, 2, 2, 2, 3)))]
        if r.random() < 0.03:  # few bytes that claim much
            shape = [r.choice((2**20, 3_000_000, 2**40, 2**62)), *shape[1:]]
        size = 2 * math.prod(shape)
        entries[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
        if r.random() < 0.03:
            entries[key][r.choice(("dtype", "shape", "data_offsets", "more"))] = value(r)
    if r.random() < 0.1:
        entries["__metadata__" if r.random() < 0.5 else name(r)] = value(r)
    text = json.dumps(entries).encode("utf-8", "surrogatepass")
    text = damaged(r, text) if r.random() < 0.1 else text
    length = len(text) if r.random() > 0.03 else r.choice((0, 1, 2**40, 2**64 - 1, len(text) + 1))
    return struct.pack("<Q", length) + text + (b"\0" * at if at <= 4096 else b"")


def damaged(r: random.Random, text: bytes) -> bytes:
    """JSON with some bytes exchanged, cut, deep, wide or twice."""
    at = r.randrange(len(text) + 1)
    return r.choice(
        (
            text[:at],
            text[:at] + bytes([r.randrange(256)]) + text[at + 1 :],
            text[:at] + text[at // 2 :],
            b"[" * 100_000,
            b'{"x":' * 5_000 + b"1" + b"}" * 5_000,
            b'{"x":[' + b"{}," * 700_000 + b"{}]}",
            b'{"x":' + b"9" * 10_000 + b"}",
            b"\xff\xfe" + text,
            b"\xef\xbb\xbf" + text,
            b"null",
            b"",
        )
    )


def written(r: random.Random, folder: Path) -> None:
    """A folder with a checkpoint and whatever lies beside it."""
    shard = "model.safetensors" if r.random() < 0.8 else "model-00001-of-00001.safetensors"
    if r.random() < 0.95:
        (folder / shard).write_bytes(header(r))
    index = {"weight_map": {name(r): r.choice((shard, "../x", "", "\0", 3)) for _ in range(3)}}
    layer: dict[str, Any] = {"scheme": "int8", "kind": "moe", "weights": [["gate_proj", 2, 2]]}
    layer[r.choice(("experts", "weights", "scheme", "tied", "others", "dtype"))] = value(r)
    config: dict[str, Any] = {
        r.choice(KEYS): value(r) if r.random() < 0.5 else number(r) for _ in range(r.choice((1, 3, 8)))
    }
    files = (
        ("config.json", config, 0.5),
        ("model.safetensors.index.json", index, 0.15),
        ("quantport.json", {"format": 1, "layers": {"a": layer}}, 0.15),
    )
    for file, data, share in files:
        if r.random() < share:
            text = json.dumps(data if r.random() > 0.05 else value(r)).encode("utf-8", "surrogatepass")
            (folder / file).write_bytes(damaged(r, text) if r.random() < 0.1 else text)
    if r.random() < 0.01:
        with (folder / "config.json").open("wb") as stream:
            stream.truncate(60_000_000)


def case(seed: int) -> None:
    """Reads one checkpoint, or one configuration."""
    r = random.Random(seed)
    if r.random() < 0.4:
        tensors = {f"model.layers.{i}.self_attn.q_proj.weight": Shape((2, 2)) for i in range(30)}
        parsed = QuantConfig.parse(setting(r) if r.random() > 0.1 else value(r), BUILTIN)
        resolve(find_layers(tensors), parsed, "int8")
        return
    with tempfile.TemporaryDirectory() as folder:
        written(r, Path(folder))
        made = quantport.plan(folder, "int8", device="cpu:generic")
        json.dumps(made.to_dict())
        page.emit(plans.plan_page(made), r.choice(("json", "table", "markdown", "html")))


def late(signum: int, frame: object) -> None:
    """Ends a case that takes too long."""
    raise Slow


def main(first: int, count: int) -> None:
    """Runs the cases, and prints what fails."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:  # imports are no part of a case
        save_file({"a.weight": torch.zeros(2, 2)}, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text("{}", encoding="utf-8")
        quantport.plan(folder, "int8", device="cpu:generic")
    signal.signal(signal.SIGPROF, late)  # CPU time, so that a busy machine is no failure
    used = re.search(r"VmData:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert used
    limit = int(used[1]) * 1024 + MEGABYTES * 1_000_000
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    read = 0
    for seed in range(first, first + count):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with contextlib.suppress(QuantportError), contextlib.redirect_stdout(io.StringIO()):
                case(seed)
                read += 1
        except (Exception, Slow) as error:
            print(json.dumps({"seed": seed, "error": type(error).__name__, "text": str(error)[:300]}))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps({"cases": count, "read": read}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
