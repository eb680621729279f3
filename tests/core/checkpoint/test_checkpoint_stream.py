"""Saving what is announced: nothing is gathered, pieces come in any order, and the room is known before."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint_blobs import only, raises, stream, weights
from safetensors.torch import load_file

from quantport.checkpoint import Checkpoint, save_tensors
from quantport.errors import SaveError

SIZE = 64 * 64 * 2  # of one tensor of weights()


def nothing_left(directory: Path) -> bool:
    return only(directory) == []


def layout_of(tensors: dict[str, torch.Tensor]) -> dict:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


MIXED = {
    "odd": torch.arange(7, dtype=torch.uint8),
    "wide": torch.randn(5, 3),
    "none": torch.empty(0, 3, dtype=torch.int8),
    "scalar": torch.tensor(2.5),
    "float8": torch.randn(9, 2).to(torch.float8_e4m3fn),
    "half": torch.randn(4, 5, 2).bfloat16(),
}


@pytest.mark.parametrize("limit", [1, 60, 1000])
@pytest.mark.parametrize("order", [list(MIXED), list(reversed(MIXED))], ids=["in order", "in another order"])
def test_a_layout_gives_the_same_files(tmp_path: Path, limit: int, order: list[str]) -> None:
    """Also in pieces, in another order and from several threads; and safetensors itself reads them."""

    def pieces(name: str) -> Iterator[tuple[str, torch.Tensor]]:
        tensor = MIXED[name]
        whole = not tensor.dim() or not tensor.numel()
        matrices = tensor if tensor.dim() == 3 else [tensor]
        yield from ((name, part) for m in matrices for part in ([m] if whole else m.split(2)))

    def fill(missing: Set[str], write: Callable[[str, torch.Tensor], None]) -> None:
        assert missing == set(order)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda name: [write(*piece) for piece in pieces(name)], order))

    save_tensors(tmp_path / "gathered", MIXED.items(), max_shard_bytes=limit)
    streamed = (piece for name in order for piece in pieces(name))
    save_tensors(tmp_path / "streamed", streamed, layout=layout_of(MIXED), max_shard_bytes=limit)
    save_tensors(tmp_path / "filled", fill, layout=layout_of(MIXED), max_shard_bytes=limit)
    names = only(tmp_path / "gathered")
    for other in ("streamed", "filled"):
        assert only(tmp_path / other) == names
        for name in names:
            assert (tmp_path / "gathered" / name).read_bytes() == (tmp_path / other / name).read_bytes()
    loaded = {k: t for f in (tmp_path / "streamed").glob("*.safetensors") for k, t in load_file(f).items()}
    assert set(loaded) == set(MIXED)
    for name, tensor in MIXED.items():
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_data_is_aligned_whatever_the_order(tmp_path: Path) -> None:
    save_tensors(tmp_path / "m", MIXED.items(), metadata={"k": "x" * 5})
    infos = Checkpoint.open(tmp_path / "m").tensors.values()
    assert all(info.start % info.dtype.itemsize == 0 for info in infos)


def test_a_stream_with_a_layout_holds_one_tensor(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = []

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(12):
            tensor = torch.full((64, 64), float(i), dtype=torch.bfloat16)
            alive.add(tensor.untyped_storage())
            most.append(len(alive))
            yield f"w{i}", tensor

    layout = {f"w{i}": ((64, 64), torch.bfloat16) for i in range(12)}
    save_tensors(tmp_path / "m", counted(), layout=layout)
    assert max(most) == 1


WRONG = {
    "unknown": ([("b", torch.ones(2))], "'b'", "not announced"),
    "twice": ([("a", torch.ones(2)), ("a", torch.ones(2))], "'a'", "this name twice"),
    "too long": ([("a", torch.ones(3))], "'a'", "this name twice"),
    "too short": ([("a", torch.ones(1))], "save a checkpoint", "ends before 'a' is whole"),
    "dtype": ([("a", torch.ones(2, dtype=torch.int32))], "'a'", "torch.int32"),
    "shape": ([("a", torch.ones(1, 2))], "'a'", "[1, 2]"),
    "nothing": ([], "save a checkpoint", "ends before 'a' is whole"),
}


@pytest.mark.parametrize(("tensors", "named", "found"), WRONG.values(), ids=WRONG)
def test_a_stream_that_is_not_as_announced(tmp_path: Path, tensors: list, named: str, found: str) -> None:
    with raises(SaveError, named, found=found):
        save_tensors(tmp_path / "m", tensors, layout={"a": ((2,), torch.float32)})
    assert nothing_left(tmp_path)


def test_a_layout_of_a_dtype_that_cannot_be_written(tmp_path: Path) -> None:
    with raises(SaveError, "'a'", found="dtype torch.complex128"):
        save_tensors(tmp_path / "m", [], layout={"a": ((2,), torch.complex128)})
    assert nothing_left(tmp_path)


def test_free_space_is_checked_before_the_stream_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled = []
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * SIZE - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    tensors, layout = (
        ((pulled.append(n) or (n, t) for n, t in stream("a", "b", "c"))),
        layout_of(weights("a", "b", "c")),
    )
    with raises(SaveError, str(tmp_path / "m"), "free space", found="GB are free"):
        save_tensors(tmp_path / "m", tensors, layout=layout)
    assert pulled == []
    assert nothing_left(tmp_path)
    layout.pop("c")
    save_tensors(tmp_path / "m", stream("a", "b"), layout=layout)
