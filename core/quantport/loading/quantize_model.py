"""``quantize_``: a module that is in memory already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantport.errors import ConfigError
from quantport.loading.arguments import require_module
from quantport.loading.executor import Progress, Task, run_tasks
from quantport.loading.kv_caches import default_cache
from quantport.loading.mark_configs import mark_configs
from quantport.loading.plan_model import plan, refuse_nothing, warn
from quantport.loading.renamed import renamed
from quantport.loading.swap_modules import by_module, make_module, swap_modules
from quantport.loading.weight_tasks import WeightQuantizer
from quantport.model.layers import Part
from quantport.model.tied_weights import own_parameters
from quantport.modules import QuantModule
from quantport.planning.plan import Plan
from quantport.plugins.registry import Registry, default_registry


@renamed("rows", "num_tokens")
def quantize_(
    model: nn.Module,
    scheme: str | None = None,
    *,
    config: Any = None,
    num_tokens: int = 1,
    fallback: str | None = None,
    progress: Progress | None = None,
    registry: Registry | None = None,
) -> Plan:
    """Quantizes a module in memory, in place, on the device where it is: wholly, or not at all.

    Args:
        model: The module; its linear layers and experts are replaced.
        scheme: As for ``load``.
        config: As for ``load``.
        num_tokens: As for ``load``.
        fallback: As for ``load``.
        progress: As for ``load``.
        registry: As for ``load``.

    Returns:
        The plan that was carried out; also ``model.quantport_plan``.

    Raises:
        QuantportError: as ``load``; or it is no module, or quantized already.
    """
    require_module("quantize a model in memory", model)
    if any(isinstance(m, QuantModule) for m in model.modules()):
        suggestion = "the 16-bit model; what it is now is in model.quantport_plan"
        raise ConfigError(f"quantize {type(model).__name__}", "it is quantized already", suggestion)
    here = next((p.device for p in model.parameters()), torch.device("cpu"))
    registry = registry or default_registry()
    target = next(
        (d for d in registry.devices if d.torch_type == here.type and d.index == (here.index or 0)),
        None,
    )
    decided = plan(
        model,
        scheme,
        config=config,
        device=target or str(here),
        num_tokens=num_tokens,
        fallback=fallback,
        registry=registry,
    )
    refuse_nothing(decided)
    warn(decided.warnings)
    cache = default_cache(model, decided.config.kv_cache_dtype, decided.config.kv_cache_skip_layers, registry)
    params = own_parameters(model)

    def read(part: Part) -> tuple[Tensor, Callable[[], None]]:
        # nothing to release: the caller owns the tensor
        return part.select(params[part.tensor]), lambda: None

    fast = registry.backends[decided.device.kind].quantize_weight
    quantizers = {
        device: WeightQuantizer(read, decided.config.nonfinite, fast, device, owned=True)
        for device in {parameter.device for parameter in params.values()}
    }
    new: dict[str, QuantModule] = {}
    tasks: list[Task] = []
    for name, steps in by_module(decided.steps, lambda layer: layer.home).items():
        module = new[name] = make_module(steps, model.get_submodule(name), steps[0].layer.dtype, registry)
        for step in steps:
            first, *_ = (part for parts in step.layer.parts.values() for part in parts)
            tasks += quantizers[params[first.tensor].device].tasks(step, module, module.set_steps)
    run_tasks(tasks, progress, budget=decided.budget)
    swap_modules(model, new)
    if cache:
        cache.install()
    mark_configs(model)
    model.quantport_plan = decided  # type: ignore[assignment]  # a note on the model, not a submodule
    return decided
