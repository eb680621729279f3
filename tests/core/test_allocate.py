"""Large weights are in huge pages, and nothing beyond them is."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import quantport
from quantport.kernels import allocate

MIB = 1 << 20


@pytest.fixture
def advised(monkeypatch):
    """Ranges that were to be in huge pages."""
    ranges = []

    def advise(address, size, advice):
        assert advice == mmap.MADV_HUGEPAGE
        ranges.append((address, size))
        return -1  # refused: nothing depends on it

    monkeypatch.setattr(allocate, "_madvise", lambda: advise)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    return ranges


@pytest.mark.parametrize(
    ("shape", "dtype"), [((9, MIB), torch.int8), ((4097, 1025), torch.bfloat16), ((3 * MIB,), torch.float32)]
)
def test_whole_pages_inside_a_large_tensor(advised, shape, dtype):
    tensor = allocate.empty_weight(shape, dtype, torch.device("cpu"))
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    ((address, size),) = advised
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    assert address % (2 * MIB) == size % (2 * MIB) == 0
    assert start <= address < start + 2 * MIB
    assert stop - 2 * MIB < address + size <= stop


def test_small_meta_and_fake_tensors_are_left_alone(advised):
    allocate.empty_weight((MIB,), torch.int8, torch.device("cpu"))
    allocate.empty_weight((64, MIB), torch.int8, torch.device("meta"))
    with FakeTensorMode():
        allocate.empty_weight((64, MIB), torch.int8, torch.device("cpu"))
    assert not advised


def test_a_system_without_huge_pages(monkeypatch):
    monkeypatch.setattr(allocate, "_madvise", lambda: None)
    assert allocate.empty_weight((9, MIB), torch.int8, torch.device("cpu")).shape == (9, MIB)


@pytest.mark.parametrize("scheme", ["int8", "q4_0"])
def test_weights_of_a_model_are(advised, scheme):
    model = torch.nn.Sequential(torch.nn.Linear(4096, 8192, bias=False, dtype=torch.bfloat16))
    quantport.quantize_(model, scheme)
    kept = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
    large = {start for start, size in kept.items() if size >= 8 * MIB}
    assert large
    assert all(any(start <= address < start + 2 * MIB for address, _ in advised) for start in large)
