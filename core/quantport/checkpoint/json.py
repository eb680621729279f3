"""The one reader of the JSON of a checkpoint: ``config.json``, the index, ``quantport.json`` and headers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from quantport.checkpoint import limits
from quantport.errors import CheckpointError


class _DuplicateKeyError(ValueError):
    """A JSON object names a key twice."""


def read_config(directory: Path) -> dict[str, Any]:
    """Reads ``config.json`` of a model; an absent file is an empty object.

    Raises:
        CheckpointError: as `read_json`, or it claims more layers or experts than there can be.
    """
    path = directory / "config.json"
    config = read_json(path, values=limits.MAX_CONFIG_VALUES)
    limits.check_config(config, f"read {path}")
    return config


def read_json(
    path: Path, asked: str = "", suggestion: str = "a JSON object", values: int = limits.MAX_JSON_VALUES
) -> dict[str, Any]:
    """Reads a JSON object from a file; an absent file is an empty one.

    Args:
        path: The file.
        asked: For errors; by default, reading it.
        suggestion: For errors.
        values: At most so many, of objects and lists at any depth.

    Raises:
        CheckpointError: it cannot be read, is too large, or is no JSON object with each key once.
    """
    asked = asked or f"read {path}"
    if not path.exists():
        return {}
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            limits.within(asked, "bytes of JSON", size, limits.MAX_JSON_BYTES)
            raw = file.read(size + 1)
    except OSError as error:
        raise CheckpointError(asked, str(error), "a file that you may read") from error
    return parse_object(raw, asked, "a file", suggestion, constants=True, values=values)


def parse_object(
    raw: bytes,
    asked: str,
    what: str,
    suggestion: str,
    *,
    constants: bool = False,
    values: int = limits.MAX_JSON_VALUES,
) -> dict[str, Any]:
    """Parses a JSON object in which each key is there once and every text is valid Unicode.

    Args:
        raw: UTF-8.
        asked: For errors.
        what: What it is the text of, for errors: ``a header``.
        suggestion: For errors.
        constants: Take ``NaN`` and ``Infinity``, as Python writes them.
        values: At most so many, of objects and lists at any depth.

    Raises:
        CheckpointError: it is none, or beyond the limits.
    """
    limits.check_json_text(raw, asked, values)
    try:
        text = raw.decode("utf-8")
        constant = None if constants else _refuse_constant
        value = json.loads(text, object_pairs_hook=_unique_pairs, parse_constant=constant)
        if "\\u" in text:  # only an escape can smuggle in half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _DuplicateKeyError as error:
        raise CheckpointError(asked, f"{error} in {what}", f"{suggestion}, with each name once") from error
    except UnicodeError as error:
        reason = error.reason if isinstance(error, UnicodeDecodeError) else error
        raise CheckpointError(asked, f"{what} that is not UTF-8 ({reason})", suggestion) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(asked, f"{what} that is not JSON ({str(error)[:200]})", suggestion) from error
    if type(value) is not dict:
        found = f"{what} that is a JSON {type(value).__name__}, not an object"
        raise CheckpointError(asked, found, suggestion)
    limits.check_json_depth(value, asked)
    return value


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _DuplicateKeyError(f"the name {twice!r} twice")
    return unique


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")
