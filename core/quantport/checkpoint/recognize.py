"""Opens a checkpoint and finds the one format that recognizes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from quantport.checkpoint import limits
from quantport.checkpoint.format import CheckpointFormat, Recognized
from quantport.checkpoint.plain_format import PlainFormat, not_recognized
from quantport.checkpoint.quantport_format import QuantportFormat
from quantport.checkpoint.reader import Checkpoint
from quantport.checkpoint.source import TensorSource
from quantport.errors import BackendError, CheckpointError, QuantportError
from quantport.scheme.catalog import Schemes

BUILTIN_FORMATS: tuple[CheckpointFormat, ...] = (QuantportFormat(),)
_PLAIN = PlainFormat()
T = TypeVar("T")


def open_source(
    path: Path, formats: Sequence[CheckpointFormat], *, headers_only: bool = False
) -> TensorSource:
    """Opens files: by the first format that has a reader for them, or as safetensors.

    Raises:
        CheckpointError: as `Checkpoint.open`.
        BackendError: a format raised.
    """
    for known in formats:
        source = _guarded(known, f"open {path}", partial(known.open, path, headers_only=headers_only))
        if source is not None:
            return source
    return Checkpoint.open(path, headers_only=headers_only)


def recognize(
    source: TensorSource, config: Mapping[str, Any], schemes: Schemes, formats: Sequence[CheckpointFormat]
) -> Recognized:
    """What a checkpoint holds, as the one format that recognizes it says; without one, as it is stored.

    Args:
        source: The tensors.
        config: ``config.json``; empty where there is none.
        schemes: Every scheme that is known.
        formats: Every format but the plain one.

    Raises:
        CheckpointError: several formats recognize it, it is beyond the limits, or somebody quantized it and
            none of the formats recognizes it.
        BackendError: a format raised.
    """
    asked = f"open the checkpoint {source.directory}"
    limits.check_tensors(source.tensors, asked)
    answers = [_guarded(f, asked, partial(f.recognize, source, config, schemes)) for f in formats]
    claims = [claim for claim in answers if claim is not None]
    if len(claims) > 1:
        raise CheckpointError(
            asked,
            f"{len(claims)} formats recognize it: {', '.join(claim.format_name for claim in claims)}",
            "one of them: uninstall the plugin that is wrong",
        )
    claim = claims[0] if claims else _PLAIN.recognize(source, config, schemes)
    if claim is None:
        raise not_recognized(source, config)
    return claim


def _guarded(candidate: CheckpointFormat, asked: str, call: Callable[[], T]) -> T:
    """Calls a format; whatever a stranger's raises names it."""
    try:
        return call()
    except QuantportError:
        raise
    except Exception as error:  # a stranger's code
        found = f"format {candidate.name!r} raised {type(error).__name__}: {error}"
        raise BackendError(asked, found, "uninstall or mend the plugin that brings the format") from error
