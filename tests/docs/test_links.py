"""Links lead somewhere, and everything that has a public name is in the documentation."""

from __future__ import annotations

import re

import pytest
import typer
from docs_pages import PAGES, ROOT, blocks, name, prose

import quantport
import quantport.backend
import quantport.engine
from quantport import errors
from quantport.cli.app import app
from quantport.config import QuantConfig
from quantport.config.vllm_keys import OTHER_KEYS
from quantport.kernels.verdict import Evidence, Status
from quantport.plugins import hookspecs
from quantport.plugins.registry import default_registry

# written by `make bench`: links into it may lead nowhere until it has run once
RESULTS = ROOT / "benchmarks" / "results"
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
LOADING, BACKENDS, MATRIX, CLI, ENGINES = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("loading", "backends", "matrix", "cli", "engines")
)
ALL = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "matrix.md")


def anchors(page) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page):
    broken = []
    for link in _LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if path.startswith(("http:", "https:")) or (
            RESULTS in (target, *target.parents) and not any(RESULTS.glob("*.md"))
        ):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_in_the_index():
    links = set(_LINK.findall(prose(ROOT / "docs" / "index.md")))
    assert {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"} <= links


COMMAND = typer.main.get_command(app)
FIELDS = list(QuantConfig.model_fields)
ERRORS = [n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.QuantportError)]
PUBLIC = {
    "public name": (quantport.__all__, ALL),
    "name for authors": (quantport.backend.__all__, BACKENDS),
    "name for engines": (quantport.engine.__all__, ENGINES),
    "command": ([f"## {c}" for c in COMMAND.commands], CLI),
    "config key": ([f"| `{f}` |" for f in FIELDS], LOADING),
    "other config key": ([f"`{k}`" for k in OTHER_KEYS], LOADING),
    "hook": ([n for n in vars(hookspecs) if n.startswith("quantport_")], BACKENDS),
    "error": (ERRORS, LOADING),
    "scheme": ([f"`{n}`" for s in default_registry().schemes.values() for n in (s.name, *s.aliases)], ALL),
    "evidence": ([f"`{e}`" for e in Evidence], BACKENDS),
    "status": ([f"`{s}`" for s in Status], MATRIX),
    "backend": ([f"backends/{k}" for k in default_registry().backends], ALL),
    "variable": (["QUANTPORT_BACKENDS", "QUANTPORT_DEVICE"], LOADING),
}


@pytest.mark.parametrize("what", PUBLIC)
def test_everything_is_documented(what):
    names, text = PUBLIC[what]
    assert names
    absent = [
        n for n in names if (n not in text if not n.isidentifier() else not re.search(rf"\b{n}\b", text))
    ]
    assert not absent


def test_every_option_is_documented():
    options = {
        o
        for c in (COMMAND, *COMMAND.commands.values())
        for p in c.params
        for o in p.opts
        if o.startswith("--")
    }
    assert not sorted(o for o in options - {"--help"} if f"`{o}" not in CLI and f"quantport {o}" not in CLI)


def test_readme_is_short_and_its_example_too():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    (example, *_) = blocks(ROOT / "README.md", "python")
    assert len([line for line in example.text.splitlines() if line]) <= 8


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tone(page):
    """Plain words, and no mark but those of the matrix."""
    text = page.read_text(encoding="utf-8")
    shouting = re.findall(
        r"(?i)\b(blazing\w*|seamless\w*|cutting-edge|revolutionary|effortless\w*|state-of-the-art)\b", text
    )
    symbols = set(re.findall(r"[\u2600-\u27bf\U0001f300-\U0001faff]", text)) - set("✅🟡🟠🔵❌")
    assert not shouting
    assert not symbols
