"""Every exception of quantport. Each message has three parts: what was asked, what was found, what to try."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class QuantportError(Exception):
    """Base of all errors that quantport raises on purpose.

    Args:
        asked: What the caller asked for.
        found: What quantport found instead.
        suggestion: What would work; the message says it after ``try``.
    """

    def __init__(self, asked: str, found: str, suggestion: str) -> None:
        super().__init__(asked, found, suggestion)
        self.asked, self.found, self.suggestion = asked, found, suggestion

    def __str__(self) -> str:
        return f"asked: {self.asked}\nfound: {self.found}\ntry: {self.suggestion}"


class ConfigError(QuantportError, ValueError):
    """A configuration, a scheme name or a pattern is wrong."""


class CheckpointError(QuantportError, ValueError):
    """A checkpoint is truncated, lies in its header, misses a file, or is quantized already."""


class WeightError(QuantportError, ValueError):
    """A weight cannot be quantized: not finite, wrong dtype, wrong rank."""


class ShapeError(QuantportError, RuntimeError):
    """Activations of another width than the layer takes; a RuntimeError, as torch.nn.Linear raises."""


class RoutingError(QuantportError, IndexError):
    """Tokens are routed to experts that a layer does not have, or to rows that are not there."""


class DeviceError(QuantportError, ValueError):
    """A device or an architecture is unknown, or is not there."""


class UnsupportedError(QuantportError):
    """No kernel of the device can run what was asked, under the fallback policy that was asked."""


class NoTensorError(UnsupportedError, AttributeError):
    """Code wants the 16-bit weight of a quantized layer as a tensor, and there is none."""


class BackendError(QuantportError):
    """A backend or a plugin broke the contract, or raised where it must not."""


class SaveError(QuantportError, OSError):
    """A checkpoint could not be written; nothing was left behind under its final name."""


class BudgetError(QuantportError, MemoryError):
    """The plan does not fit in the memory of the device (predicted, before any weight is read)."""


class RankError(QuantportError, RuntimeError):
    """Another rank has failed, or does not answer: what all ranks do together is done by none."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ``"did you mean 'x'? "`` for the closest known name, or an empty string."""
    lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.5)
    return f"did you mean {lower[close[0]]!r}? " if close else ""


def one_of(name: str, known: Iterable[str]) -> str:
    """Returns what to try for an unknown name: the closest known one, then all of them."""
    names = list(known)
    return f"{did_you_mean(name, names)}known: {', '.join(names) or 'none'}"


_NEEDED = {
    "bool": "true or false",
    "dict": "an object",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "model": "an object",
    "string": "a text",
    "tuple": "a list",
}


def needed(detail: Mapping[str, Any]) -> str:
    """Returns what a value should have been, in our words, of one member of ``ValidationError.errors()``."""
    kind, context = str(detail["type"]), detail.get("ctx", {})
    if kind == "literal_error":
        return f"one of {context['expected']}"
    for bound, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
        if bound in context:
            return f"a number of {words} {context[bound]:,}"
    if kind in ("too_long", "too_short"):
        count = context.get("min_length", context.get("max_length"))
        return f"{'at least' if kind == 'too_short' else 'at most'} {count} members"
    if kind in ("missing", "extra_forbidden"):
        return "a key that is there" if kind == "missing" else "no such key"
    if kind == "none_required":
        return "null"
    return _NEEDED.get(kind.split("_")[0], "a value of another kind")


def shown(value: object, limit: int = 80) -> str:
    """Returns a value as an error names it, cut where it is long."""
    try:
        text = repr(value)
    except Exception:  # a stranger's, or a number of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."
