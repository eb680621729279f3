"""What a plan says of the tensors of a checkpoint beside its steps: what is not loaded, what is converted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from quantport.model.layers import Layer
from quantport.model.roles import SkipCode

_NO_PLACE = (SkipCode.NO_MODULE, SkipCode.BEYOND_CONFIG)


def notices(layers: Iterable[Layer]) -> tuple[str, ...]:
    """Texts for people, on tensors that the model has no place for and on FP64 ones that are held in less.

    Tensors that the class of the model is known to leave out are no news.
    """
    layers = list(layers)
    lost = [x for x in layers if any(x.skipped_as(code) for code in _NO_PLACE)]
    wide = [x for x in layers if x.loaded and x.dtype is torch.float64 and x.held_bytes < x.bytes]
    out = []
    if lost:
        size = sum(x.bytes for x in lost) / 1e6
        out.append(f"not loaded, since the model has no place for them: {_named(lost)} ({size:.1f} MB)")
    if wide:
        dtypes = ", ".join(sorted({str(x.held_dtype).removeprefix("torch.") for x in wide}))
        out.append(f"stored in float64, held in {dtypes}: {_named(wide)}")
    return tuple(out)


def _named(layers: Sequence[Layer]) -> str:
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    return ", ".join(x.name for x in layers[:3]) + more
