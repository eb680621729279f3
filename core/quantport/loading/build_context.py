"""What building a model changes, for the thread that builds it only: parameters are on meta, and so is no
default dtype of others.

Transformers sets the default dtype of the whole process while it builds. Here that of the building thread
stands in: torch has none of its own for a thread, so that every call which would take the default is given
the dtype instead. Only ``torch.Tensor(...)`` cannot be: parameters that are made so take their dtype from the
checkpoint.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

# A factory may load a model itself; other threads wait for their turn.
_BUILDING = threading.RLock()
_FLOATS = frozenset(
    {
        torch.bartlett_window,
        torch.blackman_window,
        torch.empty,
        torch.empty_permuted,
        torch.empty_strided,
        torch.eye,
        torch.fft.fftfreq,
        torch.fft.rfftfreq,
        torch.hamming_window,
        torch.hann_window,
        torch.kaiser_window,
        torch.linspace,
        torch.logspace,
        torch.normal,
        torch.ones,
        torch.rand,
        torch.randn,
        torch.zeros,
    }
)
_INFERRING = frozenset(
    {torch.arange, torch.as_tensor, torch.asarray, torch.full, torch.range, torch.scalar_tensor, torch.tensor}
)
_LARGE = 16 * 2**20  # bytes
# On meta they fill nothing; to do so torch imports its compiler, 870 modules that take 75 MiB.
_FILLS = frozenset(
    {nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_, Tensor.normal_, Tensor.uniform_}
)
_CASTS = frozenset({Tensor.bfloat16, Tensor.double, Tensor.float, Tensor.half, Tensor.type})


class _Defaults(TorchFunctionMode):
    """The default dtype of one thread; that of the process until code of this thread sets one."""

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS and (filled := args[0] if args else kwargs["tensor"]).is_meta:
            return filled
        make = _zeros if func is torch.zeros else func
        if (
            self.dtype is None
            or _INSIDE.get() is not self
            or func in _CASTS
            or any(map(_typed, tree_leaves((args, kwargs))))
        ):
            return make(*args, **kwargs)
        if func in _FLOATS:
            return make(*args, **{**kwargs, "dtype": self.dtype})
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        if func in _INFERRING:
            return func(*args, **{**kwargs, "dtype": self.dtype})
        args, kwargs = tree_map_only(Tensor, self._promoted, (args, kwargs))
        return func(*args, **kwargs).to(self.dtype)  # numbers alone have no dtype to promote to

    def _promoted(self, tensor: Tensor) -> Tensor:
        """As torch promotes integers that become floats; masks stay."""
        return tensor if tensor.dtype is torch.bool else tensor.to(self.dtype)


_INSIDE: ContextVar[_Defaults | None] = ContextVar("quantport_building", default=None)


def _zeros(*args: Any, **kwargs: Any) -> Tensor:
    """Zeros in pages that the system makes when they are first touched: a parameter that a class makes of
    zeros, such as all experts of a layer of Llama 4, goes to meta without one. They are NumPy's, whose memory
    is not resized.
    """
    if "out" in kwargs or torch.device(kwargs.get("device") or "cpu").type != "cpu":
        return torch.zeros(*args, **kwargs)
    like = torch.zeros(*args, **{**kwargs, "device": "meta"})
    if like.layout is not torch.strided or like.nbytes < _LARGE:
        return torch.zeros(*args, **kwargs)
    pages = torch.from_numpy(numpy.zeros(like.nbytes, numpy.uint8))
    return pages.view(like.dtype).view(like.shape).requires_grad_(like.requires_grad)


def _typed(leaf: Any) -> bool:
    """Whether an argument says which floats come out: then no default is asked for."""
    if isinstance(leaf, Tensor):
        return leaf.is_floating_point() or leaf.is_complex()
    # of torch, Python (``bool``, ``int``) or NumPy
    return isinstance(leaf, torch.dtype | type) or hasattr(leaf, "dtype")


@contextmanager
def collecting_later() -> Iterator[None]:
    """Inside, Python looks for no garbage: among hundreds of thousands of fresh objects that all stay, each
    look takes as long as making them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def is_building() -> bool:
    """Whether the calling thread is inside `building`."""
    return _INSIDE.get() is not None


@contextmanager
def in_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside of `building`, another default dtype of the thread; elsewhere nothing changes."""
    defaults = _INSIDE.get()
    if defaults is None:
        yield
        return
    held, defaults.dtype = defaults.dtype, dtype
    try:
        yield
    finally:
        defaults.dtype = held


@contextmanager
def building() -> Iterator[None]:
    """Inside, parameters of new modules are on the meta device, and a default dtype that is set is that of
    this thread.

    Buffers stay real, whatever the default device: they are not all in checkpoints.
    """
    with _BUILDING, _patched(), torch.device("cpu"), _Defaults() as defaults:
        token = _INSIDE.set(defaults)
        try:
            yield
        finally:
            _INSIDE.reset(token)


@contextmanager
def as_usual() -> Iterator[None]:
    """Inside, nothing is as in ``building``, even where a factory that builds one model loads another."""
    token = _INSIDE.set(None)
    try:
        yield
    finally:
        _INSIDE.reset(token)


@contextmanager
def _patched() -> Iterator[None]:
    """Functions of torch that ask first whether their thread is one that builds; the others see no
    difference.
    """
    register, set_dtype, get_dtype = (
        nn.Module.register_parameter,
        torch.set_default_dtype,
        torch.get_default_dtype,
    )

    def register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if _INSIDE.get() is not None and param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    def set_default_dtype(d: torch.dtype, /) -> None:
        defaults = _INSIDE.get()
        if defaults is None:
            set_dtype(d)
        else:
            defaults.dtype = d

    def get_default_dtype() -> torch.dtype:
        defaults = _INSIDE.get()
        return (defaults and defaults.dtype) or get_dtype()

    nn.Module.register_parameter = register_parameter  # type: ignore[method-assign,assignment]  # restored below
    torch.set_default_dtype, torch.get_default_dtype = set_default_dtype, get_default_dtype
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        torch.set_default_dtype, torch.get_default_dtype = set_dtype, get_dtype
