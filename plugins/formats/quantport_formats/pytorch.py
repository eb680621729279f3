"""Files that ``torch.save`` wrote: a flat state dict in ``pytorch_model.bin``, or in shards with an index.

Tensors are found as those of safetensors are, by where they lie, and no object of the file is made: its
pickle goes through the unpickler of ``torch.load(weights_only=True)`` onto the meta device. Source: PyTorch's
``torch/serialization.py``: a zip file whose records are stored uncompressed, ``data.pkl`` and one
``data/KEY`` for each storage.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from quantport.checkpoint import Checkpoint, CheckpointFormat, Recognized, TensorInfo, TensorSource
from quantport.checkpoint.header import Header
from quantport.checkpoint.layout import Layout, indexed_layout, some
from quantport.checkpoint.limits import MAX_TENSORS, within
from quantport.checkpoint.stamp import FileStamp, check_stamp, file_stamp
from quantport.errors import CheckpointError
from quantport.scheme.catalog import Schemes

_STEMS = ("pytorch_model", "diffusion_pytorch_model")
_SUFFIXES = (".bin", ".pt", ".pth")
_INDEX = ".bin.index.json"
_MAX_PICKLE_BYTES = 32_000_000  # 100,000 tensors take a third
_PART = (
    "a flat dict of tensors by name: torch.save(torch.load(path, weights_only=True)[key], new_path) saves "
    "the part of a file that is one"
)
_CONVERT = (
    "the whole file, downloaded or saved again; or "
    "weights saved as safetensors: AutoModel.from_pretrained(path).save_pretrained(new_path), or "
    "safetensors.torch.save_file(state_dict, path) where you trust the file"
)


class PyTorch(CheckpointFormat):
    """Opens ``pytorch_model.bin``, one file or shards; what it holds, the other formats say."""

    name = "pytorch"

    def open(self, path: Path, *, headers_only: bool = False) -> TensorSource | None:
        """As `CheckpointFormat.open`. The list of tensors is at the end of these files: they are whole or
        malformed.
        """
        layout = _layout(path)
        if layout is None:
            return None
        stamps, headers = {}, {}
        for file in map(str, layout.files):
            stamps[file], headers[file] = _header(file)
        return Checkpoint(layout, headers, stamps)

    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """Returns None: names and shapes are those of any other checkpoint."""
        return None


def _layout(path: Path) -> Layout | None:
    if path.name.endswith(_INDEX) and path.is_file():
        return indexed_layout(path)
    if path.suffix in _SUFFIXES and path.is_file():
        return Layout(path.parent, (path,))
    for stem in _STEMS:
        if (path / f"{stem}.bin").is_file():
            return Layout(path, (path / f"{stem}.bin",))
        if (path / f"{stem}{_INDEX}").is_file():
            return indexed_layout(path / f"{stem}{_INDEX}")
    return None


def _header(file: str) -> tuple[FileStamp, Header]:
    """Where each tensor of a file lies.

    Raises:
        CheckpointError: it cannot be read, is no state dict, or claims what it does not hold.
    """
    try:
        stamp = file_stamp(file)
        records = _records(file)
        found = torch.load(file, map_location="meta", weights_only=True, mmap=False)
    except OSError as error:
        _bad(file, str(error), "a file that you may read")
    except CheckpointError:
        raise
    except Exception as error:  # of the zip file or of the unpickler, which has many
        _bad(file, _said(file, error))
    check_stamp(f"read the tensors of {file}", file, stamp)
    if not isinstance(found, dict) or not found:
        _bad(file, f"a {type(found).__name__}" if found else "no tensor", "a flat dict of tensors by name")
    infos = [_info(file, name, value, records) for name, value in found.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    return stamp, Header(MappingProxyType({info.name: info for info in infos}), MappingProxyType({}))


def _records(file: str) -> dict[int, int]:
    """The storages of a file: offset of the first byte -> offset after the last.

    Raises:
        CheckpointError: a record is compressed, too long to be unpickled, or in big-endian order.
    """
    spans = {}
    with zipfile.ZipFile(file) as archive, open(file, "rb") as stream:
        records = archive.infolist()
        within(f"read the tensors of {file}", "records", len(records), MAX_TENSORS)
        for record in records:
            name = record.filename.partition("/")[2]
            if record.compress_type != zipfile.ZIP_STORED:
                _bad(file, f"{record.filename}, a compressed record")
            if name == "data.pkl":
                within(f"read the tensors of {file}", "bytes of pickle", record.file_size, _MAX_PICKLE_BYTES)
            elif name == "byteorder" and archive.read(record) != b"little":
                _bad(file, "numbers in big-endian order")
            elif name.startswith("data/"):
                stream.seek(record.header_offset + 26)  # the lengths of a name and of extra fields
                lengths = stream.read(4)
                start = (
                    record.header_offset
                    + 30
                    + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
                )
                spans[start] = start + record.file_size
    return spans


def _info(file: str, name: object, value: object, records: Mapping[int, int]) -> TensorInfo:
    if not isinstance(name, str) or type(value) not in (torch.Tensor, torch.nn.Parameter):
        found = f"{str(name)[:80]!r}, a {type(value).__name__}"
        _bad(file, found, _PART)
    assert isinstance(value, torch.Tensor)
    plain = value.layout is torch.strided and not (value.is_quantized or value.is_neg() or value.is_conj())
    if not plain or not value.is_contiguous():
        found = f"{name[:80]!r}, whose elements are not stored one after another as numbers of {value.dtype}"
        _bad(file, found)
    base: int = getattr(value.untyped_storage(), "_checkpoint_offset", -1)
    start = base + int(value.storage_offset()) * value.itemsize
    end = start + value.numel() * value.itemsize
    if base not in records:
        _bad(file, f"{name[:80]!r}, whose storage is not where the file says")
    if end > records[base]:
        _bad(file, f"{name[:80]!r}, which ends after the record that holds it")
    return TensorInfo(name, value.dtype, tuple(value.shape), start, end, file)


def _said(file: str, error: Exception) -> str:
    """Why a file is not read, in a line."""
    with open(file, "rb") as stream:
        start = stream.read(8)
    if start == b"version ":
        return "the text of a Git LFS pointer, not the weights"
    if start[:4] == b"PK\x03\x04" and isinstance(error, zipfile.BadZipFile):
        return "a zip file that is cut off, or damaged"
    if start[:4] != b"PK\x03\x04":
        return "no zip file: it is truncated, or as torch.save wrote before PyTorch 1.6"
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # malformed in whichever way
        objects = []
    if objects:
        return f"objects that only unpickling makes, which may run any code: {some(objects)}"
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'malformed'}"


def _bad(file: str, found: str, suggestion: str = _CONVERT) -> NoReturn:
    raise CheckpointError(f"read the tensors of {file}", found, suggestion) from None
