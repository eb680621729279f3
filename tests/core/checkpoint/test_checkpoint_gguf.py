"""A GGUF file is not loaded; what the error says to do about it depends on whether it is quantized."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from checkpoint_blobs import raises

from quantport.checkpoint import Checkpoint
from quantport.checkpoint.gguf_header import holds_floats
from quantport.errors import CheckpointError

gguf = pytest.importorskip("gguf")


def write(path: Path, *kinds: str) -> Path:
    """A file with every kind of metadata and a tensor of each type."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a model")
    writer.add_uint32("llama.block_count", 2)
    writer.add_bool("yes", True)
    writer.add_float64("number", 0.5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bb", ""] * 1000)
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    for i, kind in enumerate(kinds):
        dtype = gguf.GGMLQuantizationType[kind]
        raw = np.zeros((4, gguf.quant_shape_to_byte_shape((4, 256), dtype)[1]), np.uint8)
        writer.add_tensor(f"blk.{i}.weight", raw, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kinds", "floats"),
    [
        (("F16",), True),
        (("F32", "F16"), True),
        (("BF16", "F32"), True),
        (("Q8_0", "F32"), False),
        (("F16", "F32", "Q4_K"), False),
        (("IQ4_NL",), False),
    ],
    ids=str,
)
def test_floats_are_told_from_codes(tmp_path: Path, kinds: tuple[str, ...], floats: bool) -> None:
    file = write(tmp_path / "model.gguf", *kinds)
    assert holds_floats(file) is floats
    what = "gguf_file='model.gguf'" if floats else "model.gguf is quantized already"
    for place in (tmp_path, file):
        with raises(CheckpointError, what, "original BF16/FP16", found="only model.gguf"):
            Checkpoint.open(place)


@pytest.mark.parametrize("size", [0, 3, 4, 24, 30, 200, 2000])
def test_a_header_that_ends_early_is_not_judged(tmp_path: Path, size: int) -> None:
    file = write(tmp_path / "model.gguf", "F16")
    file.write_bytes(file.read_bytes()[:size])
    assert holds_floats(file) is None
    with raises(CheckpointError, "no header that can be read", found="only model.gguf"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 0),
        struct.pack("<4sIQQ", b"GGUF", 3, 1, 2**63),
        struct.pack("<4sIQQ", b"GGUF", 9, 1, 1),
        struct.pack("<4sIQQQ", b"GGUF", 3, 1, 1, 2**64 - 1),  # a key without end
        struct.pack("<4sIQQQIIQ", b"GGUF", 3, 1, 1, 0, 9, 8, 2**63),  # as many texts
        struct.pack("<4sIQQQIIQ", b"GGUF", 3, 1, 1, 0, 9, 9, 1),  # a list of lists
        struct.pack("<4sIQQQI", b"GGUF", 3, 1, 1, 0, 99),  # a kind of value that there is not
        struct.pack("<4sIQQQI", b"GGUF", 3, 1, 0, 0, 2**32 - 1),  # a tensor of many dimensions
    ],
)
def test_a_header_that_lies_is_not_judged(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(header + bytes(100))
    assert holds_floats(tmp_path / "model.gguf") is None
