"""The examples by hand of ``docs/schemes.md``, checked exactly, and what else that page claims of the schemes."""

from __future__ import annotations

import pytest
import torch
from docs_pages import ROOT, blocks

from quantport import numerics
from quantport.catalog import BUILTIN
from quantport.host import host

PAGE = ROOT / "docs" / "schemes.md"
GOLDEN = blocks(PAGE, "golden")


def row(text: str) -> list[float]:
    """``448 1*3`` -> [448, 1, 1, 1]."""
    out = []
    for word in text.split():
        value, _, count = word.partition("*")
        out += [float(value)] * int(count or 1)
    return out


def read(block) -> dict[str, list[str]]:
    fields: dict[str, list[str]] = {}
    for line in block.text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key, []).append(value.strip())
    return fields


def matrix(fields, key) -> torch.Tensor:
    return torch.tensor([row(line) for line in fields[key]])


@pytest.mark.parametrize("block", GOLDEN, ids=lambda b: f"{read(b)['scheme'][0]}-{b.line}")
def test_golden(block):
    fields = read(block)
    scheme = BUILTIN[fields["scheme"][0]]
    weight, x = matrix(fields, "weight"), matrix(fields, "activations")
    stored = numerics.quantize_weight(weight, scheme)
    k = weight.shape[1]
    codes = numerics.unpack_int4(stored["weight_packed"], k) if "weight_packed" in stored else stored["weight"]
    assert codes.float().tolist() == matrix(fields, "codes").tolist()
    assert stored["weight_scale"].float().tolist() == matrix(fields, "scale").tolist()
    if "packed" in fields:
        assert [[int(w, 16) for w in line.split()] for line in fields["packed"]] == stored["weight_packed"].tolist()
    assert numerics.linear(x, stored, scheme).tolist() == matrix(fields, "output").tolist()


def test_every_quantized_scheme_has_an_example():
    assert {read(b)["scheme"][0] for b in GOLDEN} == {s.name for s in BUILTIN.values() if s.weight.format != "bf16"}


@pytest.mark.parametrize("scheme", BUILTIN.values(), ids=lambda s: s.name)
def test_the_table_of_schemes(scheme):
    (line,) = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{scheme.name}` |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3] == f"{scheme.bytes(4096, 4096) * 8 / 4096**2:.3f}"
    assert cells[4] == ", ".join(f"`{alias}`" for alias in scheme.aliases)
    assert cells[1].split()[0].rstrip(",") == {"bf16": "bfloat16"}.get(scheme.weight.format, scheme.weight.format)


def test_every_deviation_is_named():
    text = PAGE.read_text(encoding="utf-8")
    named = {k.deviation for kind in host().backends for k in host().kernels(kind) if k.deviation}
    assert not [deviation for deviation in named if deviation not in text]
    assert ("No kernel of this version deviates" in text) == (not named)
