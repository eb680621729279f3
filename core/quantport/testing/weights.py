"""Weights as the reference stores them, made once for all checks: whoever hands them on copies them."""

from __future__ import annotations

from functools import lru_cache

import torch

from quantport import numerics
from quantport.kernels.base import StoredWeight, WeightSpec
from quantport.scheme.scheme import INPUT_SCALE, INPUT_ZERO
from quantport.testing import cases


@lru_cache(maxsize=512)
def plain(spec: WeightSpec) -> StoredWeight:
    """An ordinary weight; beside it, where the scheme has one, a scale of activations that some exceed."""
    stored = numerics.quantize_weight(cases.plain(spec.n, spec.k), spec.scheme.per_token)
    inputs = {INPUT_SCALE: 2.0**-5, INPUT_ZERO: -9}
    further = {key: spec.scheme.layout(spec.n, spec.k).get(key) for key in inputs}
    return stored | {
        key: torch.full(held[0], inputs[key], dtype=held[1], device="cpu")
        for key, held in further.items()
        if held
    }


@lru_cache(maxsize=1024)
def special(spec: WeightSpec, name: str) -> StoredWeight:
    """A weight of ``cases.SPECIAL``."""
    return numerics.quantize_weight(cases.SPECIAL[name](spec.n, spec.k), spec.scheme)


@lru_cache(maxsize=512)
def normal(spec: WeightSpec, seed: int, scale: float, mean: float) -> StoredWeight:
    """Normal numbers of a standard deviation and a mean."""
    return numerics.quantize_weight(
        (cases.random(spec.n, spec.k, seed=seed) * scale + mean).to(torch.bfloat16), spec.scheme
    )
