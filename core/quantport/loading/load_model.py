"""``load``: a checkpoint, quantized while it streams in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantport.checkpoint import Checkpoint
from quantport.device import Device
from quantport.errors import BudgetError, CheckpointError, ConfigError, DeviceError
from quantport.kvcache import default_cache, kv_shape
from quantport.loading import quantport_format
from quantport.loading.build_context import as_usual
from quantport.loading.copy_tensors import SLAB, copy_into
from quantport.loading.executor import Progress, Task, run_tasks
from quantport.loading.locate import locate, refuse_quantized
from quantport.loading.plan_model import Source, merge, refuse_nothing
from quantport.loading.skeleton import Factory, build, read_json
from quantport.loading.swap_modules import NO_MODULE, by_module, check, make_module, put
from quantport.loading.weight_tasks import quantize_tasks
from quantport.model.layers import Layer, Part, find_layers
from quantport.modules import QuantModule
from quantport.planning.plan import Plan, Step, make_plan
from quantport.plugins.registry import Registry, default_registry

HALVES = (torch.bfloat16, torch.float16)


def load(
    path_or_id: Source,
    scheme: str | None = None,
    *,
    config: Any = None,
    device: str | torch.device | Device = "auto",
    model: Factory | None = None,
    dtype: torch.dtype | None = None,
    rows: int = 1,
    fallback: str | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
    budget: int | str | None = None,
    registry: Registry | None = None,
) -> Any:
    """Loads a checkpoint and quantizes it while it streams in: never is the 16-bit model in memory.

    Args:
        path_or_id: Checkpoint directory, safetensors file, or a model id of the hub.
        scheme: Scheme name; None uses the configuration, or lets the device choose and say why.
        config: A ``QuantConfig`` or what it parses.
        device: ``auto`` takes the best device found.
        model: Makes the module; by default Transformers builds it from ``config.json``.
        dtype: Dtype of what stays in 16 bits; by default that of the checkpoint, or what the device
            computes in.
        rows: Expected rows of the activations, for choosing kernels.
        fallback: Overrides ``config.fallback``.
        progress: Called with (bytes done, bytes in total, name).
        workers: Tensors that are quantized at a time; the number of cores by default.
        budget: Memory that streaming may take beside the loaded model, in bytes or as ``"512MB"``; by default
            512 MiB, or what the largest weight needs.
        registry: Where backends and schemes come from; by default that of the process.

    Returns:
        The model, in eval mode on the device, with the plan as ``model.quantport_plan``.

    Raises:
        QuantportError: with what was asked, what was found, and what would work. No model is left half
            loaded.
    """
    registry = registry or default_registry()
    target = _usable(registry.device(device))
    directory = locate(path_or_id)
    parsed = merge(scheme, config, {"fallback": fallback}, registry.schemes)
    with as_usual(), Checkpoint.open(directory) as checkpoint:
        record = quantport_format.read(checkpoint.directory)
        if record is None:
            refuse_quantized(checkpoint)
            layers = find_layers(checkpoint.tensors)
        elif scheme is not None or quantport_format.asks_weights(config):
            raise ConfigError(
                f"quantize {directory} while loading",
                "it is a quantport checkpoint: quantized already",
                "load it without scheme=; of config= only kv_cache_dtype and kv_cache_skip_layers",
            )
        else:
            layers = quantport_format.layers(record, checkpoint, registry.schemes)
            parsed = quantport_format.config(record, fallback or "weight_only", parsed, registry.schemes)
        compute = dtype or _dtype(layers, target)
        built, names = build(checkpoint.directory, model, compute, checkpoint.tensors)
        place = partial(_place, names)
        layers = check(layers, built, place)
        _homeless(built, layers, directory)
        if record is not None:
            _placed(layers, record)
        cache = default_cache(built, parsed.kv_cache_dtype, parsed.kv_cache_skip_layers)
        kernels, kv = (
            registry.kernels(target.kind),
            kv_shape(read_json(checkpoint.directory / "config.json")),
        )
        decided = make_plan(
            layers,
            parsed,
            target,
            kernels,
            registry.schemes,
            source=str(path_or_id),
            rows=rows,
            dtype=compute,
            kv=kv,
            budget=budget,
        )
        refuse_nothing(decided)
        _fits(decided, target)
        tasks = _Loader(
            checkpoint, built, decided, names, place, compute, dtype is not None, record is not None, registry
        ).tasks()
        run_tasks(tasks, progress, workers, decided.budget)
        _finish(built, decided, target)
        if cache:
            cache.install()
    return built


class _Loader:
    """Places empty quantized modules into a model on meta, and makes the tasks that fill it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        decided: Plan,
        names: Mapping[str, str],
        place: Callable[[Layer], str],
        dtype: torch.dtype,
        explicit: bool,
        stored: bool,
        registry: Registry,
    ) -> None:
        self.checkpoint, self.model, self.plan, self.names = checkpoint, model, decided, names
        self.place, self.dtype, self.explicit, self.stored = place, dtype, explicit, stored
        self.registry = registry
        self.device, self.slab = decided.device.torch_device, min(SLAB, decided.budget)

    def tasks(self) -> list[Task]:
        """One task for each weight and for each other tensor, in the order of the files."""
        out: list[Task] = []
        new: dict[str, nn.Module] = {}
        taken: set[str] = set()
        for path, steps in by_module(self.plan.steps, self.place).items():
            module = new[path] = make_module(steps, self.model.get_submodule(path), self.dtype, self.registry)
            if self.stored:
                out += self._stored_tasks(steps[0].layer.home, module)
            else:
                out += [task for step in steps for task in self._fresh_tasks(step, module)]
            taken |= _tensors(steps[0].layer)
        for step in self.plan.steps:
            fused = any(p.expert is not None for ps in step.layer.parts.values() for p in ps)
            if not step.choice and step.layer.experts and not fused and step.note != NO_MODULE:
                out += self._fuse_tasks(step.layer)
                taken |= _tensors(step.layer)
        put(self.model, new)
        for name, info in self.checkpoint.tensors.items():
            if name not in taken:
                _check_shape(self.model, self.names[name], info.shape)
                out.append(Task(name, info.nbytes, partial(self._copy, name), min(self.slab, info.nbytes)))
        order = {name: i for i, name in enumerate(self.checkpoint.tensors)}
        return sorted(out, key=lambda t: order[t.name])

    def _fuse_tasks(self, layer: Layer) -> Iterable[Task]:
        """Fills the fused 3-D weights of experts that stay in 16 bits from the tensors of each expert."""
        module = self.model.get_submodule(self.place(layer))
        rows = {
            "gate_proj": ("gate_up_proj", 0),
            "up_proj": ("gate_up_proj", layer.weights[0][1]),
            "down_proj": ("down_proj", 0),
        }
        for name in ("gate_up_proj", "down_proj"):
            old = module._parameters[name]
            assert old is not None  # why_not_experts checked it
            empty = torch.empty(old.shape, dtype=self._cast(layer.dtype), device=self.device)
            module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for projection, n, k in layer.weights:
            target, start = rows[projection]
            fused = module._parameters[target]
            assert fused is not None  # set above
            for e, part in enumerate(layer.parts[projection]):
                size = n * k * layer.dtype.itemsize
                run = partial(
                    copy_into, self.checkpoint, fused.data[e, start : start + n], part.tensor, self.slab
                )
                yield Task(part.tensor, size, run, min(self.slab, size))

    def _cast(self, stored: torch.dtype) -> torch.dtype:
        """The dtype of a tensor that stays: 16-bit floats follow the model, all floats follow a dtype that
        was asked for.
        """
        return self.dtype if stored in HALVES or (self.explicit and stored is torch.float32) else stored

    def _fresh_tasks(self, step: Step, module: QuantModule) -> Iterable[Task]:
        target, nonfinite = self.plan.device, self.plan.config.nonfinite
        return quantize_tasks(
            step,
            module,
            self._read,
            nonfinite,
            self.registry.backends[target.kind].quantize_weight,
            self.device,
            storage_only_dtypes=target.arch.storage_only_dtypes,
        )

    def _read(self, part: Part) -> tuple[Tensor, Callable[[], None]]:
        rows: Any = None if part.start is None else slice(part.start, part.stop)
        if part.expert is not None:
            rows = slice(part.expert, part.expert + 1) if rows is None else (part.expert, rows)
        tensor = self.checkpoint.read(part.tensor, rows)
        whole = part.expert is not None and part.start is None
        return tensor[0] if whole else tensor, partial(self.checkpoint.release, part.tensor, rows)

    def _stored_tasks(self, name: str, module: QuantModule) -> Iterable[Task]:
        for weight, spec in module.specs.items():
            keys = {k: f"{name}.{weight}.{k}".replace("..", ".") for k in spec.scheme.layout(spec.n, spec.k)}
            size = sum(self.checkpoint.tensors[full].nbytes for full in keys.values())
            yield Task(
                next(iter(keys.values())), size, partial(self._install, module, weight, keys), 2 * size
            )

    def _install(self, module: QuantModule, weight: str, keys: Mapping[str, str]) -> None:
        stored = {k: self.checkpoint.read(name).to(self.device, copy=True) for k, name in keys.items()}
        for name in keys.values():
            self.checkpoint.release(name)
        module.set_weight(weight, stored)

    def _copy(self, name: str) -> None:
        info = self.checkpoint.tensors[name]
        target = torch.empty(info.shape, dtype=self._cast(info.dtype), device=self.device)
        copy_into(self.checkpoint, target, name, self.slab)
        _assign(self.model, self.names[name], target)


def _tensors(layer: Layer) -> set[str]:
    return {p.tensor for parts in layer.parts.values() for p in parts}


def _usable(target: Device) -> Device:
    """Checks that one can load to a device."""
    if target.simulated:
        suggestion = (
            "a device that `quantport devices` lists; quantport.plan works for devices that are not here"
        )
        raise DeviceError(f"load to {target}", "it is simulated: nothing runs on it", suggestion)
    return target


def _homeless(model: nn.Module, layers: Sequence[Layer], source: object) -> None:
    """Refuses a model that has a module for none of the layers; single layers without one are named in the
    plan.
    """
    usable = any(layer.kind != "other" and not layer.keep for layer in layers)
    lost = [layer.name for layer in layers if layer.keep == NO_MODULE]
    if lost and not usable:
        found = (
            f"no module for any layer ({lost[0]}, ...); it has: "
            f"{', '.join(n for n, _ in list(model.named_modules())[1:6])}"
        )
        raise CheckpointError(
            f"load {source} into {type(model).__name__}", found, "the model that the checkpoint was made from"
        )


def _placed(layers: Iterable[Layer], record: quantport_format.Record) -> None:
    """Refuses a saved checkpoint whose quantized layers the model does not have."""
    for layer in layers:
        if layer.name in record.layers and layer.keep and not layer.opt_in:
            raise CheckpointError(
                f"load the quantized layer {layer.name}",
                layer.keep,
                "the model that the checkpoint was saved from",
            )


def _check_shape(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return
    parameter, buffer = module._parameters.get(leaf), module._buffers.get(leaf)
    old = buffer if parameter is None else parameter
    if old is not None and tuple(old.shape) != tuple(shape):
        raise CheckpointError(
            f"load {name} into {type(module).__name__}",
            f"shape {list(shape)} in the checkpoint",
            f"shape {list(old.shape)}: a checkpoint and a model of the same sizes",
        )


def _place(names: Mapping[str, str], layer: Layer) -> str:
    """Path of the module of a layer, whose tensors may be renamed between checkpoint and model."""
    part = next(p for parts in layer.parts.values() for p in parts)
    renamed = names.get(part.tensor, part.tensor)
    if layer.experts:
        return renamed[: f".{renamed}".rindex(".experts.") + len("experts")]
    inside = part.tensor.removeprefix(
        f"{layer.name}."
    )  # ``weight``; in a saved fused layer, ``q_proj.weight``
    return renamed.removesuffix(f".{inside}") if inside != part.tensor else renamed.rpartition(".")[0]


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Sets a parameter or buffer by name; names that the model does not have are left to ``_finish``."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return
    if leaf in module._parameters:
        old = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(
            value, old is not None and old.requires_grad and value.is_floating_point()
        )
    elif leaf in module._buffers:
        module._buffers[leaf] = value


def _finish(model: nn.Module, decided: Plan, target: Device) -> None:
    """Ties weights, moves buffers, and checks that nothing is missing."""
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise CheckpointError(
            f"load {decided.source}",
            f"the model needs {len(missing)} tensors that it does not hold: {', '.join(missing[:5])}",
            "the complete checkpoint, or the model class that it was saved from",
        )
    model.requires_grad_(False)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != target.torch_device:
                module._buffers[name] = buffer.to(target.torch_device)
    model.quantport_plan = decided  # type: ignore[assignment]  # a note on the model, not a submodule


def _dtype(layers: Iterable[Layer], target: Device) -> torch.dtype:
    """The 16-bit dtype of the checkpoint, or what the device computes in where it has no bf16."""
    stored = {layer.dtype for layer in layers if layer.kind != "other"}
    if torch.float16 in stored and torch.bfloat16 not in stored:
        return torch.float16
    return target.arch.compute if torch.bfloat16 in stored or not stored else torch.float32


def _fits(decided: Plan, target: Device) -> None:
    if target.memory is not None and decided.peak > target.memory:
        gib = 1 << 30
        peak, stream, free = decided.peak / gib, decided.budget / gib, target.memory / gib
        raise BudgetError(
            f"load {decided.source} on {target}",
            f"it needs {peak:.1f} GiB, {stream:.1f} of them to stream; {free:.1f} GiB are free",
            "a scheme with fewer bits (int4_weight_only), or a device with more memory",
        )
