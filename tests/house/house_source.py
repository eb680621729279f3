"""The source of the house as data: its files, rooms, tokens and syntax trees."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "quantport"
SHIPPED = ("core", "backends", "plugins")
INTEGRATIONS = {
    "transformers",
    "diffusers",
}  # rooms of plugins that users of another library import: quantport does not
NO_DEVICE = {"triton"}  # rooms that other rooms use, with no device of their own


def files(*folders):
    """Every Python file of these folders."""
    return sorted(p for f in folders for p in (ROOT / f).rglob("*.py"))


def rooms():
    """Name -> folder of each room under backends/."""
    return {
        p.name: p for p in sorted((ROOT / "backends").iterdir()) if any(p.glob("quantport_*/__init__.py"))
    }


def packages():
    """Import names of everything that is not the core: rooms and plugins."""
    return sorted({p.parent.name for f in SHIPPED[1:] for p in (ROOT / f).glob("*/quantport_*/__init__.py")})


def entry_points(group):
    """Entry points of a group in pyproject.toml, without a TOML parser where Python has none."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if tomllib is not None:
        return tomllib.loads(text)["project"]["entry-points"].get(group, {})
    section = re.search(rf'\[project\.entry-points\."{re.escape(group)}"\]\n((?:\S.*=.*\n)+)', text)
    return dict(re.findall(r'(\S+) = "(\S+)"', section[1])) if section else {}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def docstring_lines(path):
    """Lines that belong to docstrings."""
    lines = set()
    for node in ast.walk(tree(path)):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            lines |= set(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
    return lines


def words(path):
    """(line, word) of every identifier and of every word in a string that is no docstring; comments are left
    out.
    """
    skip = docstring_lines(path)
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE) and token.start[0] not in skip:
            for word in re.findall(r"[A-Za-z][A-Za-z0-9]*", token.string):
                yield token.start[0], word.lower()


def imports(path):
    """(line, module) of every import, at any depth; ``.`` in front of relative ones and ``*`` after star
    imports.
    """
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            star = ".*" if any(alias.name == "*" for alias in node.names) else ""
            yield node.lineno, "." * node.level + (node.module or "") + star
            yield from (
                (node.lineno, f"{node.module}.{alias.name}")
                for alias in node.names
                if not star and not node.level
            )


def functions(path):
    """(line, name, length) of every function; a docstring does not count."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            yield node.lineno, node.name, (node.end_lineno or 0) - body[0].lineno + 1


def where(path, line):
    return f"{path.relative_to(ROOT)}:{line}"
