"""What compiled code may touch: memory that was checked, and is held for the whole call.

Compiled code trusts every address. Addresses are made here and nowhere else, from tensors whose dtype, shape,
strides and device were compared with what the kernel reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from quantport.backend import BackendError

_PLAIN = (Tensor, torch.nn.Parameter)


class Array(NamedTuple):
    """Checked memory.

    Attributes:
        address: Of the first element; 0 for fake and meta tensors, which have no memory.
        size: Bytes from there on.
        owner: What keeps the memory.
        has_memory: False for fake and meta tensors, over which a kernel does nothing.
        is_tensor: False for constants, which go with either.
    """

    address: int
    size: int
    owner: object
    has_memory: bool = True
    is_tensor: bool = True

    def at(self, offset: int, size: int) -> Array:
        """``size`` bytes of it, from ``offset`` on.

        Raises:
            BackendError: there are fewer.
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise BackendError(
                f"hand bytes {offset} to {offset + size} to a compiled kernel",
                f"{self.size} bytes",
                "a part of the memory",
            )
        return self._replace(address=self.address + offset, size=size)


_HAS_MEMORY = itemgetter(Array._fields.index("has_memory"))
_new = tuple.__new__  # an Array without a call in Python: a small layer makes several


def array(tensor: Tensor, dtype: torch.dtype, *shape: int) -> Array:
    """The memory of a contiguous tensor of this dtype and shape.

    Raises:
        BackendError: the tensor is another, on another device, or of a class without memory of its own.
    """
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise _wrong(tensor, f"contiguous {dtype} {list(shape)}")
    if type(tensor) is Tensor and tensor.is_cpu:
        return _new(Array, (tensor.data_ptr(), tensor.nbytes, tensor, True, True))
    return _of(tensor)


def row_address(tensor: Tensor, size: int) -> int:
    """Where ``size`` bf16 begin that are a whole contiguous tensor; 0 for any other, and for fake ones."""
    if (
        tensor.dtype is torch.bfloat16
        and tensor.numel() == size
        and tensor.dim()
        and tensor.shape[-1] == size
        and type(tensor) is Tensor
        and tensor.is_cpu
        and tensor.is_contiguous()
    ):
        return tensor.data_ptr()
    return 0


def new_row(row: Tensor, shape: tuple[int, ...], size: int) -> tuple[Tensor, int]:
    """An empty tensor ``[*shape, size]`` like a row of which `row_address` knows the address, and where it
    begins: 0 where a mode of torch made it fake, or into a tensor of a class of its own.
    """
    out = row.new_empty((*shape, size))
    return out, out.data_ptr() if type(out) is Tensor else 0


def places(tensors: Iterable[Tensor]) -> list[int]:
    """Where the memory of tensors begins: to find out whether it has moved."""
    return [tensor.data_ptr() for tensor in tensors]


def array_of_rows(tensor: Tensor, dtype: torch.dtype, count: int, size: int) -> Array:
    """The memory of ``count`` rows of ``size`` elements, each contiguous, ``tensor.stride(0)`` apart.

    Raises:
        BackendError: as for ``array``.
    """
    if tensor.dtype is not dtype or tensor.shape != (count, size) or (size > 1 and tensor.stride(1) != 1):
        raise _wrong(tensor, f"{dtype} [{count}, {size}] with contiguous rows")
    return _of(tensor)


def array_of_heads(
    tensor: Tensor, batch: int, heads: int, tokens: int, size: int
) -> tuple[Array, tuple[int, int]]:
    """The memory of uint8 ``[batch, heads, tokens, size]`` where the tokens of a head lie one behind the
    other, and the bytes from batch to batch and from head to head.

    Raises:
        BackendError: as for ``array``.
    """
    shape, strides = (batch, heads, tokens, size), tensor.stride()
    if tensor.dtype is not torch.uint8 or tensor.shape != shape or strides[2:] != (size, 1):
        raise _wrong(tensor, f"{torch.uint8} {list(shape)} with contiguous heads")
    return _of(tensor), (strides[0], strides[1])


def constants(values: Sequence[float]) -> Array:
    """fp32 numbers in memory that torch does not know.

    No default dtype, default device or trace can touch them. They are made once, and kept by the module that
    names them.
    """
    owner = (ctypes.c_float * len(values))(*values)
    return Array(ctypes.addressof(owner), ctypes.sizeof(owner), owner, is_tensor=False)


def table(lines: Iterable[Sequence[Array | int]]) -> Array:
    """A table of addresses and sizes, line by line, as int64: for kernels that go over several weights."""
    words = [word for line in lines for word in line]
    arrays = [w for w in words if isinstance(w, Array)]
    owner = (ctypes.c_int64 * len(words))(*(w.address if isinstance(w, Array) else w for w in words))
    return Array(
        ctypes.addressof(owner), ctypes.sizeof(owner), (owner, arrays), has_memory(arrays), bool(arrays)
    )


def integers(values: Iterable[int]) -> Array:
    """A table of whole numbers, as int64."""
    words = tuple(values)
    owner = (ctypes.c_int64 * len(words))(*words)
    return Array(ctypes.addressof(owner), ctypes.sizeof(owner), owner, is_tensor=False)


def has_memory(words: Iterable[Any]) -> bool:
    """Whether kernels have something to run over.

    Raises:
        BackendError: some tensors are fake and some are real: results would be whatever lay in fresh memory.
    """
    arrays = [w for w in words if type(w) is Array]
    if all(map(_HAS_MEMORY, arrays)):
        return True
    kinds = {w.has_memory for w in arrays if w.is_tensor}
    if len(kinds) > 1:
        raise BackendError(
            "run a compiled kernel over tensors",
            "some of them are fake or meta tensors, and some are real",
            "all of them real, or all of them fake",
        )
    return kinds != {False}


def _of(tensor: Tensor) -> Array:
    size = tensor.numel() * tensor.element_size()
    if type(tensor) in _PLAIN and tensor.is_cpu:
        return Array(tensor.data_ptr(), size, tensor)
    if tensor.is_meta or (isinstance(tensor, FakeTensor) and tensor.device.type == "cpu"):
        return Array(0, size, tensor, False)
    raise _wrong(tensor, "a plain tensor on the CPU")


def _wrong(tensor: Tensor, wanted: str) -> BackendError:
    is_strided = tensor.layout is torch.strided
    layout = f"strides {tensor.stride()}" if is_strided else str(tensor.layout)
    found = f"a {type(tensor).__name__} of {tensor.dtype} {list(tensor.shape)}, {layout}, on {tensor.device}"
    return BackendError("hand memory to a compiled kernel", found, wanted)
