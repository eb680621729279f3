"""The documentation as data: its pages, and the blocks of each page with the comments that steer them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = sorted((ROOT / "backends").glob("*/README.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *ROOMS,
    *sorted((ROOT / "plugins").glob("*/README.md")),
]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!-- (\w+): ([^\n]+?) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Where it is.
        line: Its first line.
        kind: What follows the fence: ``python``, ``console``, ``golden``...
        text: What is in it.
        notes: Comments that stand right before it: ``skip``, ``file``, ``exit``, ``output``.
    """

    page: Path
    line: int
    kind: str
    text: str
    notes: dict[str, str]


def name(page: Path) -> str:
    """Path of a page from the root, for ids."""
    return str(page.relative_to(ROOT))


def blocks(page: Path, *kinds: str) -> list[Block]:
    """The fenced blocks of a page, those of some kinds only if any are given."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page, text.count("\n", 0, match.start(2)) + 1, match[1], match[2], _notes(text[: match.start()])
        )
        for match in _FENCE.finditer(text)
        if not kinds or match[1] in kinds
    ]


def _notes(before: str) -> dict[str, str]:
    notes = {}
    while found := _COMMENT.search(before):
        notes[found[1]] = found[2]
        before = before[: found.start()]
    return notes


def prose(page: Path) -> str:
    """A page without its blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))
