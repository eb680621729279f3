"""The seam for checkpoint formats: who recognizes a checkpoint, and what each stored weight is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantport.checkpoint.companions import companions
from quantport.checkpoint.shard import Fill, OneFile, Stream, TensorLayout
from quantport.checkpoint.source import Rows, TensorSource
from quantport.checkpoint.writer import save_tensors
from quantport.errors import SaveError
from quantport.model.layers import Layer, Part
from quantport.scheme import Scheme
from quantport.scheme.catalog import Schemes


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is quantized already: its bits are taken over, never quantized again.

    Attributes:
        scheme: What it is.
        tensors: Names of the stored tensors that it takes, which are released once it is read.
        read: Returns the tensors of ``scheme.layout`` for rows ``[start, stop)``, which begin and end with
            blocks of the scheme and come in order; they may be views of what is stored.
        keys: For each of those tensors the stored one that it is, of the whole weight; empty where ``read``
            makes them of others.
        size: Bytes that are read for it; None for those of ``tensors``.
        source: Where ``keys`` are read; None for the source of the checkpoint.
    """

    scheme: Scheme
    tensors: tuple[str, ...]
    read: Callable[[slice], dict[str, Tensor]]
    keys: Mapping[str, str] = field(default_factory=dict)
    size: int | None = None
    source: TensorSource | None = None


@dataclass(frozen=True)
class KVCacheConfig:
    """The KV cache that a checkpoint was saved with.

    Attributes:
        dtype: As ``kv_cache_dtype`` of a configuration.
        skip_layers: Layers whose cache stays in 16 bits.
    """

    dtype: str | None = None
    skip_layers: tuple[int, ...] = ()


class Recognized(ABC):
    """A checkpoint as its format understands it.

    Args:
        format_name: Name of the format.
        source: Its tensors.

    Attributes:
        converts: Whether ``read`` gives the values of quantized weights too, so that they can be quantized to
            another scheme.
    """

    converts = False

    def __init__(self, format_name: str, source: TensorSource) -> None:
        self.format_name, self.source = format_name, source

    @abstractmethod
    def layers(self) -> list[Layer]:
        """Every layer, with the stored tensors that its weights take as ``Layer.parts``.

        A tensor that none of them takes stays as it is stored.

        Raises:
            CheckpointError: a tensor is absent, or is not what the format says.
        """

    def quantized(self) -> Mapping[str, Mapping[str, QuantizedWeight]]:
        """The layers that are quantized already: layer name -> weight name of ``Layer.each`` -> weight.

        They are kept as they are, and everything else stays as it is stored, unless another scheme is asked
        for. Empty for a checkpoint that is to be quantized.
        """
        return {}

    def notices(self) -> tuple[str, ...]:
        """For people: what of the checkpoint is not used as it was meant."""
        return ()

    def kv_cache(self) -> KVCacheConfig:
        """The KV cache that it was saved with."""
        return KVCacheConfig()

    def config(self) -> Mapping[str, Any] | None:
        """``config.json`` of the model, where the files of the tensors say it themselves; None where
        ``config.json`` beside them is what counts.

        Raises:
            CheckpointError: it cannot be made of what they say.
        """
        return None

    @property
    def home(self) -> Path:
        """What a model remembers of where it came from: the directory, or the file that says all of it."""
        return self.source.directory

    def companions(self) -> Mapping[str, bytes | Path]:
        """The files that are written beside the weights where the model is saved, by name."""
        return companions(self.source.directory)

    def pretrained(self) -> Mapping[str, str]:
        """The arguments with which ``from_pretrained`` of Transformers finds its tokenizer."""
        return {"pretrained_model_name_or_path": str(self.source.directory)}

    def fallback(self) -> str | None:
        """What it was saved to do where a device cannot run a scheme; None where it does not say."""
        return None

    def read(self, part: Part) -> tuple[Tensor, Callable[[], None]]:
        """The 16- or 32-bit values ``[n, k]`` of a part, and what to call when they have been used."""
        some = None if part.start is None or not part.in_place else slice(part.start, part.stop)
        rows: Rows | None = some
        if part.experts:
            each = self.source.tensors[part.tensor].shape[0] // part.experts
            rows = slice((part.expert or 0) * each, ((part.expert or 0) + 1) * each)
        elif part.expert is not None:
            rows = slice(part.expert, part.expert + 1) if some is None else (part.expert, some)
        tensor, release = self.source.read(part.tensor, rows), partial(self.source.release, part.tensor, rows)
        if tensor.dim() == 3:
            tensor = tensor[0]
        if not part.in_place or part.experts:
            tensor = part.select_rows(tensor)
        elif part.columns is None:
            return tensor, release
        else:
            tensor = part.select_columns(tensor)
        # contiguous for the kernels that quantize it: a copy, which the source is not needed for
        return tensor.contiguous(), release


@dataclass(frozen=True)
class SavedLayer:
    """A quantized layer that is to be written.

    Attributes:
        kind: ``linear``, ``moe`` or ``embedding``.
        weights: Logical weights ``(name, n, k)``, as of ``Layer``.
        schemes: The scheme of each weight, in the order in which they are stored.
        experts: Number of experts, 0 for other layers.
        dtype: Activation dtype.
        tied: Names of other layers that share its weight.
        apart: Whether checkpoints of the architecture hold its experts one by one under these names, as
            others load them; of no meaning without experts.
    """

    kind: str
    weights: tuple[tuple[str, int, int], ...]
    schemes: Mapping[str, Scheme]
    experts: int
    dtype: torch.dtype
    tied: tuple[str, ...] = ()
    apart: bool = True


@dataclass(frozen=True)
class SavedModel:
    """A quantized model that is to be written, without its tensors.

    Attributes:
        layers: The quantized layers, by module path.
        config: ``config.json``; None where it has none.
        kept_linear: Module paths of the linear layers that are not quantized.
        kv_cache: Its KV cache.
        fallback: What it does where a device cannot run a scheme; None where that is not known.
    """

    layers: Mapping[str, SavedLayer]
    config: Mapping[str, Any] | None = None
    kept_linear: Sequence[str] = ()
    kv_cache: KVCacheConfig = KVCacheConfig()
    fallback: str | None = None


@dataclass(frozen=True)
class SaveTarget:
    """Where a checkpoint goes; attributes as the arguments of `save_tensors`, ``files`` without
    ``config.json``.
    """

    directory: str | os.PathLike[str]
    files: Mapping[str, bytes | Path] = field(default_factory=dict)
    overwrite: bool = False
    max_shard_bytes: int = 5_000_000_000
    resume: str = ""
    stem: str = "model"

    def save(
        self,
        tensors: Stream | Fill,
        layout: TensorLayout | None,
        files: Mapping[str, bytes | Path],
        into: OneFile | None = None,
    ) -> Path:
        """Writes safetensors, or a file in place of them, and further files beside them.

        Raises:
            SaveError: as `save_tensors`.
        """
        return save_tensors(
            self.directory,
            tensors,
            layout=layout,
            max_shard_bytes=self.max_shard_bytes,
            files={**self.files, **files},
            overwrite=self.overwrite,
            resume=self.resume,
            into=into,
            stem=self.stem,
        )


class CheckpointFormat(ABC):
    """A way to store models.

    Attributes:
        name: Unique among the formats.
        default: Whether ``auto`` writes it where it holds a model; of the first that does.
        file_suffix: What the path of a single file that it writes ends with; empty where it writes
            directories only.
    """

    name: str
    default: bool = False
    file_suffix: str = ""

    def open(self, path: Path, *, headers_only: bool = False) -> TensorSource | None:
        """Opens files of this format that are no safetensors; None for all others.

        Args:
            path: What the user named: a file or a directory.
            headers_only: Nothing will be read: the data may be missing.
        """
        return None

    @abstractmethod
    def recognize(
        self, source: TensorSource, config: Mapping[str, Any], schemes: Schemes
    ) -> Recognized | None:
        """Says whether a checkpoint is of this format, from names, shapes and configuration alone.

        Args:
            source: The tensors; none is read but small ones that say what others are.
            config: ``config.json``; empty where there is none.
            schemes: Every scheme that is known.

        Returns:
            None for the checkpoints of others.

        Raises:
            CheckpointError: it is of this format, and malformed.
        """

    def write(
        self, model: SavedModel, tensors: Stream | Fill, layout: TensorLayout | None, to: SaveTarget
    ) -> Path:
        """Writes a checkpoint that `recognize` takes.

        Args:
            model: What the model is beside its tensors.
            tensors: Every tensor, those of quantized layers as ``module.weight.key`` with the keys of
                ``Scheme.layout``; pieces and a function as for `save_tensors`.
            layout: As for `save_tensors`.
            to: Where to; writes the files.

        Returns:
            The directory, or the file.

        Raises:
            SaveError: as `save_tensors`; or the format is only read, or cannot hold a scheme.
        """
        raise SaveError(
            f"save a checkpoint to {to.directory}", f"format {self.name!r} is only read", "'quantport'"
        )

    def refusal(self, model: SavedModel) -> str | None:
        """Why `write` refuses a model, or what of it would be lost; None where all of it comes back."""
        return "it is only read" if type(self).write is CheckpointFormat.write else None
