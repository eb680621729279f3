"""Keys and values as a layer of the cache returns them for few new tokens: a tensor whose numbers are read
back when somebody asks for them.

Attention need not ask: ``scaled_dot_product_attention`` goes to the device's own operator over the rows as
they are stored. Every other operation gets a plain tensor, which is then kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from quantport.kvcache.kernel import KVKernel
from quantport.kvcache.rows import CacheDtype, decode

MAX_QUERY_ROWS = 64  # of one head of keys; beyond it reading back once costs less than reading row by row


class Stored(NamedTuple):
    """Rows of the cache, and how they read back.

    Attributes:
        rows: uint8 ``[batch, heads, tokens, row bytes]``.
        width: Elements of a head.
        kind: What elements became.
        kernel: What attends to them.
    """

    rows: Tensor
    width: int
    kind: CacheDtype
    kernel: KVKernel


class StoredStates(Tensor):
    """Keys or values ``[batch, heads * repeats, tokens, width]``, or on the way there, with heads and repeats
    apart. Shape, dtype and device are known, numbers are read back at need.
    """

    stored: Stored
    repeats: int
    _dense: Tensor | None
    _read: Callable[[], Tensor]

    @staticmethod
    def make(
        stored: Stored,
        dtype: torch.dtype,
        read: Callable[[], Tensor] | None = None,
        shape: tuple[int, ...] | None = None,
        repeats: int = 1,
    ) -> StoredStates:
        """Makes one of rows; ``read`` and ``shape`` are those of a view of another."""
        rows, width, kind, _ = stored
        shape = shape or (*rows.shape[:3], width)
        self = Tensor._make_wrapper_subclass(StoredStates, shape, dtype=dtype, device=rows.device)
        self.stored, self.repeats, self._dense = stored, repeats, None
        self._read = read or (lambda: decode(rows, width, kind, dtype))
        return self

    @property
    def dense(self) -> Tensor:
        """The numbers, as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            if self._dense is None:
                self._dense = self._read()
            return self._dense

    @property
    def is_open(self) -> bool:
        """Whether nobody has asked for the numbers, and may have changed them."""
        return self._dense is None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return _on_dense(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _KNOWN:
                return func(*args, **kwargs)
            out = _SHORTCUTS[func](*args, **kwargs) if func in _SHORTCUTS else None
        return _on_dense(func, args, kwargs) if out is None else out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types a function that is never called
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _on_dense(func, args, kwargs or {})


def _on_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map_only(StoredStates, lambda states: states.dense, (args, kwargs))
    return func(*args, **kwargs)


def _is_open(states: Any, dims: int) -> bool:
    return type(states) is StoredStates and states.dim() == dims and states.is_open


def _view(states: StoredStates, func: Any, args: tuple[Any, ...], *shape: int, repeats: int) -> StoredStates:
    return StoredStates.make(states.stored, states.dtype, lambda: func(states.dense, *args), shape, repeats)


_ALL = slice(None)


def _split_heads(states: StoredStates, index: Any) -> StoredStates | None:
    """``states[:, :, None, :, :]``, the first step of repeating heads."""
    is_simple = isinstance(index, tuple) and all(i is None or type(i) is slice for i in index)
    if not _is_open(states, 4) or not is_simple or index != (_ALL, _ALL, None, _ALL, _ALL):
        return None
    batch, heads, tokens, width = states.shape
    return _view(states, Tensor.__getitem__, (index,), batch, heads, 1, tokens, width, repeats=1)


def _expand(states: StoredStates, *shape: Any) -> StoredStates | None:
    """The second step: ``[batch, heads, 1, ...]`` to ``[batch, heads, n, ...]``."""
    before = tuple(states.shape)
    if not _is_open(states, 5) or len(shape) != 5 or before[2] != 1:
        return None
    if not all(type(n) is int for n in shape) or (*shape[:2], *shape[3:]) != (*before[:2], *before[3:]):
        return None
    return _view(states, Tensor.expand, shape, *shape, repeats=shape[2])


def _join_heads(states: StoredStates, *shape: Any) -> StoredStates | None:
    """The last step: ``[batch, heads, n, ...]`` to ``[batch, heads * n, ...]``."""
    if not _is_open(states, 5):
        return None
    batch, heads, n, tokens, width = states.shape
    if shape != (batch, heads * n, tokens, width):
        return None
    return _view(states, Tensor.reshape, shape, *shape, repeats=n)


def _attend(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """``scaled_dot_product_attention`` over stored rows; None where torch should do it, or refuse it."""
    if not (_is_open(key, 4) and _is_open(value, 4)) or dropout_p or is_causal or _is_transformed():
        return None
    if not _is_plain(query, key, (key.dtype,)) or query.dim() != 4:
        return None
    batch, q_heads, q_tokens, width = query.shape
    _, heads, tokens, _ = key.shape
    fits = q_heads % heads == 0 if enable_gqa else q_heads == heads
    if not fits or key.repeats != value.repeats or key.shape[:3] != value.shape[:3]:
        return None
    if (batch, width) != (key.shape[0], key.shape[3]) or key.stored[2:] != value.stored[2:]:
        return None
    if not tokens or not 0 < q_heads // heads * key.repeats * q_tokens <= MAX_QUERY_ROWS:
        return None
    mask = attn_mask
    if mask is not None:
        if not _is_plain(mask, key, (torch.bool, key.dtype)) or mask.dim() > 4:
            return None
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        if any(n not in (1, m) for n, m in zip(mask.shape, (batch, q_heads, q_tokens, tokens), strict=True)):
            return None
    rows, quant = (key.stored.rows, value.stored.rows), key.stored.kind.quant
    scale = width**-0.5 if scale is None else scale
    out: Tensor = key.stored.kernel.attend(query, rows, quant, mask, scale)
    return out


def _is_transformed() -> bool:
    """Whether autocast or a transform of functions changes what operators do."""
    return torch._C._is_any_autocast_enabled() or torch._C._are_functorch_transforms_active()


def _is_plain(x: Any, near: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether it is a tensor of one of these dtypes, beside another, without a gradient to come."""
    if type(x) is not Tensor or x.dtype not in dtypes or x.device != near.device:
        return False
    return not (x.requires_grad and torch.is_grad_enabled())


# Answered without reading anything back.
_KNOWN = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]  # torch has no types here
    Tensor.dtype.__get__,  # type: ignore[attr-defined]  # as above
    Tensor.device.__get__,
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]  # as above
    Tensor.size,
    Tensor.dim,
}
_SHORTCUTS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _split_heads,
    Tensor.expand: _expand,
    Tensor.reshape: _join_heads,
    torch.nn.functional.scaled_dot_product_attention: _attend,
}
