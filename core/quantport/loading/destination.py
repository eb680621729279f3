"""Where a load puts what it has read: into the model, or whatever else takes its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from quantport.kernels.allocate import empty_weight
from quantport.loading.swap_modules import module_at
from quantport.modules import QuantModule
from quantport.numerics.by_rows import QuantizedRows

Put = Callable[[Tensor], None]
"""Takes the values that come next in a tensor, in the order of its memory, of any dtype and on any device."""


class Destination(Protocol):
    """Takes the weights and the other tensors of a model, each from one thread, several at a time."""

    def weight(self, path: str, module: QuantModule, name: str, steps: Iterator[QuantizedRows]) -> None:
        """Takes a weight that is quantized some rows at a time.

        Args:
            path: Of the module.
            module: The module that it is a weight of, empty.
            name: Of the weight in the module.
            steps: All its rows, in order.
        """

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> AbstractContextManager[Put]:
        """Takes a parameter or buffer: what is put inside the block, held in a dtype.

        Args:
            name: In the model, which may not have it: then it goes nowhere.
            shape: Shape.
            dtype: Dtype.
        """


class IntoModel:
    """The model itself, on the device of each name."""

    def __init__(self, model: nn.Module, device_of: Callable[[str], torch.device]) -> None:
        self._model, self._device_of = model, device_of

    def weight(self, path: str, module: QuantModule, name: str, steps: Iterator[QuantizedRows]) -> None:
        """Packs it, and keeps it in its module."""
        module.set_steps(name, steps)

    @contextmanager
    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Put]:
        """Keeps it as the parameter or buffer of that name, once it is whole."""
        target = empty_weight(shape, dtype, self._device_of(name))
        left = target.view(-1)

        def put(values: Tensor) -> None:
            nonlocal left
            left[: values.numel()].copy_(values.reshape(-1))
            left = left[values.numel() :]

        yield put
        _assign(self._model, name, target)


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Sets a parameter or buffer by name; names that the model does not have are left to ``_finish``."""
    path, _, leaf = name.rpartition(".")
    module = module_at(model, path)
    if module is None:
        return
    if leaf in module._parameters:
        old = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(
            value, old is not None and old.requires_grad and value.is_floating_point()
        )
    elif leaf in module._buffers:
        module._buffers[leaf] = value
