"""Writes a quantized checkpoint that ``load`` reads back bit-identically."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantport.checkpoint import save_tensors
from quantport.errors import SaveError
from quantport.kvcache import default_of
from quantport.loading.quantport_format import FILE, Record, SavedLayer
from quantport.modules import QuantEmbedding, QuantExperts, QuantModule

_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens*",
    "added_tokens*",
    "chat_template*",
    "generation_config.json",
    "*.model",
)


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Saves a quantized model: safetensors in the stored layout of each scheme, config, tokenizer, and
    ``quantport.json``.

    Args:
        model: A model with quantized layers.
        directory: Must not exist, or be empty, unless ``overwrite``.
        overwrite: Replace what is there.
        max_shard_bytes: Size of one file.

    Returns:
        The directory. It appears complete or not at all.

    Raises:
        SaveError: nothing to save, the directory is taken, the disk is full, or permission is missing.
    """
    layers = {name: _entry(m) for name, m in model.named_modules() if isinstance(m, QuantModule)}
    # where others are quantized, a prepacked bf16 layer is saved as the plain layer that it was: prepacking
    # is this machine's
    layers = {
        name: entry for name, entry in layers.items() if entry.scheme != "bf16" or entry.others
    } or layers
    if not layers:
        raise SaveError(
            f"save {type(model).__name__}",
            "it has no quantized layer",
            "quantport.load or quantport.quantize_ first",
        )
    cache = default_of(model)
    record = Record(layers=layers)
    if cache:
        record = record.model_copy(
            update={"kv_cache_dtype": cache.dtype, "kv_cache_skip_layers": cache.skip_layers}
        )
    files = {FILE: record.model_dump_json(indent=1).encode()}
    source = getattr(model, "name_or_path", "")
    directory_of = Path(source) if source else None
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        data = {**config.to_dict(), "quantization_config": {"quant_method": "quantport"}}
        data.setdefault("architectures", [type(model).__name__])
        files["config.json"] = json.dumps(data, indent=2, default=str).encode()
    companions = (
        sorted({p for g in _COMPANIONS for p in directory_of.glob(g) if p.is_file()}) if directory_of else []
    )
    return save_tensors(
        directory,
        _tensors(model),
        max_shard_bytes=max_shard_bytes,
        files=files,
        copy=companions,
        overwrite=overwrite,
    )


def _entry(module: QuantModule) -> SavedLayer:
    experts = module.num_experts if isinstance(module, QuantExperts) else 0
    names = list(module.specs)[:3] if experts or len(module.specs) > 1 else ["weight"]
    specs = list(module.specs.values())[: len(names)]
    weights = [(name.rpartition(".")[2], s.n, s.k) for name, s in zip(names, specs, strict=True)]
    dtype: Any = str(module.dtype).removeprefix("torch.")
    table = isinstance(module, QuantEmbedding)
    kind: Any = "moe" if experts else "embedding" if table else "linear"
    tied = list(module.tied) if isinstance(module, QuantEmbedding) else []
    schemes = {name: spec.scheme.unsolved.name for name, spec in module.specs.items()}
    most = Counter(schemes.values()).most_common(1)[0][0]
    others = {name: scheme for name, scheme in schemes.items() if scheme != most}
    return SavedLayer(
        scheme=most, kind=kind, weights=weights, experts=experts, dtype=dtype, tied=tied, others=others
    )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state dict, one at a time; a tensor that two modules share is written once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, QuantModule):
            yield from ((prefix + name, tensor) for name, tensor in module.stored_tensors())
        kept = [
            *module._parameters.items(),
            *((n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set),
        ]
        for name, tensor in kept:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield prefix + name, tensor.detach()
