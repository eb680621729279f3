"""The cache as Transformers sees it. The one module of the house that is made of Transformers' classes:
imported on use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from quantport.errors import ConfigError
from quantport.kvcache.kernel import KVKernel
from quantport.kvcache.rows import CacheDtype, decode, encode, with_room
from quantport.kvcache.stored_states import Stored, StoredStates

FEW_TOKENS = 8  # new ones: more are a prompt, of which attention reads keys and values many times over
Kernels = Callable[[torch.device], KVKernel | None]


class KVLayer(DynamicLayer):  # type: ignore[misc]  # Transformers has no types
    """A layer that grows: ``keys`` and ``values`` are uint8 rows ``[batch, heads, tokens, row bytes]``.

    Crop, reorder, repeat, select, offload and prefetch are inherited: they move whole rows. Quantized rows
    have room behind them for more, into which the next ones are written.

    Args:
        kind: What elements become.
        kernels: Finds what a device brings for quantized rows.
    """

    def __init__(self, kind: CacheDtype, kernels: Kernels) -> None:
        super().__init__()
        self.kind, self.kernels = kind, kernels
        self._own = [(0, 0), (0, 0)]  # address and capacity of what keys and values were written into
        self._returned: list[weakref.ref[StoredStates]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_returned": []}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes shapes, dtype and device from the first states ``[batch, heads, tokens, head_dim]``."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.widths = key_states.shape[-1], value_states.shape[-1]
        self.keys, self.values = (self._empty(x) for x in (key_states, value_states))
        quant = self.kind.quant
        kernel = self.kernels(self.device) if quant else None
        self.kernel = kernel if kernel and quant and kernel.serves(quant, *self.widths, self.dtype) else None
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends, and returns all keys and values as they read back, the new ones too: chunks then make no
        difference. Where the device attends to rows as they are stored, those of few new tokens are
        ``StoredStates``.

        Raises:
            ConfigError: other batch size, heads, head size, dtype or device than the cache holds; nothing
                was appended.
        """
        self._check(key_states, value_states)
        if not self.is_initialized or self._held() != _form(key_states, value_states):
            self.lazy_initialization(key_states, value_states)
        self._append(key_states.detach(), value_states.detach())
        length, is_stored = self.get_seq_length(), 0 < key_states.shape[-2] <= FEW_TOKENS
        keys, values = (
            self._read(rows[:, :, :length], width, is_stored)
            for rows, width in zip((self.keys, self.values), self.widths, strict=True)
        )
        return keys, values

    def _read(self, rows: Tensor, width: int, is_stored: bool) -> Tensor:
        kernel = None if torch.compiler.is_compiling() else self.kernel
        if kernel is None or not is_stored:
            return decode(rows, width, self.kind, self.dtype)
        states = StoredStates.make(Stored(rows, width, self.kind, kernel), self.dtype)
        self._returned.append(weakref.ref(states))
        return states

    def _empty(self, states: Tensor, tokens: int = 0) -> Tensor:
        row = self.kind.row_bytes(states.shape[-1], states.element_size())
        return torch.empty(*states.shape[:2], tokens, row, dtype=torch.uint8, device=states.device)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        if self.kind.quant is None or torch.compiler.is_compiling():
            new = encode(keys, self.kind), encode(values, self.kind)
            self.keys, self.values = (
                torch.cat(both, dim=-2) for both in zip((self.keys, self.values), new, strict=True)
            )
            return
        start, both = self.get_seq_length(), (self.keys, self.values)
        stop = start + keys.shape[-2]
        buffers = [with_room(rows, own, stop) for rows, own in zip(both, self._own, strict=True)]
        self._write((keys, values), [buffer[:, :, start:stop] for buffer in buffers], start)
        self.keys, self.values = (buffer[:, :, :stop] for buffer in buffers)
        self._own = [(buffer.data_ptr(), buffer.shape[2]) for buffer in buffers]

    def _write(self, states: tuple[Tensor, Tensor], rows: Sequence[Tensor], start: int) -> None:
        """Writes new rows over whatever lies there from token ``start`` on."""
        alive = [before for before in (ref() for ref in self._returned) if before is not None]
        for before in alive:
            if before.shape[2] > start:
                _ = before.dense  # read back before it is overwritten
        self._returned = [weakref.ref(before) for before in alive if before.is_open]
        quant = self.kind.quant
        if self.kernel is None or quant is None or torch.compiler.is_compiling():
            for x, to in zip(states, rows, strict=True):
                to.copy_(encode(x, self.kind))
        else:
            self.kernel.encode(states, (rows[0], rows[1]), quant)

    def _held(self) -> dict[str, Any]:
        batch, heads = self.keys.shape[:2]
        return _named((batch, heads, *self.widths, self.dtype, self.device))

    def _check(self, keys: Tensor, values: Tensor) -> None:
        asked = f"append keys {list(keys.shape)} and values {list(values.shape)} to the KV cache"
        if (
            keys.ndim != 4
            or keys.shape[:3] != values.shape[:3]
            or keys.dtype != values.dtype
            or not keys.is_floating_point()
        ):
            found = f"{keys.dtype} keys and {values.dtype} values of these shapes"
            raise ConfigError(
                asked, found, "both [batch, heads, tokens, head size], floating, alike but for the head size"
            )
        if self.get_seq_length() == 0:
            return  # an empty layer takes any shape
        new = _form(keys, values)
        wrong = [
            f"{name} {new[name]}, the cache holds {old}"
            for name, old in self._held().items()
            if new[name] != old
        ]
        if wrong:
            raise ConfigError(asked, "; ".join(wrong), "the same as before, or a new cache, or cache.reset()")


class FixedKVLayer(KVLayer):
    """A layer of fixed size: allocated at the first update, written in place.

    Args:
        kind: What elements become.
        kernels: Finds what a device brings for quantized rows.
        max_length: Tokens that it holds at most; ``KVCache`` refuses more.
    """

    def __init__(self, kind: CacheDtype, kernels: Kernels, max_length: int) -> None:
        super().__init__(kind, kernels)
        self.max_length, self.length = max_length, 0

    def _empty(self, states: Tensor, tokens: int = 0) -> Tensor:
        return super()._empty(states, self.max_length)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        stop = self.length + keys.shape[-2]
        new = [rows[:, :, self.length : stop] for rows in (self.keys, self.values)]
        self._write((keys, values), new, self.length)
        self.length = stop

    def get_seq_length(self) -> int:
        """Tokens that it holds now."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens that it can hold."""
        return self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens: minus that many. As in Transformers, a positive number is refused.

        Raises:
            ValueError: the number is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to forget")
        self.length = max(0, self.length + tokens_to_remove)

    def reset(self) -> None:
        """Forgets all tokens; the memory stays for the next."""
        self.length = 0


class KVCache(Cache):  # type: ignore[misc]  # Transformers has no types
    """A Transformers cache whose full-attention layers are quantized; made by ``quantport.kv_cache``.

    Args:
        layers: One for each layer of the model.
        max_length: Tokens that it holds at most; None lets it grow.
        offloading: As in Transformers: layers wait in host memory for their turn.
    """

    def __init__(self, layers: list[Any], max_length: int | None = None, offloading: bool = False) -> None:
        super().__init__(layers=layers, offloading=offloading)
        self.max_length = max_length

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held now, those allocated for later included."""
        tensors = (getattr(layer, name, None) for layer in self.layers for name in ("keys", "values"))
        return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends to one layer and returns its keys and values ``[batch, heads, tokens, head size]``.

        Raises:
            ConfigError: no such layer, no room, or another shape or dtype than before; nothing was appended.
        """
        if layer_idx >= len(self.layers):
            found = f"the cache was made for a model of {len(self.layers)} layers"
            raise ConfigError(
                f"update layer {layer_idx} of the KV cache",
                found,
                "quantport.kv_cache(model) of the same model",
            )
        # before any kind of layer: the first one that a model asks is not always ours
        if self.max_length is not None:
            held, new = self.get_seq_length(layer_idx), key_states.shape[-2]
            if held + new > self.max_length:
                suggestion = (
                    f"at most {self.max_length - held} more, cache.reset(), or max_length={held + new} "
                    "or more"
                )
                found = f"it holds {held} of max_length={self.max_length}"
                raise ConfigError(f"append {new} tokens to the KV cache", found, suggestion)
        out: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return out


def _named(form: tuple[Any, ...]) -> dict[str, Any]:
    return dict(
        zip(("batch size", "KV heads", "key size", "value size", "dtype", "device"), form, strict=True)
    )


def _form(keys: Tensor, values: Tensor) -> dict[str, Any]:
    return _named((keys.shape[0], keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype, keys.device))
