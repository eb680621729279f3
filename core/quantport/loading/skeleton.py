"""Builds the module tree of a model without its weights: from a Transformers config, or from any factory."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantport.errors import CheckpointError, QuantportError
from quantport.loading.build_context import building, in_dtype, is_building
from quantport.model.layers import PROJECTIONS

Factory = Callable[[], nn.Module]


def build(
    directory: Path,
    factory: Factory | None,
    dtype: torch.dtype,
    names: Mapping[str, Any],
    say: Callable[[str], None] = lambda _: None,
    config: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, str]]:
    """Builds the model on the meta device.

    Args:
        directory: Of the checkpoint.
        factory: Makes the module; None reads ``config.json`` with Transformers.
        dtype: Dtype of floating parameters.
        names: Tensor names of the checkpoint.
        say: Told what is done now, for people who wait.
        config: Takes the place of ``config.json``.

    Returns:
        ``(model, names)``: the model in eval mode, and for each tensor of the checkpoint its name in the
        model.

    Raises:
        CheckpointError: no factory, and no ``config.json`` that Transformers can build.
    """
    if factory is not None:
        say("building the model")
        return made_by(factory).eval(), {name: name for name in names}
    if config is None and not (directory / "config.json").exists():
        raise CheckpointError(
            f"build the model of {directory}",
            "no config.json",
            "pass model=, a function that makes the module",
        )
    return _transformers(directory, dtype, names, say, config)


def made_by(factory: Factory) -> nn.Module:
    """Makes a module with a factory, on the meta device.

    Raises:
        CheckpointError: it is no factory, raises, or makes something else.
    """
    asked, suggestion = "build the model with model=", "a function that returns a torch.nn.Module"
    if isinstance(factory, nn.Module):
        text = f"{suggestion}; quantport.quantize_ quantizes a module that is in memory"
        raise CheckpointError(asked, f"a {type(factory).__name__} that is made already", text)
    if not callable(factory):
        raise CheckpointError(asked, f"a {type(factory).__name__}: {factory!r}", suggestion)
    try:
        with building():
            made = factory()
    except QuantportError:
        raise
    except Exception as error:  # the caller's code
        found = f"it raised {type(error).__name__}: {error}"
        raise CheckpointError(asked, found, f"{suggestion} and takes no arguments") from error
    if not isinstance(made, nn.Module):
        raise CheckpointError(asked, f"it returned a {type(made).__name__}: {made!r}", suggestion)
    return made


def _transformers(
    directory: Path,
    dtype: torch.dtype,
    names: Mapping[str, Any],
    say: Callable[[str], None],
    described: Mapping[str, Any] | None,
) -> tuple[nn.Module, dict[str, str]]:
    say("importing Transformers")
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise CheckpointError(
            f"build the model of {directory}",
            "Transformers is not installed",
            "pip install 'quantport[transformers]'",
        ) from None
    suggestion = "another version of Transformers, or model=, a function that makes the module"
    try:
        if described is None:
            config = transformers.AutoConfig.from_pretrained(directory)
        else:
            config = transformers.AutoConfig.for_model(**described)
        for part in (config, *(v for v in vars(config).values() if hasattr(v, "quantization_config"))):
            vars(part).pop("quantization_config", None)  # ours: the modules are placed by quantport
        cls = getattr(
            transformers, next(iter(config.architectures or ()), "<no architecture in config.json>")
        )
        say("building the model")
        with building(), _without_weights(transformers.PreTrainedModel):
            model = cls._from_config(config, dtype=dtype)
        if (directory / "generation_config.json").exists() and model.can_generate():
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    except Exception as error:  # Transformers raises a zoo of types on a config that it cannot build
        found = f"Transformers says {type(error).__name__}: {error}"
        raise CheckpointError(f"build the model of {directory}", found, suggestion) from error
    return model.eval(), transformers_names(model, names)


@contextmanager
def _without_weights(base: Any) -> Iterator[None]:
    """Inside, models that this thread builds fill buffers and no weights, which are on meta: filling those
    takes longer than reading them.
    """
    init_weights = base.init_weights

    def init_buffers(model: nn.Module) -> None:
        if is_building():
            with_buffers = {name for name, _ in model.named_buffers()}
            above = {name.rsplit(".", i)[0] for name in with_buffers for i in range(1, name.count(".") + 1)}
            for path, module in model.named_modules():
                if path and path not in above:
                    module._is_hf_initialized = True
        with in_dtype(torch.float32):  # ``from_pretrained`` fills them when it has loaded all else
            init_weights(model)

    base.init_weights = init_buffers
    try:
        yield
    finally:
        base.init_weights = init_weights


def transformers_names(
    model: Any, names: Iterable[str], transforms: Iterable[Any] | None = None
) -> dict[str, str]:
    """Applies the renamings that Transformers keeps for checkpoints of this architecture (experts are fused
    by us).

    Args:
        model: The model.
        names: Names of the tensors of a checkpoint.
        transforms: What Transformers does to them; by default what it knows of the architecture.

    Raises:
        QuantportError: Transformers computes one of them from others.
    """
    names = frozenset(names)
    loading, renamings, converters = _transforms(model, transforms)
    known = model.state_dict()
    out = {}
    for name in sorted(names, key=loading.dot_natural_key):  # some renamings depend on those before
        out[name], _ = loading.rename_source_key(name, renamings, [], model.base_model_prefix, known)
        if out[name] not in known and name in known:
            out[name] = name
            continue
        converter = next((c for c in converters if c.rename_source_key(out[name])[1] is not None), None)
        if converter is not None and not _fuses_experts(converter):
            operations = ", ".join(type(o).__name__ for o in converter.operations)
            raise QuantportError(
                f"load {name} into {type(model).__name__}",
                f"Transformers converts it with {operations}",
                "load it with Transformers, save_pretrained it, and load that",
            )
    return out


def _transforms(model: Any, transforms: Iterable[Any] | None = None) -> tuple[Any, list[Any], list[Any]]:
    """The module of Transformers that converts checkpoints, and what it renames and converts of this
    architecture, or of ``transforms``.
    """
    loading = importlib.import_module("transformers.core_model_loading")
    if transforms is None:
        mapping = importlib.import_module("transformers.conversion_mapping")
        transforms = mapping.get_model_conversion_mapping(model)
    transforms = list(transforms)
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    return loading, [t for t in transforms if not isinstance(t, loading.WeightConverter)], converters


def stores_experts_apart(model: nn.Module, path: str) -> bool:
    """Whether checkpoints of the architecture hold the experts of this module one by one, as ``gate_proj``,
    ``up_proj`` and ``down_proj``: what others load where they are written so. Models that are not of
    Transformers have no other names.
    """
    if not hasattr(model, "base_model_prefix"):
        return True
    of: Any = model
    loading, renamings, converters = _transforms(of)
    known = dict.fromkeys(f"{path}.{fused}" for fused in ("gate_up_proj", "down_proj"))
    names = {f"{path}.0.{part}.weight" for part in PROJECTIONS}
    found = {
        loading.rename_source_key(n, renamings, converters, of.base_model_prefix, known)[0] for n in names
    }
    return found == set(known)


def _fuses_experts(converter: Any) -> bool:
    """Whether a conversion stacks gate, up and down of every expert, or transposes the stacks, as is done
    here.
    """
    fused = ("experts.gate_up_proj", "experts.down_proj")
    targets = [target.replace("\\", "") for target in converter.target_patterns]
    operations = {type(operation).__name__ for operation in converter.operations}
    known = operations <= {"MergeModulelist", "Concatenate"} or operations == {"Transpose"}
    return known and all(t.endswith(fused) for t in targets)
