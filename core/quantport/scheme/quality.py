"""What schemes cost in quality, as measured on a real model: how far its answers are from those of 16 bits.

``measured_quality.json`` has the divergence of every scheme and option, and of what it was measured.
``benchmarks/quality_real.py`` writes it; ``docs/quality.md`` explains it. It is one model of 135 million
parameters: others lose other amounts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from importlib.resources import files
from typing import Any

from quantport.scheme.catalog import BUILTIN
from quantport.scheme.quant import Quant
from quantport.scheme.scheme import Scheme

NEAR_LOSSLESS, NOTICEABLE = 0.05, 0.25
"""Largest divergence of the two better classes, nats per token."""

_Numbers = tuple[Quant, Quant | None, int]


class QualityClass(str, Enum):
    """How much of a model's answers a scheme changes: KL divergence of the next-token distribution from that
    of the 16-bit model, up to 0.05 nats, up to 0.25, and above.
    """

    NEAR_LOSSLESS = "near-lossless"
    NOTICEABLE = "noticeable loss"
    SEVERE = "severe loss"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Quality:
    """What a scheme was measured to cost.

    Attributes:
        kl: Mean divergence of the next-token distribution from the 16-bit model's, nats.
        kl_se: Its standard error.
        perplexity: Relative change of the perplexity: 0.01 is one percent worse.
        model: The model that it was measured on.
    """

    kl: float
    kl_se: float
    perplexity: float
    model: str

    @property
    def quality_class(self) -> QualityClass:
        """The class that the divergence falls into."""
        if self.kl <= NEAR_LOSSLESS:
            return QualityClass.NEAR_LOSSLESS
        return QualityClass.NOTICEABLE if self.kl <= NOTICEABLE else QualityClass.SEVERE

    def __str__(self) -> str:
        return f"{self.quality_class} (KL {self.kl:.2g}, perplexity {self.perplexity:+.1%} on {self.model})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "class": str(self.quality_class),
            "kl": self.kl,
            "kl_se": self.kl_se,
            "perplexity": self.perplexity,
            "model": self.model,
        }


def measured_quality(scheme: Scheme) -> Quality | None:
    """What the numbers of a scheme cost on a real model. A weight-only variant (``scheme.weight_only``) is
    looked up as what it is, whatever its name.

    Returns:
        None where that is not known: a scheme from outside, a solver of one's own, or ``q4_k``, of whose
        numbers the model was made.
    """
    return None if scheme.solver else _measured().get(_numbers(scheme))


def _numbers(scheme: Scheme) -> _Numbers:
    return scheme.weight, scheme.activation, scheme.rotation


@cache
def _measured() -> Mapping[_Numbers, Quality]:
    text = (files("quantport.scheme") / "measured_quality.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return {
        _numbers(_named(name)): Quality(**values, model=data["model"])
        for name, values in data["schemes"].items()
    }


def _named(name: str) -> Scheme:
    """``NAME:16`` leaves activations in 16 bits."""
    base = name.removesuffix(":16")
    return BUILTIN[name] if base == name else replace(BUILTIN[base], activation=None)
