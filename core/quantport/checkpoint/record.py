"""``quantport.json``: which layer of a checkpoint that quantport wrote has which scheme."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantport.checkpoint.format import SavedLayer
from quantport.checkpoint.json import read_json
from quantport.checkpoint.limits import MAX_EXPERTS
from quantport.errors import CheckpointError, needed, shown

Size = Annotated[int, Field(ge=0, lt=2**40)]


class Entry(BaseModel):
    """One quantized layer as saved; ``others`` are the weights of single experts that have another scheme."""

    model_config = ConfigDict(extra="forbid")
    scheme: str
    kind: Literal["linear", "moe", "embedding"]
    weights: list[tuple[str, Size, Size]] = Field(min_length=1, max_length=3)
    experts: int = Field(0, ge=0, le=MAX_EXPERTS)
    tied: list[str] = []
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    others: dict[str, str] = {}

    def each(self) -> Iterator[tuple[str, str, int, int]]:
        """Every weight: its name as in ``Layer.each``, that of its projection, and its shape."""
        for projection, n, k in self.weights:
            single = projection if len(self.weights) > 1 else ""  # a fused layer in parts, or a plain one
            for weight in [f"{e}.{projection}" for e in range(self.experts)] or [single]:
                yield weight, projection, n, k


class Record(BaseModel):
    """The file: format version, the quantized layers by module path, the KV cache that ``generate`` makes,
    and the fallback for devices that cannot run a scheme.
    """

    model_config = ConfigDict(extra="forbid")
    format: Literal[1, 2] = 2  # 1 called 8-bit codes ``weight``, which others read as weights
    layers: dict[str, Entry]
    kv_cache_dtype: str | None = None
    kv_cache_skip_layers: tuple[int, ...] = ()
    fallback: str | None = None


def read_record(path: Path) -> Record:
    """Reads the record of a checkpoint.

    Raises:
        CheckpointError: the record is malformed.
    """
    try:
        return Record.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc']))[:200]} = {shown(first['input'])}: not {needed(first)}"
        raise CheckpointError(
            f"read {path}", found, "the file that quantport wrote, in format 1 or 2"
        ) from None


def entry_of(layer: SavedLayer) -> Entry:
    """What the record says of a layer."""
    schemes = {weight: scheme.name for weight, scheme in layer.schemes.items()}
    most = Counter(schemes.values()).most_common(1)[0][0]
    return Entry.model_validate(
        {
            "scheme": most,
            "kind": layer.kind,
            "weights": list(layer.weights),
            "experts": layer.experts,
            "tied": list(layer.tied),
            "dtype": str(layer.dtype).removeprefix("torch."),
            "others": {name: scheme for name, scheme in schemes.items() if scheme != most},
        }
    )
