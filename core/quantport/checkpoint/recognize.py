"""Opens a checkpoint and finds the one format that recognizes it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from quantport.checkpoint import limits
from quantport.checkpoint.format import CheckpointFormat, Recognized
from quantport.checkpoint.layout import holds_safetensors
from quantport.checkpoint.plain_format import PlainFormat, not_recognized
from quantport.checkpoint.quantport_format import QuantportFormat
from quantport.checkpoint.reader import Checkpoint
from quantport.checkpoint.source import TensorSource
from quantport.errors import CheckpointError, QuantportError, shown
from quantport.scheme.catalog import Schemes

BUILTIN_FORMATS: tuple[CheckpointFormat, ...] = (QuantportFormat(),)
_PLAIN = PlainFormat()
T = TypeVar("T")
Failures = list[tuple[CheckpointFormat, str]]


def open_source(
    path: Path, formats: Sequence[CheckpointFormat], *, headers_only: bool = False
) -> tuple[TensorSource, Sequence[CheckpointFormat]]:
    """Opens files: as safetensors where there are some, else by the first format that has a reader for them.

    A format that raises is set aside, by name; it does not stop the others.

    Returns:
        The tensors, and the formats that may recognize them: all but those that were set aside.

    Raises:
        CheckpointError: as `Checkpoint.open`.
    """
    failed: Failures = []
    source = None if holds_safetensors(path) else _open(path, formats, headers_only, failed)
    if source is not None:
        return source, [other for other in formats if all(other is not bad for bad, _ in failed)]
    try:
        return Checkpoint.open(path, headers_only=headers_only), formats
    except CheckpointError as error:
        raise _after(failed, error) from None


def open_by_format(
    path: Path, formats: Sequence[CheckpointFormat], *, headers_only: bool = False
) -> TensorSource | None:
    """Opens files that are no safetensors by the first format that has a reader for them; None without one.

    Raises:
        CheckpointError: they are of that format, and malformed.
    """
    return None if holds_safetensors(path) else _open(path, formats, headers_only, [])


def _open(
    path: Path, formats: Sequence[CheckpointFormat], headers_only: bool, failed: Failures
) -> TensorSource | None:
    for known in formats:
        call = partial(known.open, path, headers_only=headers_only)
        source = _guarded(known, f"open {path}", call, TensorSource, failed)
        if source is not None:
            opened: TensorSource = source
            return opened
    return None


def recognize(
    source: TensorSource, config: Mapping[str, Any], schemes: Schemes, formats: Sequence[CheckpointFormat]
) -> Recognized:
    """What a checkpoint holds, as the one format that recognizes it says; without one, as it is stored.

    Formats of quantport are asked first. A format of others that raises is set aside, by name.

    Args:
        source: The tensors.
        config: ``config.json``; empty where there is none.
        schemes: Every scheme that is known.
        formats: Every format but the plain one.

    Raises:
        CheckpointError: several formats recognize it, it is beyond the limits, or somebody quantized it and
            none of the formats recognizes it.
    """
    asked = f"open the checkpoint {source.directory}"
    limits.check_tensors(source.tensors, asked)
    failed: Failures = []
    ours = [known for known in formats if known in BUILTIN_FORMATS]
    for group in (ours, [known for known in formats if known not in ours]):
        calls = [(known, partial(known.recognize, source, config, schemes)) for known in group]
        answers = [_guarded(known, asked, call, Recognized, failed) for known, call in calls]
        claims = [claim for claim in answers if claim is not None]
        if len(claims) > 1:
            raise CheckpointError(
                asked,
                f"{len(claims)} formats recognize it: {', '.join(claim.format_name for claim in claims)}",
                "one of them: uninstall the plugin that is wrong",
            )
        if claims:
            return claims[0]
    claim = _PLAIN.recognize(source, config, schemes)
    if claim is None:
        raise _after(failed, not_recognized(source, config))
    return claim


def _guarded(
    candidate: CheckpointFormat, asked: str, call: Callable[[], T | None], kind: Any, failed: Failures
) -> T | None:
    """Asks a format for a ``kind``. One of a stranger that raises, or returns nonsense, has no answer.

    What it raises as a `QuantportError` is its answer: the checkpoint is of this format, and malformed.
    """
    try:
        answer = call()
        if answer is not None and not isinstance(answer, kind):
            raise TypeError(f"it returned {shown(answer)}, no {kind.__name__}")
    except QuantportError:
        raise
    except (Exception, SystemExit) as error:  # a stranger's code
        if candidate in BUILTIN_FORMATS:
            raise
        said = f"format {candidate.name!r} raised {type(error).__name__}: {error}"
        failed.append((candidate, said))
        warnings.warn(f"{asked}: {said}; it is not asked", RuntimeWarning, stacklevel=5)
        return None
    return answer


def _after(failed: Failures, error: CheckpointError) -> CheckpointError:
    """The error of a checkpoint that nobody opens, with the formats that might have."""
    if not failed:
        return error
    found = f"{error.found}; and {'; '.join(said for _, said in failed)}"
    return CheckpointError(
        error.asked, found, f"{error.suggestion}; or mend the plugin that brings the format"
    )
