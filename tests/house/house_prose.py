"""Finds code that decides by what people read: texts of reasons, notes and summaries are compared nowhere."""

from __future__ import annotations

import ast

import house_source as house

PROSE = {
    "text",
    "note",
    "notes",
    "reason",
    "reasons",
    "skip_reason",
    "summary",
    "slow",
    "found",
    "suggestion",
}
SEARCHES = {"startswith", "endswith", "find", "index", "count", "match", "search", "fullmatch"}
COMPARISONS = (ast.In, ast.NotIn, ast.Eq, ast.NotEq)


def findings(path):
    """(line, source) of every comparison or search of prose; ``is`` compares codes, and may."""
    for node in ast.walk(house.tree(path)):
        if isinstance(node, ast.Compare):
            compares = any(isinstance(op, COMPARISONS) for op in node.ops)
            hit = compares and any(_is_prose(side) for side in (node.left, *node.comparators))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            searches = node.func.attr in SEARCHES
            hit = searches and any(_is_prose(side) for side in (node.func.value, *node.args))
        else:
            hit = False
        if hit:
            yield node.lineno, ast.unparse(node)


def _is_prose(node):
    """``x.text``, also inside ``str(...)``, of what methods such as ``lower`` make of it, and of an item."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id == "str" and len(node.args) == 1 and _is_prose(node.args[0])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _is_prose(node.func.value)
    if isinstance(node, ast.Subscript):
        return _is_prose(node.value)
    return isinstance(node, ast.Attribute) and node.attr in PROSE
