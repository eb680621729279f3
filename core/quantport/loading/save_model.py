"""Writes a quantized checkpoint that ``load`` reads back bit-identically."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantport.checkpoint import (
    BUILTIN_FORMATS,
    CheckpointFormat,
    KVCacheConfig,
    SavedLayer,
    SavedModel,
    SaveTarget,
)
from quantport.checkpoint.shard import Fill, Stream, TensorLayout
from quantport.errors import SaveError
from quantport.loading.arguments import require_module
from quantport.loading.kv_caches import default_of
from quantport.loading.locate import companions_of
from quantport.loading.skeleton import stores_experts_apart
from quantport.modules import QuantEmbedding, QuantExperts, QuantModule
from quantport.planning.memory import STEP
from quantport.plugins.registry import Registry, default_registry

# of a configuration: where a model was loaded from, and how it was quantized before
_DROPPED = ("_name_or_path", "quantization_config")
SHARD = 5_000_000_000  # bytes
OWN = "quantport"
AUTO = "auto"


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_bytes: int = SHARD,
    format: str = OWN,  # noqa: A002  # as every library calls it
    registry: Registry | None = None,
) -> Path:
    """Saves a quantized model: its weights, its configuration as it is now, and the files that lay beside the
    weights that it was loaded from. Written tensor by tensor: what its kernel has packed in another layout is
    unpacked meanwhile.

    Args:
        model: A model with quantized layers.
        directory: Must not exist, or be empty, unless ``overwrite``. In ``gguf`` a path that ends with
            ``.gguf`` is that of one file, which has configuration and tokenizer inside.
        overwrite: Replace what is there.
        max_shard_bytes: Size of one file; a model in ``gguf`` is one file always.
        format: ``quantport`` holds every scheme; or another format that can be written, such as
            ``compressed-tensors``, which others load, and which holds the schemes that it knows; ``auto`` is
            that one where nothing is lost, otherwise ``quantport``, with a warning that says why.
        registry: Where formats come from; by default that of the process.

    Returns:
        The directory, or the file. It appears complete or not at all.

    Raises:
        ConfigError: it is no module.
        SaveError: nothing to save, the directory is taken, the disk is full, or permission is missing.
    """
    require_module("save a quantized model", model)
    described = described_model(model)
    to, reason = format_of(described, format, directory, registry)
    if reason:
        warnings.warn(reason, UserWarning, stacklevel=2)
    return write_model(
        model,
        described,
        directory,
        _tensors(model),
        layout_of(modules_to_save(model)),
        to=to,
        registry=registry,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
    )


def format_of(
    model: SavedModel, name: str, directory: str | os.PathLike[str], registry: Registry | None
) -> tuple[CheckpointFormat, str]:
    """The format that a model is written in; where ``auto`` comes to quantport's own also why, for people.

    Raises:
        SaveError: none of this name is written, or not to such a path.
    """
    to = format_at(directory, name, registry)
    if to is not None:
        return to, ""
    reasons, formats = [f"written as {OWN}"], _formats(registry)
    for known in formats.values():
        if known.default:
            reason = known.refusal(model)
            if reason is None:
                return known, ""
            reasons.append(f"not as {known.name}: {reason}")
    return formats[OWN], "; ".join(reasons)


def format_at(path: str | os.PathLike[str], name: str, registry: Registry | None) -> CheckpointFormat | None:
    """The format of a name that is written to a path; of ``auto`` that of which the path is a file, or None.

    Raises:
        SaveError: none of this name is written, or the path is that of a file of another.
    """
    formats = _formats(registry)
    of_file = next((f for f in formats.values() if f.file_suffix and str(path).endswith(f.file_suffix)), None)
    if name == AUTO:
        return of_file
    if of_file is not None and name != of_file.name and name in formats:
        asked, found = f"save as format {name!r} to {path}", f"a path of a file of {of_file.name}"
        raise SaveError(asked, found, f"format={of_file.name!r}, or a path that is a directory")
    writable = [n for n, f in formats.items() if type(f).write is not CheckpointFormat.write]
    if name not in writable:
        found = "a format that is only read" if name in formats else "no such format"
        names = ", ".join(map(repr, (AUTO, *writable)))
        raise SaveError(f"save as format {name!r}", found, f"one of {names}")
    return formats[name]


def why_not_written(model: SavedModel, name: str, registry: Registry | None = None) -> str | None:
    """Why a format does not hold a model, or what of it would be lost; None where all of it comes back.

    Args:
        model: From `described_model`.
        name: Of the format.
        registry: As for `save`.
    """
    known = _formats(registry).get(name)
    return known.refusal(model) if known else "no such format"


def _formats(registry: Registry | None) -> dict[str, CheckpointFormat]:
    registry = registry or default_registry()
    return {f.name: f for f in (*BUILTIN_FORMATS, *registry.formats.values())}


def write_model(
    model: nn.Module,
    described: SavedModel,
    directory: str | os.PathLike[str],
    tensors: Stream | Fill,
    layout: TensorLayout,
    *,
    to: CheckpointFormat,
    registry: Registry | None,
    overwrite: bool,
    max_shard_bytes: int,
    resume: str = "",
) -> Path:
    """Writes what a model is beside its tensors, and the tensors that are given.

    Args:
        model: Says where it came from; its weights are not looked at.
        described: From `described_model`.
        directory: As for `save`.
        tensors: As for `save_tensors`.
        layout: As for `save_tensors`.
        to: Writes it.
        registry: As for `save`.
        overwrite: As for `save`.
        max_shard_bytes: As for `save`.
        resume: As for `save_tensors`.
    """
    home = getattr(model, "name_or_path", "")
    files = dict(companions_of(home, registry or default_registry()))
    if generation := _generation_config(model):
        files["generation_config.json"] = generation
    of_diffusers = "_class_name" in (described.config or {})
    stem = "diffusion_pytorch_model" if of_diffusers else "model"  # as each library looks for them
    target = SaveTarget(directory, files, overwrite, max_shard_bytes, resume, stem)
    return to.write(described, tensors, layout, target)


def described_model(model: nn.Module) -> SavedModel:
    """What a model is beside its tensors.

    Raises:
        SaveError: it has no quantized layer, or is a share of a model.
    """
    decided = getattr(model, "quantport_plan", None)
    dtensors = (name for name, parameter in model.named_parameters() if hasattr(parameter, "full_tensor"))
    shared = next(dtensors, None)
    if (decided and decided.shard) or shared:
        what = "a share of the model" if shared is None else f"a share of {shared}"
        found = f"this process holds {what}, others the rest"
        raise SaveError(f"save {type(model).__name__}", found, "load it in one process, and save that")
    layers = {
        name: _saved_layer(m, model, name) for name, m in model.named_modules() if isinstance(m, QuantModule)
    }
    # where others are quantized, a prepacked bf16 layer is saved as the plain layer that it was: prepacking
    # is this machine's
    layers = {
        name: layer for name, layer in layers.items() if {s.name for s in layer.schemes.values()} != {"bf16"}
    } or layers
    if not layers:
        raise SaveError(
            f"save {type(model).__name__}",
            "it has no quantized layer",
            "quantport.load or quantport.quantize_ first",
        )
    cache = default_of(model)
    return SavedModel(
        layers,
        _config(model),
        [name for name, module in model.named_modules() if type(module) is nn.Linear or _is_bf16(module)],
        KVCacheConfig(cache.dtype, tuple(cache.skip_layers)) if cache else KVCacheConfig(),
        decided.config.fallback if decided else None,
    )


def _is_bf16(module: nn.Module) -> bool:
    """Whether a module is a linear layer that is only prepacked."""
    return isinstance(module, QuantModule) and {s.scheme.name for s in module.specs.values()} == {"bf16"}


def _config(model: nn.Module) -> dict[str, Any] | None:
    """What ``config.json`` says of the model as it is now; None of one that has no configuration."""
    described: Any = getattr(model, "config", None)
    if hasattr(described, "to_dict"):
        config = described.to_dict()
        if getattr(type(model), "config_class", None) or not config.get("architectures"):
            config["architectures"] = [type(model).__name__]  # not that of a wrapper around the model
    elif isinstance(described, Mapping) and callable(to_json := getattr(model, "to_json_string", None)):
        config = json.loads(to_json())  # of Diffusers
    else:
        return None
    cleaned: dict[str, Any] = _without(config, _DROPPED)
    return cleaned


def _without(value: Any, dropped: Sequence[str]) -> Any:
    """A configuration without some keys, in its inner configurations too."""
    if isinstance(value, Mapping):
        return {key: _without(inner, dropped) for key, inner in value.items() if key not in dropped}
    return value


def _generation_config(model: nn.Module) -> bytes | None:
    """How the model generates, as it was changed since it was loaded; None where it does not."""
    config: Any = getattr(model, "generation_config", None)
    if config is None or not callable(to_json := getattr(config, "to_json_string", None)):
        return None
    described = _without(json.loads(to_json()), ("_from_model_config", "compile_config"))
    return json.dumps(described, indent=2, sort_keys=True).encode()


def _saved_layer(module: QuantModule, model: nn.Module, path: str) -> SavedLayer:
    experts = module.num_experts if isinstance(module, QuantExperts) else 0
    names = list(module.specs)[:3] if experts or len(module.specs) > 1 else ["weight"]
    specs = list(module.specs.values())[: len(names)]
    weights = tuple((name.rpartition(".")[2], s.n, s.k) for name, s in zip(names, specs, strict=True))
    kind = "moe" if experts else "embedding" if isinstance(module, QuantEmbedding) else "linear"
    tied = tuple(module.tied) if isinstance(module, QuantEmbedding) else ()
    schemes = {name: spec.scheme.unsolved for name, spec in module.specs.items()}
    apart = not experts or stores_experts_apart(model, path)
    return SavedLayer(kind, weights, schemes, experts, module.dtype, tied, apart)


Saved = tuple[str, nn.Module, dict[str, Tensor]]
"""A module with the prefix of its names, and the parameters and buffers that are saved with it."""


def layout_of(modules: Iterable[Saved], dtypes: Mapping[str, torch.dtype] | None = None) -> TensorLayout:
    """Shape and dtype of each tensor that saving writes, by name.

    Args:
        modules: From `modules_to_save`.
        dtypes: Of parameters and buffers that are yet to get theirs.
    """
    known, layout = dtypes or {}, dict[str, tuple[tuple[int, ...], torch.dtype]]()
    for prefix, module, kept in modules:
        if isinstance(module, QuantModule):
            layout |= {prefix + name: (shape, dtype) for name, shape, dtype in module.stored_layout()}
        for name, tensor in kept.items():
            layout[prefix + name] = tuple(tensor.shape), known.get(prefix + name, tensor.dtype)
    return layout


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module, kept in modules_to_save(model):
        if isinstance(module, QuantModule):  # large weights some rows at a time
            yield from ((prefix + name, tensor) for name, tensor in module.stored_rows(STEP))
        yield from ((prefix + name, tensor.detach()) for name, tensor in kept.items())


def modules_to_save(model: nn.Module) -> Iterator[Saved]:
    """Each module with what is saved of it; a tensor that two modules share belongs to the first."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        both = (
            *module.named_parameters(recurse=False),
            *((n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set),
        )
        kept = {name: tensor for name, tensor in both if tensor is not None and id(tensor) not in seen}
        seen |= set(map(id, kept.values()))
        yield prefix, module, kept
