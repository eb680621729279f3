"""Writes the generated parts of the documentation: ``python docs/generate.py [--check]``.

Generated: ``docs/matrix.md``, the matrix in ``README.md`` and the kernels in the pages of ``ROOMS``. The
devices are simulated, and the text holds no time and nothing of this machine, so that it is the same wherever
it is made.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import grimp

from quantport.checkpoint import CheckpointFormat
from quantport.device import Arch
from quantport.planning.capability_matrix import Cell, matrix
from quantport.plugins.registry import default_registry

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("cpu", "cuda", "xpu")  # whose pages list their kernels
TESTS = ROOT / "tests" / "plugins" / "formats"
WRITING = (TESTS / "test_writing.py", TESTS / "test_gguf_writing.py")
MARKS = {"native": "✅", "weight_only": "🟡", "dequantize": "🟠", "reference": "🔵", "unsupported": "❌"}
LEGEND = """\
| mark | status | what you get |
|---|---|---|
| ✅ | `native` | what was asked, by a kernel made for it |
| 🟡 | `weight_only` | the weights as asked, the activations in 16 bits |
| 🟠 | `dequantize` | what was asked, through a 16-bit copy of the weight at every call: saves memory, not time |
| 🔵 | `reference` | exact emulation: right and slow |
| ❌ | `unsupported` | nothing runs it |

Several marks in one cell: it depends on the architecture. `W8A16` means 8-bit weights and 16-bit activations."""
INTRO = f"""\
# The capability matrix

What each scheme gets on each architecture. This page is written by `docs/generate.py` from the same verdicts that decide
while a model loads; a test fails when it is stale. Ask for any part of it with `quantport matrix` or `quantport.matrix()`.
Every cell is for a 4096 x 4096 weight and one row of activations; a layer of another shape may get another answer, which
`quantport plan` gives.

{LEGEND}

A mark says what the code does, not that somebody saw it run. How we know is the *evidence* in the tables at the end:
`measured` (ran there, with a results file), `compiled` (machine code with the native instruction was made), `simulated`
(ran against the vendor's package over a simulated driver), `interpreted` (ran in Triton's interpreter), `declared` (a
vendor's document says so). Read `declared` as: it should work, and nobody has tried. [backends.md](backends.md) says
what each level asks for."""

EVERY = """\
## Every architecture

Schemes with the same answer share a row, for linear layers and MoE experts alike unless it says which."""

Group = tuple[str, Callable[[Arch], bool]]


def _of(kind: str, *families: str) -> Callable[[Arch], bool]:
    return lambda arch: arch.kind == kind and (not families or arch.family in families)


def _cpu(*prefixes: str) -> Callable[[Arch], bool]:
    return lambda arch: arch.kind == "cpu" and arch.name.startswith(prefixes)


README_ROWS: tuple[Group, ...] = (
    ("x86 CPU with VNNI or AMX", _cpu("x86_vnni", "x86_bf16", "x86_amx")),
    ("x86 CPU with AVX2 or AVX-512", _cpu("x86_avx")),
    ("Arm CPU", _cpu("arm")),
    ("NVIDIA Volta", _of("cuda", "Volta")),
    ("NVIDIA Turing, Ampere", _of("cuda", "Turing", "Ampere")),
    ("NVIDIA Ada, Hopper", _of("cuda", "Ada", "Hopper")),
    ("NVIDIA Blackwell", _of("cuda", "Blackwell")),
    ("AMD CDNA 1-3, RDNA 3", _of("rocm", "CDNA", "CDNA2", "CDNA3", "RDNA3", "RDNA3.5")),
    ("AMD CDNA 4, RDNA 4", _of("rocm", "CDNA4", "RDNA4")),
    ("Intel GPU up to Xe3", _of("xpu", "Xe-HPC", "Xe-HPG", "Xe2", "Xe3")),
    ("Intel GPU Xe3p", _of("xpu", "Xe3p")),
    ("Ascend NPU", _of("npu")),
)
README_SCHEMES = (
    "fp8_per_channel",
    "fp8_per_block",
    "int8",
    "mxfp8",
    "mxfp4",
    "nvfp4",
    "fp8_weight_only",
    "int8_weight_only",
    "int4_weight_only",
)
OMNI_ROWS: tuple[Group, ...] = (
    ("NVIDIA Blackwell (SM100+)", _of("cuda", "Blackwell")),
    ("NVIDIA Ada/Hopper (SM89+)", _of("cuda", "Ada", "Hopper")),
    ("NVIDIA Ampere (SM80+)", _of("cuda", "Ampere")),
    ("AMD ROCm", _of("rocm")),
    ("Intel XPU", _of("xpu")),
    ("Ascend NPU", _of("npu")),
)
VLLM_COLUMNS: tuple[Group, ...] = (
    *((name, _of("cuda", name)) for name in ("Volta", "Turing", "Ampere", "Ada", "Hopper")),
    ("AMD GPU", _of("rocm")),
    ("Intel GPU", _of("xpu")),
    ("x86 CPU", _cpu("x86")),
    ("Arm CPU", _cpu("arm")),
)


def fold(cells: Iterable[Cell]) -> str:
    """One text for the cells of several architectures and layer kinds: every outcome that occurs,
    best first.
    """
    found = {(str(c.choice.status), c.choice.precision) for c in cells}
    return " ".join(
        f"{MARKS[status]} {precision}".strip() for status, precision in sorted(found, key=_best_first)
    )


def _best_first(outcome: tuple[str, str]) -> int:
    return list(MARKS).index(outcome[0])


def _evidence(cells: Iterable[Cell]) -> str:
    return ", ".join(sorted({str(c.choice.claim.evidence) for c in cells if c.choice.claim}, reverse=True))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def by_family(cells: Sequence[Cell], groups: Sequence[Group], evidence: bool = False) -> str:
    """Groups down, schemes across."""
    schemes = list(dict.fromkeys(c.scheme for c in cells))
    rows = []
    for label, belongs in groups:
        here = [c for c in cells if belongs(c.arch)]
        tail = [_evidence(here)] if evidence else []
        rows.append([label, *(fold(c for c in here if c.scheme == s) for s in schemes), *tail])
    return table(["device", *(f"`{s}`" for s in schemes), *(["evidence"] if evidence else [])], rows)


def by_scheme(cells: Sequence[Cell], groups: Sequence[Group]) -> str:
    """Schemes down, groups across."""
    schemes = list(dict.fromkeys(c.scheme for c in cells))
    rows = [
        [f"`{s}`", *(fold(c for c in cells if c.scheme == s and belongs(c.arch)) for _, belongs in groups)]
        for s in schemes
    ]
    return table(["scheme", *(label for label, _ in groups)], rows)


def by_outcome(cells: Sequence[Cell]) -> str:
    """One row for the cells of an architecture that share everything but the scheme and the kind of layer."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        choice = cell.choice
        claim = f"{choice.claim.evidence}: {choice.claim.source}" if choice.claim else ""
        why = "; ".join(
            (
                *choice.reasons,
                *([f"deviates: {choice.numeric_deviation}"] if choice.numeric_deviation else []),
            )
        )
        mark = f"{MARKS[str(choice.status)]} {choice.precision}".strip()
        groups.setdefault(
            (f"`{cell.arch}` {cell.arch.title}", mark, f"`{choice.kernel}`", claim, why), []
        ).append(cell)
    rows = []
    for (arch, *outcome), here in groups.items():
        layers = {s: {c.layer for c in here if c.scheme == s} for s in dict.fromkeys(c.scheme for c in here)}
        names = ", ".join(
            f"`{s}`" + ("" if len(kinds) > 1 else f" ({min(kinds)})") for s, kinds in layers.items()
        )
        rows.append([arch, names, *outcome])
    return table(["device", "schemes", "effective", "kernel", "evidence", "reason"], rows)


def matrix_page() -> str:
    """``docs/matrix.md``."""
    cells = matrix()
    return (
        "\n\n".join(
            (
                INTRO,
                "## The rows of vLLM-Omni's page on online quantization\n\nLinear layers and MoE "
                "experts together.",
                by_scheme(cells, OMNI_ROWS),
                "## The columns of vLLM's table of supported hardware",
                by_scheme(cells, VLLM_COLUMNS),
                EVERY,
                by_outcome(cells),
            )
        )
        + "\n"
    )


def readme_block() -> str:
    """The matrix of ``README.md``: the schemes that most people ask for."""
    return by_family([c for c in matrix() if c.scheme in README_SCHEMES], README_ROWS, evidence=True)


def kernels_of(kind: str) -> str:
    """The kernels of a room, from their own words."""
    rows = []
    for kernel in default_registry().kernels(kind):
        known = default_registry().schemes.values()
        asked = [s for s in known if kernel.serves(s)] or [s.option(o) for s in known for o in s.options]
        serves = [f"`{s.name}`" for s in asked if kernel.serves(s)]
        said = (inspect.getdoc(type(kernel)) or "").partition("\n\n")[0].replace("\n", " ")
        every = len(serves) == len(default_registry().schemes) - 1
        rows.append(
            [
                f"`{kernel.name}`",
                "every quantized one" if every else ", ".join(serves),
                f"{kernel.tolerance:.1e}",
                said,
            ]
        )
    return table(["kernel", "schemes", "tolerance", "what it does"], rows)


def put(path: Path, name: str, block: str) -> str:
    """The text of a file with its block between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``
    replaced.
    """
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin, written by docs/generate.py -->\n", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{path}: no lines {begin!r} and {end!r}")
    return f"{before}{begin}{block}\n{end}{after}"


def house() -> str:
    """The import graph of core as a picture: an arrow to each part that another needs and that nothing it
    needs needs too.
    """
    graph = grimp.build_graph("quantport", cache_dir=None)
    parts = sorted(part for part in graph.find_children("quantport") if not part.endswith("__main__"))
    for part in parts:
        graph.squash_module(part)
    needs = {part: graph.find_modules_directly_imported_by(part) & set(parts) - {part} for part in parts}

    def below(part: str) -> set[str]:
        return needs[part].union(*map(below, needs[part]))

    arrows = [
        f"    {_short(part)} --> {_short(other)}"
        for part in parts
        for other in sorted(needs[part])
        if not any(other in below(between) for between in needs[part] - {other})
    ]
    return "\n".join(["```mermaid", "graph TD", *arrows, "```"])


def _short(part: str) -> str:
    return part.rpartition(".")[2]


def formats() -> str:
    """Every format of checkpoints, with the test of each thing that can be done with one."""
    rows = []
    for name, known in sorted(default_registry().formats.items()):
        test = TESTS / f"test_{type(known).__module__.rpartition('.')[2]}.py"
        tree = ast.parse(test.read_text(encoding="utf-8"))
        does = [_test_that_calls(tree, test, call) for call in ("keeps", "converts", "overlays")]
        if type(known).write is not CheckpointFormat.write:
            trees = ((ast.parse(path.read_text(encoding="utf-8")), path) for path in WRITING)
            links = (_test_that_calls(*found, name) for found in trees)
            written = next((link for link in links if link != "no"), "no")
        else:
            written = "-"
        library = next(
            (ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and _is_checked_by(n)),
            "",
        )
        rows.append((f"`{name}`", inspect.getdoc(type(known)).splitlines()[0], *does, written, library))
    return table(("format", "recognized by", "kept", "converted", "added to", "written", "checked by"), rows)


def _is_checked_by(node: ast.Assign) -> bool:
    return [ast.unparse(target) for target in node.targets] == ["CHECKED_BY"]


def _test_that_calls(tree: ast.Module, path: Path, word: str) -> str:
    """A link to the first test that calls a function, or names a format."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            inside = list(ast.walk(node))
            called = {n.func.id for n in inside if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            named = {n.value for n in inside if isinstance(n, ast.Constant)}
            if word in called | named:
                return f'[yes](../{path.relative_to(ROOT)} "{node.name}")'
    return "no"


def generated() -> dict[Path, str]:
    """Every file with generated parts, as it should be."""
    architecture, checkpoints = ROOT / "docs" / "architecture.md", ROOT / "docs" / "checkpoints.md"
    readme, rooms = ROOT / "README.md", {kind: ROOT / "backends" / kind / "README.md" for kind in ROOMS}
    return {
        ROOT / "docs" / "matrix.md": matrix_page(),
        readme: put(readme, "matrix", readme_block()),
        architecture: put(architecture, "imports", house()),
        checkpoints: put(checkpoints, "formats", formats()),
        **{room: put(room, "kernels", kernels_of(kind)) for kind, room in rooms.items()},
    }


def main(arguments: Sequence[str]) -> int:
    """Writes what is stale, or with ``--check`` names it and returns 1."""
    stale = {p: t for p, t in generated().items() if not p.exists() or p.read_text(encoding="utf-8") != t}
    for path, text in stale.items():
        sys.stdout.write(f"{'stale' if '--check' in arguments else 'wrote'}: {path.relative_to(ROOT)}\n")
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
