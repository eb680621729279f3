"""The contract of ``docs/numerics``: its examples by hand, checked exactly, and what else it claims of the
schemes.

A ``golden`` block has a field per line, and a field again for each further row. Numbers are decimal, ``7/6``
or ``2^-127``, and ``448*3`` repeats one three times. ``bytes`` are hexadecimal, in the order of memory.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from docs_pages import ROOT, blocks

from quantport import numerics
from quantport.numerics.scales import scale_of, scale_values
from quantport.plugins.registry import default_registry
from quantport.scheme import Quant, Scheme
from quantport.scheme.catalog import BUILTIN
from quantport.scheme.formats import FORMATS
from quantport.scheme.quant import RULES
from quantport.scheme.scheme import Layout

CHOICE = ROOT / "docs" / "schemes.md"
CONTRACT = ROOT / "docs" / "numerics.md"
PAGES = [CONTRACT, *sorted((ROOT / "docs" / "numerics").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
GOLDEN = [block for page in PAGES for block in blocks(page, "golden")]
STORED = {
    "scale": "weight_scale",
    "zero": "weight_zero",
    "global": "weight_global_scale",
    "outer": "weight_outer_scale",
    "scale_scale": "weight_scale_scale",
    "scale_offset": "weight_scale_offset",
}
INPUTS = ("input_scale", "input_zero_point")  # which a block says, and no weight gives
OTHERS = {"scheme", "dtype", "weight", "codes", "bytes", "activations", "quantized", "output", *INPUTS}


def words(text: str) -> list[str]:
    """``448 1*3`` -> 448, 1, 1, 1 as words."""
    pairs = [word.partition("*") for word in text.split()]
    return [value for value, _, count in pairs for _ in range(int(count or 1))]


def number(word: str) -> float:
    if "^" in word:
        return float(word.partition("^")[0]) ** int(word.partition("^")[2])
    top, _, bottom = word.partition("/")
    return float(top) / float(bottom or 1)


def read(block) -> dict[str, list[str]]:
    fields: dict[str, list[str]] = {}
    for line in block.text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key, []).append(value.strip())
    return fields


def matrix(lines: list[str]) -> torch.Tensor:
    return torch.tensor([[number(word) for word in words(line)] for line in lines])


def scheme_of(block) -> Scheme:
    return BUILTIN[read(block)["scheme"][0]]


def codes_of(stored: dict[str, torch.Tensor], scheme: Scheme, k: int) -> torch.Tensor:
    """Codes as the pages write them: values of the element format, indices of a code book."""
    element = scheme.weight.element
    if element.name == "int4":
        return numerics.unpack_int4(stored["weight_packed"], k).float()
    if element.bits == 8:
        return stored["weight"].float()
    codes = numerics.unpack_bits(stored["weight_packed"], k, element.bits)
    return codes.float() if element.codebook else numerics.decode(codes, element)


def check_stored(
    stored: dict[str, torch.Tensor], fields: dict[str, list[str]], scheme: Scheme, k: int
) -> None:
    """Every stored tensor is what the block says, and the block says every one."""
    for field, tensor in STORED.items():
        assert (field in fields) == (tensor in stored), field
        if tensor in stored:
            raw = stored[tensor]
            value = (
                raw
                if field != "scale" or scheme.weight.scale_quant
                else scale_values(raw, scheme.weight.scale)
            )
            assert value.float().view(len(fields[field]), -1).tolist() == matrix(fields[field]).tolist(), (
                field
            )
    if "codes" in fields:
        assert codes_of(stored, scheme, k).tolist() == matrix(fields["codes"]).tolist()
    if "bytes" in fields:
        packed = stored.get("weight_packed", stored.get("weight_blocks", stored.get("weight")))
        assert [[f"{b:02x}" for b in row] for row in packed.view(torch.uint8).tolist()] == [
            words(w) for w in fields["bytes"]
        ]


@pytest.mark.parametrize("block", GOLDEN, ids=lambda b: f"{scheme_of(b).name}-{b.page.stem}-{b.line}")
def test_golden(block):
    fields, scheme = read(block), scheme_of(block)
    assert set(fields) <= OTHERS | set(STORED)
    assert {"codes", "bytes"} & set(fields)
    dtype = getattr(torch, fields.get("dtype", ["float32"])[0])
    weight, x = matrix(fields["weight"]).to(dtype), matrix(fields["activations"]).to(dtype)
    stored = numerics.quantize_weight(weight, scheme.per_token)
    check_stored(stored, fields, scheme, weight.shape[1])
    layout = scheme.layout(*weight.shape)
    inputs = {key: matrix(fields[key])[0].to(layout[key][1]) for key in INPUTS if key in layout}
    stored |= inputs
    if "quantized" in fields:
        rotated = numerics.rotate(x, scheme.rotation)
        seen = (
            numerics.static_values(x, scheme.activation, *inputs.values())
            if inputs
            else numerics.quantized_values(rotated, scheme.activation)
        )
        assert seen.tolist() == matrix(fields["quantized"]).tolist()
    assert numerics.linear(x, stored, scheme).tolist() == matrix(fields["output"]).tolist()


def test_every_quantized_scheme_and_every_option_has_an_example():
    names = {read(b)["scheme"][0] for b in GOLDEN}
    assert {name.split(":")[0] for name in names} == {
        s.name for s in BUILTIN.values() if s.weight.format != "bf16"
    }
    # of 4- and 6-bit elements: mxfp8 has it
    options = {option for s in BUILTIN.values() for option in s.options} - {"even1"}
    assert options <= {option for name in names for option in name.split(":")[1:]}


def section(scheme: Scheme) -> dict[str, str]:
    """The list of facts in the section of a scheme."""
    (text,) = re.findall(rf"^### {scheme.name}\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    lines = re.sub(r"\n  +", " ", text)
    return dict(re.findall(r"^- ([A-Z][a-z ]+): (.*)$", lines, re.MULTILINE))


SIZES = pytest.mark.parametrize(("n", "k"), [(4096, 4096), (130, 1030), (1, 1)])


def layout_of(text: str, n: int, k: int) -> Layout:
    """What ``name`` dtype [shape], in a text, says for a size."""
    sizes = {"N": n, "K": k, "ceil": math.ceil}
    stated = re.findall(r"`(\w+)` (\w+) \[([^\]]+)\]", text)
    return {
        tensor: (tuple(eval(f"({shape},)", sizes)), getattr(torch, dtype)) for tensor, dtype, shape in stated
    }


@pytest.mark.parametrize("scheme", BUILTIN.values(), ids=lambda s: s.name)
@SIZES
def test_the_layout_of_every_section(scheme, n, k):
    assert layout_of(section(scheme)["Stored"], n, k) == scheme.layout(n, k)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@SIZES
def test_what_double_stores(name, n, k):
    scheme = BUILTIN[f"{name}:double"]
    (text,) = re.findall(r"^Stored: (.*?)\n\n", TEXT, re.MULTILINE | re.DOTALL)
    plain = section(BUILTIN[name])["Stored"].partition(";")[0]
    assert layout_of(f"{plain} {text}", n, k) == scheme.layout(n, k)
    assert f"{bits(scheme)} bits per weight" in " ".join(text.split())


@pytest.mark.parametrize("scheme", BUILTIN.values(), ids=lambda s: s.name)
def test_the_facts_of_every_section(scheme):
    facts = section(scheme)
    assert list(facts) == ["Stored", "Bits per weight", "Aliases", "Options", "Differences", "Source"]
    assert facts["Bits per weight"] == bits(scheme)
    assert facts["Aliases"] == (", ".join(f"`{alias}`" for alias in scheme.aliases) or "none")
    assert facts["Options"] == (", ".join(f"`{option}`" for option in scheme.options) or "none")


def bits(scheme: Scheme) -> str:
    """Bits per weight at 4096 x 4096."""
    return f"{scheme.bytes(4096, 4096) * 8 / 4096**2:.3f}"


@pytest.mark.parametrize("scheme", BUILTIN.values(), ids=lambda s: s.name)
def test_the_table_of_schemes(scheme):
    (cells,) = [row for row in table(CHOICE) if row[0] == f"`{scheme.name}`"]
    assert cells[1].split()[0].rstrip(",") == {"bf16": "bfloat16"}.get(
        scheme.weight.format, scheme.weight.format
    )
    assert cells[2].split()[0] == (scheme.activation.format if scheme.activation else "16-bit")
    assert cells[3] == bits(scheme)
    assert cells[4] == ", ".join(f"`{alias}`" for alias in scheme.aliases)


def table(page) -> list[list[str]]:
    lines = page.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def rows_of(header: str) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table of the contract whose first column is named so."""
    rows = table(CONTRACT)
    start = next(i for i, row in enumerate(rows) if row[0] == header)
    stop = next((i for i in range(start + 2, len(rows)) if set(rows[i][0]) == {"-"}), len(rows) + 1) - 1
    return rows[start], rows[start + 2 : stop]


def test_the_table_of_formats():
    _, rows = rows_of("format")
    assert {row[0].strip("`") for row in rows} == {
        name for name, f in FORMATS.items() if not f.block and f.bits <= 8
    }
    for name, width, bias, largest, normal, subnormal, _ in rows:
        element = FORMATS[name.strip("`")]
        assert int(width) == element.bits
        assert number(largest) == element.high
        if bias == "-":
            continue
        values = [v for v in numerics.values_of(element.name).tolist() if v > 0 and math.isfinite(v)]
        assert max(values) == element.high
        smallest = normal if subnormal == "-" else subnormal
        assert min(values) == number(smallest)
        assert number(normal) == 2.0 ** ((0 if subnormal == "-" else 1) - int(bias))


def test_the_table_of_scale_rules():
    head, rows = rows_of("amax")
    assert len(rows) >= 8
    for row in rows:
        for column, cell in zip(head[1:], row[1:], strict=True):
            element, rule = column.split()
            assert rule in RULES
            scale = scale_of(torch.tensor([number(row[0])]), Quant(element, (1, 32), "e8m0", rule))
            assert scale.item() - 127 == int(cell), (row[0], column)


def test_every_page_of_the_contract_is_linked():
    text = CONTRACT.read_text(encoding="utf-8")
    assert not [page.name for page in PAGES[1:] if f"(numerics/{page.name})" not in text]


def test_every_deviation_is_named():
    named = {
        k.numeric_deviation
        for kind in default_registry().backends
        for k in default_registry().kernels(kind)
        if k.numeric_deviation
    }
    assert not [numeric_deviation for numeric_deviation in named if numeric_deviation not in TEXT]
    assert ("No kernel of this version deviates" in TEXT) == (not named)
