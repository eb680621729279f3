"""Both example models on fake CUDA tensors: planned, bound to the planned kernels, and run as on the GPU, but for the numbers.

Every layer takes its kernel's own path: a prompt of 17 tokens, then one token with the cache. A fake tensor has no values, so a
forward that asks for one (and would make the host wait for the GPU) fails. The experts of a MoE layer do ask, once, where their
rows begin: there the layer runs as ``torch.compile`` sees it, as one operator, and the kernels of its experts are run beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

from quantport.checkpoint import Checkpoint
from quantport.config import QuantConfig
from quantport.host import host
from quantport.layers import Layer, find_layers
from quantport.loading.bind import by_module, check, make_module, put
from quantport.loading.build import build
from quantport.modules import QuantExperts, QuantModule
from quantport.planner import Plan, make_plan
from quantport.testing.fakes import fake_tensors
from quantport_triton.launch import Launch, traced

MODELS = Path(__file__).parents[3] / "examples" / "models"
DENSE, MOE = MODELS / "tiny-llama", MODELS / "tiny-qwen3-moe"
PROMPT = 17
ASKED = [
    ("sm_75", "fp8_per_channel"), ("sm_75", "int4_weight_only"),
    ("sm_80", "fp8_per_tensor"), ("sm_80", "int8"), ("sm_80", "int4_mse"), ("sm_80", "nf4"), ("sm_80", "q4_k"),
    ("sm_90", "fp8_per_tensor"), ("sm_90", "fp8_per_block"), ("sm_90", "int4_weight_only_g32"), ("sm_90", "mxfp4"),
    ("sm_100", "fp8_per_channel"), ("sm_100", "mxfp8"), ("sm_100", "nvfp4"), ("sm_100", "int4_w4a8"), ("sm_100", "mxfp4_dualscale"),
]  # fmt: skip


class Waits(RuntimeError):
    """The host would wait for the GPU."""


class NoWaiting(TorchDispatchMode):
    """Refuses what FakeTensorMode lets pass: copies between the host and the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        places = {t.device.type for t in (*args, out) if isinstance(t, Tensor) and t.dim() and t.numel()}
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and len(places) > 1:
            raise Waits(f"{func} between {' and '.join(sorted(places))}")
        return out


def place(layer: Layer) -> str:
    return layer.name


def planned(directory: Path, arch: str, scheme: str) -> tuple[nn.Module, Plan]:
    """The model on meta, and its plan."""
    target = host().device(f"cuda:{arch}")
    with Checkpoint.open(directory, headers_only=True) as checkpoint:
        tensors = checkpoint.tensors
    model, _ = build(directory, None, target.arch.compute, tensors)
    layers = check(find_layers(tensors), model, place)
    config = QuantConfig.parse({"scheme": scheme}, host().schemes)
    return model, make_plan(layers, config, target, host().kernels("cuda"), host().schemes, dtype=target.arch.compute)


def fake(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device="cuda")


def bind(model: nn.Module, plan: Plan) -> dict[str, QuantModule]:
    """Puts a quantized module of fake tensors at every planned layer; everything else becomes fake too."""
    new: dict[str, QuantModule] = {}
    for path, steps in by_module(plan.steps, place).items():
        module = new[path] = make_module(steps, model.get_submodule(path), plan.device.arch.compute)
        for name, spec in module.specs.items():
            layout = spec.scheme.layout(spec.n, spec.k)
            module.set_weight(name, {key: torch.empty(shape, dtype=t, device="cuda") for key, (shape, t) in layout.items()})
    put(model, new)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and not name.startswith("packed_"):
                module._buffers[name] = fake(buffer)
    return new


@contextmanager
def on_fake_gpu(arch: str) -> Iterator[list[Launch]]:
    with fake_tensors(), torch.no_grad(), traced(arch) as launches:
        yield launches


def answers(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Logits of the prompt, and of the next token."""
    past, seen = None, 0
    for rows in (PROMPT, 1):
        seen += rows
        ids = torch.zeros(1, rows, dtype=torch.long, device="cuda")
        mask = torch.zeros(1, 1, rows, seen, dtype=dtype, device="cuda")
        with NoWaiting():
            out = model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=True, past_key_values=past)
        past = out.past_key_values
        yield rows, out.logits


def as_compiled(self: QuantExperts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    y: Tensor = torch.ops.quantport.experts(x, index, weights, *self.operands())
    return y


@pytest.mark.parametrize("directory", [DENSE, MOE], ids=lambda path: path.name)
@pytest.mark.parametrize(("arch", "scheme"), ASKED)
def test_every_layer_runs_its_kernel(directory, arch, scheme, monkeypatch):
    monkeypatch.setattr(QuantExperts, "forward", as_compiled)
    model, plan = planned(directory, arch, scheme)
    dtype, met = plan.device.arch.compute, []

    def note(module: QuantModule, args: tuple[Tensor, ...], y: Tensor) -> None:
        x = args[0]
        assert (y.shape[:-1], y.dtype, y.device.type) == (x.shape[:-1], dtype, "cuda")
        assert isinstance(module, QuantExperts) or (x.shape[-1], y.shape[-1]) == (module.in_features, module.out_features)
        met.append(module)

    with on_fake_gpu(arch) as launches:
        modules = bind(model, plan)
        for module in modules.values():
            module.register_forward_hook(note)
        for rows, logits in answers(model, dtype):
            assert (logits.shape, logits.dtype, logits.device.type) == ((1, rows, model.config.vocab_size), dtype, "cuda")
        for module in modules.values():
            run_experts(module, dtype)
    assert sorted(map(id, met)) == sorted([*map(id, modules.values())] * 2)
    steps = {step.layer.name: step.choice for step in plan.steps if step.asked}
    assert all(modules[name].kernel.name == choice.kernel for name, choice in steps.items())
    if any("triton" in choice.kernel for choice in steps.values()):
        assert {launch.kernel.__module__.partition(".")[0] for launch in launches} == {"quantport_triton"}


def run_experts(module: QuantModule, dtype: torch.dtype) -> None:
    """Runs the kernels of experts, which the operator hides."""
    for name, spec in module.specs.items() if isinstance(module, QuantExperts) else ():
        for rows in (1, 5):
            x = torch.empty(rows, spec.k, dtype=dtype, device="cuda")
            with NoWaiting():
                y = module.kernel_of(name).run(x, module.packed(name), None, spec)
            assert (y.shape, y.dtype, y.device.type) == ((rows, spec.n), dtype, "cuda")


def test_launches_are_those_of_the_architecture():
    """What is launched for one row, for a prompt, and where Triton has no matrix unit."""
    found = {}
    for arch in ("sm_75", "sm_80"):
        model, plan = planned(DENSE, arch, "int4_weight_only")
        with on_fake_gpu(arch) as launches:
            bind(model, plan)
            found[arch] = []
            for _ in answers(model, plan.device.arch.compute):
                found[arch].append({launch.kernel.__name__ for launch in launches})
                launches.clear()
    assert found == {"sm_75": [{"dequantize"}, {"gemv"}], "sm_80": [{"gemm"}, {"gemv"}]}


def test_experts_wait_for_the_gpu_once_and_nothing_else_does():
    model, plan = planned(MOE, "sm_80", "int4_weight_only")
    with on_fake_gpu("sm_80"), pytest.raises(DynamicOutputShapeException, match="bincount"):
        bind(model, plan)
        list(answers(model, torch.bfloat16))


@pytest.mark.parametrize(
    ("wait", "error"),
    [
        (lambda x: x.amax().item(), DataDependentOutputException),
        (lambda x: x.amax(1).tolist(), DataDependentOutputException),
        (lambda x: bool((x > 0).any()), DataDependentOutputException),
        (lambda x: torch.ops.aten.nonzero(x), DynamicOutputShapeException),
        (lambda x: x.cpu(), Waits),
        (lambda x: x.copy_(torch.zeros(x.shape)), Waits),
    ],
)
def test_a_kernel_that_waits_would_be_found(wait, error, monkeypatch):
    model, plan = planned(DENSE, "sm_90", "fp8_per_channel")
    with on_fake_gpu("sm_90"):
        kernel = next(iter(bind(model, plan).values())).kernel
        run = type(kernel).run
        monkeypatch.setattr(type(kernel), "run", lambda self, x, *rest: (wait(x), run(self, x, *rest))[1])
        with pytest.raises(error):
            list(answers(model, torch.bfloat16))
