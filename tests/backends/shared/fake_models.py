"""Both example models on fake tensors of a GPU: planned, bound to the planned kernels, and run as on the GPU,
without values.

Every layer takes its kernel's own path: a prompt of 17 tokens, then one token with the cache. A fake tensor
has no values, so a forward that reads one, which would make the host wait for the GPU, fails. The experts of
a MoE layer do read where their rows begin: there the layer runs as ``torch.compile`` sees it, as one
operator, and the kernels of its experts run separately.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantport.checkpoint import Checkpoint
from quantport.config import QuantConfig
from quantport.device import Device
from quantport.loading.skeleton import build
from quantport.loading.swap_modules import by_module, make_module, match_modules, swap_modules
from quantport.model.layers import Layer, find_layers
from quantport.modules import QuantExperts, QuantModule
from quantport.planning.plan import Plan, make_plan
from quantport.plugins.registry import default_registry
from quantport.testing.fakes import fake_tensors
from quantport_triton.launch import Launch, traced

MODELS = Path(__file__).parents[3] / "examples" / "models"
DENSE, MOE = MODELS / "tiny-llama", MODELS / "tiny-qwen3-moe"
PROMPT = 17
OPS = {
    "weight_only": "weight_only",
    "fp8": "scaled",
    "fp8_block": "scaled",
    "int8": "scaled",
    "int4_int8": "scaled",
    "mx": "block_scaled",
    "nvfp4": "block_scaled",
}


Checked = tuple[list[QuantModule], list[Launch]]


class WaitError(RuntimeError):
    """The host would wait for the GPU."""


class NoWaiting(TorchDispatchMode):
    """Refuses copies between the host and the GPU, which FakeTensorMode allows."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        places = {t.device.type for t in (*args, out) if isinstance(t, Tensor) and t.dim() and t.numel()}
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and len(places) > 1:
            raise WaitError(f"{func} between {' and '.join(sorted(places))}")
        return out


def place(layer: Layer) -> str:
    return layer.name


def planned(
    directory: Path, device: str | Device, scheme: str, fallback: str = "weight_only"
) -> tuple[nn.Module, Plan]:
    """The model on meta, and its plan for a simulated device, for example ``cuda:sm_90``."""
    target = device if isinstance(device, Device) else default_registry().device(device)
    with Checkpoint.open(directory, headers_only=True) as checkpoint:
        tensors = checkpoint.tensors
    model, _ = build(directory, None, target.arch.compute, tensors)
    layers = match_modules(find_layers(tensors), model, place)
    config = QuantConfig.parse({"scheme": scheme, "fallback": fallback}, default_registry().schemes)
    return model, make_plan(
        layers,
        config,
        target,
        default_registry().kernels(target.kind),
        default_registry().schemes,
        dtype=target.arch.compute,
    )


def fake(t: Tensor, where: str) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=where)


def bind(model: nn.Module, plan: Plan) -> dict[str, QuantModule]:
    """Puts a quantized module of fake tensors at every planned layer, and makes everything else fake."""
    new: dict[str, QuantModule] = {}
    where = plan.device.torch_type
    for path, steps in by_module(plan.steps, place).items():
        module = new[path] = make_module(
            steps, model.get_submodule(path), plan.device.arch.compute, default_registry()
        )
        for name, spec in module.specs.items():
            layout = spec.scheme.layout(spec.n, spec.k)
            module.set_weight(
                name, {key: torch.empty(shape, dtype=t, device=where) for key, (shape, t) in layout.items()}
            )
    swap_modules(model, new)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter, where), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and not name.startswith("packed_"):
                module._buffers[name] = fake(buffer, where)
    return new


@contextmanager
def on_fake_gpu(arch: str) -> Iterator[list[Launch]]:
    """Tensors are fake inside, and Triton's launches are recorded for an architecture."""
    with fake_tensors(), torch.no_grad(), traced(arch) as launches:
        yield launches


def answers(model: nn.Module, dtype: torch.dtype, where: str) -> Iterator[tuple[int, Tensor]]:
    """Logits of the prompt and of the next token."""
    past, seen = None, 0
    for rows in (PROMPT, 1):
        seen += rows
        ids = torch.zeros(1, rows, dtype=torch.long, device=where)
        mask = torch.zeros(1, 1, rows, seen, dtype=dtype, device=where)
        with NoWaiting():
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=True, past_key_values=past
            )
        past = out.past_key_values
        yield rows, out.logits


def as_compiled(self: QuantExperts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    run = torch.ops.quantport.experts if self.layout.one_launch else torch.ops.quantport.experts_loop
    y: Tensor = run(x, index, weights, *self.operands())
    return y


def check_model(directory: Path, device: str | Device, scheme: str, fallback: str = "weight_only") -> Checked:
    """Runs a model whose experts forward as ``as_compiled``; every layer must run, with the planned kernel.

    Returns:
        Its quantized modules, and what they launched.
    """
    model, plan = planned(directory, device, scheme, fallback)
    dtype, where, met = plan.device.arch.compute, plan.device.torch_type, []
    # Fused attention needs code of the device even for fake tensors, and is not what is tested.
    if where != "cuda":
        model.set_attn_implementation("eager")

    def note(module: QuantModule, args: tuple[Tensor, ...], y: Tensor) -> None:
        x = args[0]
        assert (y.shape[:-1], y.dtype, y.device.type) == (x.shape[:-1], dtype, where)
        assert isinstance(module, QuantExperts) or (x.shape[-1], y.shape[-1]) == (
            module.in_features,
            module.out_features,
        )
        met.append(module)

    with on_fake_gpu(plan.device.arch.name) as launches:
        modules = bind(model, plan)
        for module in modules.values():
            module.register_forward_hook(note)
        for rows, logits in answers(model, dtype, where):
            assert (logits.shape, logits.dtype, logits.device.type) == (
                (1, rows, model.config.vocab_size),
                dtype,
                where,
            )
        for module in modules.values():
            run_experts(module, dtype, where)
    assert sorted(map(id, met)) == sorted([*map(id, modules.values())] * 2)
    steps = {step.layer.name: step.choice for step in plan.steps if step.requested_scheme}
    assert all(modules[name].kernel.name == choice.kernel for name, choice in steps.items())
    return list(modules.values()), launches


def kernels_of(modules: Iterable[QuantModule]) -> set:
    """The kernels of quantized modules."""
    return {module.kernel_of(name) for module in modules for name in module.specs}


def files(launches: Iterable[Launch]) -> set[str]:
    """The source files of the launched Triton kernels."""
    return {launch.kernel.fn.__module__.rpartition(".")[2] for launch in launches}


def run_experts(module: QuantModule, dtype: torch.dtype, where: str) -> None:
    """Runs the kernels of experts, which the operator hides."""
    for name, spec in module.specs.items() if isinstance(module, QuantExperts) else ():
        for rows in (1, 5):
            x = torch.empty(rows, spec.k, dtype=dtype, device=where)
            with NoWaiting():
                y = module.kernel_of(name).run(x, module.packed(name), None, spec)
            assert (y.shape, y.dtype, y.device.type) == ((rows, spec.n), dtype, where)
