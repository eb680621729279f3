"""Fake tensors of a device that is not here: shapes and dtypes through torch's own shape functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

_PAST_BINDINGS = (Tensor.contiguous, Tensor.copy_)


def _view(x: Tensor, index: Any) -> Tensor:
    items = index if isinstance(index, tuple) else (index,)
    dim = 0
    for item in items:
        if item is Ellipsis:
            # it stands for the dimensions that no slice names
            dim = x.dim() - sum(isinstance(i, slice) for i in items)
        else:
            x = (
                x.unsqueeze(dim)
                if item is None
                else torch.ops.aten.slice(x, dim, item.start, item.stop, item.step or 1)
            )
            dim += 1
    return x


class _AtenOnly(TorchFunctionMode):
    """Calls ATen past the Python bindings: some ask for a device guard, which a torch without the device
    lacks.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__) and _plain(args[1]):
            if func is Tensor.__getitem__:
                return _view(args[0], args[1])
            return torch.ops.aten.copy_(_view(args[0], args[1]), args[2])
        if func in _PAST_BINDINGS:
            return getattr(torch.ops.aten, func.__name__)(*args)
        return func(*args, **(kwargs or {}))


def _plain(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    first = items and items[0] is Ellipsis
    return all(item is None or isinstance(item, slice) for item in (items[1:] if first else items))


def allowed(torch_type: str) -> bool:
    """Whether this torch makes fake tensors of a device type."""
    try:
        with FakeTensorMode():
            torch.empty(1, dtype=torch.float32, device=torch_type)
    except RuntimeError:  # a type that needs its own package, which is not installed
        return False
    return True


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, every new tensor is a fake."""
    with FakeTensorMode(), _AtenOnly():
        yield
