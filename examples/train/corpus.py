"""Build the training, validation and evaluation text from the Python installation.

Every byte comes from files that ship with CPython: the language reference bundled
as ``pydoc_data.topics`` plus the docstrings and comment blocks of the standard
library. Sources are visited in a fixed order, so the text depends only on the
Python version.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import io
import itertools
import random
import re
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

RECORDED_PYTHON = "3.11.7"
RECORDED_SHA256 = "e7981be3fccf825bd602a336e58ad4fae63b996af2aa8258bc2bea1e4fa90721"

# Whole topics kept out of training. EVAL_TOPICS become examples/models/eval.txt;
# VALID_TOPICS and VALID_MODULES are used to choose hyper-parameters.
EVAL_TOPICS = (
    "execmodel",
    "import",
    "exceptions",
    "assignment",
    "comparisons",
    "strings",
    "calls",
    "objects",
    "identifiers",
    "raise",
    "binary",
    "global",
    "subscriptions",
    "slicings",
    "assert",
    "atom-identifiers",
    "integers",
    "exprlists",
    "attribute-references",
)
VALID_TOPICS = ("typesmapping", "with", "async", "return", "del", "power", "booleans")
VALID_MODULES = ("heapq.py", "shelve.py", "textwrap.py", "sched.py", "contextlib.py")

SKIPPED_PARTS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "pydoc_data",
        "turtledemo",
        "encodings",
        "__pycache__",
    }
)

# Extension modules whose docstrings exist only at run time.
EXTENSION_MODULES = (
    "builtins",
    "_abc",
    "_asyncio",
    "_bisect",
    "_codecs",
    "_collections",
    "_csv",
    "_datetime",
    "_elementtree",
    "_functools",
    "_heapq",
    "_imp",
    "_io",
    "_json",
    "_operator",
    "_pickle",
    "_random",
    "_signal",
    "_socket",
    "_struct",
    "_thread",
    "_tracemalloc",
    "_warnings",
    "_weakref",
    "array",
    "atexit",
    "binascii",
    "cmath",
    "gc",
    "itertools",
    "marshal",
    "math",
    "select",
    "sys",
    "time",
    "unicodedata",
    "zlib",
)

SHINGLE_WORDS = 12
MIN_SHINGLE_WORDS = 6
TOPIC_REPEATS = 2
MIN_DOCUMENT_CHARS = 60


@dataclass(frozen=True)
class Corpus:
    """The text splits.

    Attributes:
        train: Training documents in training order.
        valid: Validation documents, disjoint from training.
        evaluation: Held-out evaluation text (one string, the contents of eval.txt).
    """

    train: list[str]
    valid: list[str]
    evaluation: str

    def sha256(self) -> str:
        """Return the SHA-256 of the training documents joined by NUL bytes."""
        return hashlib.sha256("\0".join(self.train).encode("utf-8")).hexdigest()


def _is_code(line: str) -> bool:
    return bool(re.search(r"::=|>>>|^\s*(\.\.\.|[|+])|[=:;{(]$|  \S+  |[-=~*_.]{6}", line))


def reflow(paragraph: str) -> str:
    """Join the hard-wrapped lines of a prose paragraph, leaving code alone.

    Args:
        paragraph: Text without blank lines.

    Returns:
        The paragraph with each wrapped sentence on a single line.
    """
    lines = [line.rstrip() for line in paragraph.expandtabs(4).split("\n")]
    merged = [lines[0]]
    for previous, line in itertools.pairwise(lines):
        bullet = re.match(r"\s*([*+-]|\d+[.)]|o|:\w+.*:|@\w+.*:)\s", line)
        indent = len(line) - len(line.lstrip())
        last_indent = len(previous) - len(previous.lstrip())
        hanging = indent == last_indent or re.match(r"\s*([*+-]|\d+[.)]|:\w+|@\w+)", previous)
        wrapped = len(previous) >= 52 and hanging and not bullet
        if wrapped and not _is_code(previous) and not _is_code(line):
            merged[-1] += " " + line.strip()
        else:
            merged.append(line)
    return "\n".join(merged)


def _is_prose(paragraph: str) -> bool:
    """Tell prose from listings, tables and session transcripts."""
    if ">>>" in paragraph or not paragraph.strip():
        return False
    dense = re.sub(r"\s+", " ", paragraph)
    plain = sum(c.isalpha() or c in " ,.'\"\n" for c in dense)
    return plain / len(dense) > 0.80


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")):
        if paragraph.strip():
            yield reflow(paragraph.strip("\n"))


def _topic_document(name: str) -> list[str]:
    """Return a topic's paragraphs, code samples included (they are short)."""
    return [p for p in _paragraphs(topics[name]) if "\x00" not in p]


def _comment_blocks(source: str) -> Iterator[str]:
    """Yield runs of three or more consecutive full-line comments."""
    block: list[str] = []
    last_row = -2
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return
    for token in tokens:
        if token.type != tokenize.COMMENT or token.line.strip() != token.string:
            continue
        if token.start[0] != last_row + 1 and block:
            if len(block) > 2:
                yield textwrap.dedent("\n".join(block))
            block = []
        last_row = token.start[0]
        block.append(token.string.lstrip("#").rstrip().removeprefix(" "))
    if len(block) > 2:
        yield textwrap.dedent("\n".join(block))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Yield docstrings in source order."""
    nodes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    for node in nodes:
        text = ast.get_docstring(node)
        if text:
            yield text


def _module_documents(path: Path) -> Iterator[list[str]]:
    source = path.read_text(encoding="utf-8", errors="replace")
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for text in (*_docstrings(tree), *_comment_blocks(source)):
        kept = [p for p in _paragraphs(text) if _is_prose(p)]
        if kept:
            yield kept


def _extension_documents(name: str) -> Iterator[list[str]]:
    """Yield the docstrings of a C extension module and of its classes and functions."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return
    owners = [module, *(m for _, m in sorted(vars(module).items()) if isinstance(m, type))]
    for owner in owners:
        members = [m for key, m in sorted(vars(owner).items()) if not key.startswith("__")]
        for item in (owner, *members):
            text = item.__doc__ if callable(item) or item is module else None
            if isinstance(text, str):
                kept = [p for p in _paragraphs(inspect.cleandoc(text)) if _is_prose(p)]
                if kept:
                    yield kept


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [
        root / name
        for name in names
        if not SKIPPED_PARTS.intersection(name.split("/"))
        and not name.startswith(("_sysconfigdata", "config-"))
    ]


def _shingles(paragraph: str) -> set[str]:
    """Return the word n-grams that identify a paragraph (none for headings)."""
    words = re.findall(r"\w+", paragraph.lower())
    if len(words) < MIN_SHINGLE_WORDS:
        return set()
    width = min(SHINGLE_WORDS, len(words))
    return {" ".join(words[i : i + width]) for i in range(len(words) - width + 1)}


def _remove_seen(documents: Iterable[list[str]], seen: set[str]) -> list[list[str]]:
    """Drop paragraphs sharing a long word n-gram with `seen`, then add the rest to it."""
    result = []
    for document in documents:
        kept = []
        for paragraph in document:
            shingles = _shingles(paragraph)
            if not shingles & seen:
                kept.append(paragraph)
                seen |= shingles
        if sum(map(len, kept)) >= MIN_DOCUMENT_CHARS:
            result.append(kept)
    return result


def build_corpus() -> Corpus:
    """Build all splits.

    The evaluation topics are read first, then validation, then training; a paragraph
    that repeats a twelve-word run already seen is dropped, so no evaluation passage can
    reach the other splits through a topic that quotes it.

    Returns:
        The three splits.
    """
    seen: set[str] = set()
    root = Path(sysconfig.get_paths()["stdlib"])
    evaluation = _remove_seen((_topic_document(name) for name in EVAL_TOPICS), seen)
    valid_sources = [_topic_document(name) for name in VALID_TOPICS]
    for name in VALID_MODULES:
        valid_sources.extend(_module_documents(root / name))
    valid = _remove_seen(valid_sources, seen)

    held_out = {*EVAL_TOPICS, *VALID_TOPICS}
    # Short topics first: the long ones are unions of the short ones.
    names = sorted((n for n in topics if n not in held_out), key=lambda n: (len(topics[n]), n))
    reference = _remove_seen((_topic_document(name) for name in names), seen)
    library: list[list[str]] = []
    for path in _stdlib_files():
        if path.relative_to(root).as_posix() not in VALID_MODULES:
            library.extend(_remove_seen(_module_documents(path), seen))
    for name in EXTENSION_MODULES:
        library.extend(_remove_seen(_extension_documents(name), seen))

    train = ["\n\n".join(d) for d in reference * TOPIC_REPEATS + library]
    random.Random(1234).shuffle(train)
    return Corpus(
        train=train,
        valid=["\n\n".join(d) for d in valid],
        evaluation="\n\n\n".join("\n\n".join(d) for d in evaluation) + "\n",
    )


def main() -> None:
    """Write the evaluation text and print the sizes of the splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write-eval", type=Path, help="write the evaluation text here")
    args = parser.parse_args()
    corpus = build_corpus()
    print(f"train: {len(corpus.train)} documents, {sum(map(len, corpus.train))} characters")
    print(f"valid: {len(corpus.valid)} documents, {sum(map(len, corpus.valid))} characters")
    print(f"evaluation: {len(corpus.evaluation)} characters")
    print(f"sha256 of the training text: {corpus.sha256()}")
    if args.write_eval:
        args.write_eval.write_text(corpus.evaluation, encoding="utf-8")


if __name__ == "__main__":
    main()
