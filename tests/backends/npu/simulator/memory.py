"""Device memory from the host: the simulated driver hands out host memory, so that a CPU tensor can share
that of an NPU tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

ND, NZ = 2, 29
_HOST = torch.device("cpu")
PLAIN = (-1, 0, 2, 30)  # undefined, NCHW, ND, NCDHW: the elements lie as the strides say


class MisuseError(RuntimeError):
    """A call that the vendor's documentation forbids."""


def check(condition: object, operator: str, asked: str) -> None:
    """Refuses a call.

    Raises:
        MisuseError: the condition does not hold.
    """
    if not condition:
        raise MisuseError(f"{operator}: {asked}")


def layout(tensor: Tensor) -> int:
    """The storage format of an NPU tensor."""
    try:
        # the operator itself: torch_npu's function makes an enum of it, slowly
        return int(torch.ops.npu.get_npu_format(tensor))
    except RuntimeError:  # a storage that torch made by itself, as for pickle, has bytes and no format
        return ND


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    storage = tensor.untyped_storage()
    return torch._C._construct_storage_from_data_pointer(storage.data_ptr(), _HOST, storage.nbytes())


def lies(tensor: Tensor) -> Tensor:
    """The bytes of an NPU tensor's storage in memory order, as a CPU tensor."""
    return torch.empty(0, dtype=torch.uint8).set_(_storage(tensor))


def over(tensor: Tensor) -> Tensor:
    """A CPU tensor that shares the memory of an NPU tensor."""
    check(
        layout(tensor) in PLAIN,
        "memory",
        f"a tensor of format {layout(tensor)} was read as if its elements lay in rows",
    )
    if not tensor.untyped_storage().nbytes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return torch.empty(0, dtype=tensor.dtype).set_(
        _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def place(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor on the NPU."""
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="npu")
    over(out).copy_(tensor)
    return out


def to_nz(rows: Tensor) -> Tensor:
    """FRACTAL_NZ of a CPU matrix ``[m, n]``: tiles of 16 rows of 32 bytes, one column of tiles after the
    other, padded with 0.
    """
    m, n = rows.shape
    width = 32 // rows.dtype.itemsize
    filled = torch.nn.functional.pad(rows, (0, -n % width, 0, -m % 16))
    return (
        filled.view(filled.shape[0] // 16, 16, filled.shape[1] // width, width)
        .permute(2, 0, 1, 3)
        .contiguous()
    )


def read_nz(tensor: Tensor) -> Tensor:
    """The matrix in an NPU tensor of format FRACTAL_NZ, as a CPU tensor."""
    check(
        layout(tensor) == NZ and tensor.is_contiguous(),
        "memory",
        "a whole tensor of format FRACTAL_NZ is needed",
    )
    m, n = tensor.shape
    width = 32 // tensor.dtype.itemsize
    tiles = lies(tensor).view(tensor.dtype).view(-(-n // width), -(-m // 16), 16, width)
    return tiles.permute(1, 2, 0, 3).reshape(-(-m // 16) * 16, -1)[:m, :n]


def matrix(tensor: Tensor) -> Tensor:
    """A matrix of either format, as a CPU tensor."""
    return read_nz(tensor) if layout(tensor) == NZ else over(tensor)
