"""Scales of activations that a checkpoint stores beside its weights: one for all inputs of a layer.

What they mean is the same everywhere: ``code = round(x / scale + zero point)``. Sources: compressed-tensors
0.20, ``quantization/lifecycle/forward_helpers.py``; Transformers 5.23, ``integrations/finegrained_fp8.py``;
nvidia-modelopt 0.47 and amd-quark 0.13, whose exports have the names of compressed-tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from quantport.checkpoint import CodedTensor, TensorSource
from quantport.errors import CheckpointError
from quantport.numerics.by_rows import stored_slices
from quantport.scheme.catalog import Schemes
from quantport.scheme.scheme import INPUT_SCALE, INPUT_ZERO
from quantport_formats.pieces import SCALES, wanted

_ZEROS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn, *SCALES)


@dataclass(frozen=True)
class InputScale:
    """The tensors of one layer.

    Attributes:
        source: Where they are read.
        format_name: For errors.
        scale: Name of the scale.
        zero: Name of the zero point, which need not be there; empty where the format has none.
        asymmetric: Whether activations have one; else it must be 0.
    """

    source: TensorSource
    format_name: str
    scale: str
    zero: str = ""
    asymmetric: bool = False

    def beside(self, weight: CodedTensor, schemes: Schemes) -> CodedTensor:
        """A weight whose scheme quantizes activations to 8 bits, with these.

        Raises:
            CheckpointError: a tensor is absent, or not what it should be.
        """
        assert weight.scheme is not None  # it quantizes activations
        stack = weight.shape[:-2]
        shapes = [(*stack, *(1,) * ones) for ones in range(3)]
        wanted(self.source, self.format_name, self.scale, shapes, SCALES)
        names = [self.scale]
        if self.asymmetric or self.zero in self.source.tensors:
            wanted(self.source, self.format_name, self.zero, shapes, _ZEROS)
            names.append(self.zero)
        scheme = schemes[f"{weight.scheme.name}:static{'_asym' * self.asymmetric}"]
        read = partial(self._read, weight)
        return replace(weight, scheme=scheme, tensors=(*weight.tensors, *names), keys={}, read=read)

    def _read(self, weight: CodedTensor, expert: int | None, rows: slice) -> Mapping[str, Tensor]:
        if weight.read is not None:
            stored = dict(weight.read(expert, rows))
        else:
            assert weight.scheme is not None  # as in `beside`
            parts = stored_slices(weight.scheme, weight.shape[-1], rows.start, rows.stop)
            stored = {key: self.source.read(name, parts[key]) for key, name in weight.keys.items()}
        value = self._value(self.scale, expert)
        if not 0 < value < math.inf:
            raise self._wrong(self.scale, value, "a finite scale above 0")
        stored[INPUT_SCALE] = torch.tensor([value], dtype=torch.float32, device="cpu")
        zero = self._value(self.zero, expert) if self.zero in self.source.tensors else 0
        low, high = (-128, 127) if self.asymmetric else (0, 0)
        if zero not in range(low, high + 1):
            kind = (
                f"a whole number from {low} to {high}" if self.asymmetric else "0: activations are symmetric"
            )
            raise self._wrong(self.zero, zero, kind)
        if self.asymmetric:
            stored[INPUT_ZERO] = torch.tensor([int(zero)], dtype=torch.int8, device="cpu")
        return stored

    def _value(self, name: str, expert: int | None) -> float:
        return self.source.read(name).float().flatten()[expert or 0].item()

    def _wrong(self, name: str, value: float, suggestion: str) -> CheckpointError:
        asked = f"read {name} of {self.source.directory} as {self.format_name}"
        return CheckpointError(asked, f"{value:g}", f"{suggestion}, or a checkpoint that stores none")
