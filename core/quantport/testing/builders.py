"""Makes the modules that the checks look at, and the plain fp32 arithmetic that they must agree with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantport import numerics
from quantport.device import Device
from quantport.kernels.base import Kernel, Request, WeightSpec
from quantport.kernels.verdict import Accepted
from quantport.modules import QuantExperts, QuantLinear
from quantport.scheme import Scheme
from quantport.testing import cases, weights
from quantport.testing.subject import NotHere, Subject

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 128, 64, 4, 2


def requests(scheme: Scheme, layer: str, device: Device) -> list[Request]:
    """What the weights of a module of a layer kind need of a device."""
    shapes = (
        [(INTERMEDIATE, HIDDEN)] if layer == "linear" else [(INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
    )
    return [Request(WeightSpec(scheme, n, k), layer, device, device.arch.compute) for n, k in shapes]


def takes(kernel: Kernel, scheme: Scheme, layer: str, device: Device) -> bool:
    """Whether a kernel takes all weights of such a module."""
    return all(isinstance(kernel.verdict(request), Accepted) for request in requests(scheme, layer, device))


def device_for(subject: Subject, kernel: Kernel, scheme: Scheme, layer: str) -> Device:
    """The first device that is here and takes such a module.

    Raises:
        NotHere: there is none.
    """
    if not subject.here:
        raise NotHere(f"no device of kind {subject.kind} here")
    for device in subject.here:
        if takes(kernel, scheme, layer, device):
            return device
    raise NotHere(f"{kernel.name} refuses {scheme.name} for {layer} here")


def linear(kernel: Kernel, scheme: Scheme, device: Device) -> tuple[QuantLinear, Callable[[Tensor], Tensor]]:
    """A linear layer with bias on a device that takes it, and its reference on the CPU."""
    dtype, where = device.arch.compute, device.torch_device
    spec = WeightSpec(scheme, INTERMEDIATE, HIDDEN)
    bias = cases.bias(spec.n, dtype)
    module = QuantLinear(kernel, spec, nn.Parameter(bias.to(where), requires_grad=False), dtype)
    stored_weight = weights.plain(spec)
    module.set_weight("", {name: t.to(where, copy=True) for name, t in stored_weight.items()})
    effective = scheme if kernel.quantizes_activations else scheme.weight_only
    return module.eval(), lambda x: numerics.linear(x, stored_weight, effective, bias)


def experts(
    kernel: Kernel, scheme: Scheme, device: Device
) -> tuple[QuantExperts, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The experts of a MoE layer on a device that takes them, and their reference on the CPU: one token at a
    time.
    """
    up, down = WeightSpec(scheme, INTERMEDIATE, HIDDEN), WeightSpec(scheme, HIDDEN, INTERMEDIATE)
    module = QuantExperts(kernel, up, down, EXPERTS, "silu", device.arch.compute)
    stored = {name: weights.normal(spec, i, 0.05, 0.0) for i, (name, spec) in enumerate(module.specs.items())}
    for name, stored_weight in stored.items():
        module.set_weight(
            name, {key: t.to(device.torch_device, copy=True) for key, t in stored_weight.items()}
        )
    effective = scheme if kernel.quantizes_activations else scheme.weight_only

    def reference(x: Tensor, index: Tensor, routing: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for t, j in ((t, j) for t in range(x.shape[0]) for j in range(TOP_K)):
            gate, up_, down_ = (
                stored[f"{int(index[t, j])}.{p}"] for p in ("gate_proj", "up_proj", "down_proj")
            )
            row = x[t : t + 1]
            hidden = nn.functional.silu(numerics.linear(row, gate, effective)) * numerics.linear(
                row, up_, effective
            )
            out[t] += (numerics.linear(hidden, down_, effective) * routing[t, j])[0].float()
        return out.to(x.dtype)

    return module.eval(), reference


def routed(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Activations ``[rows, HIDDEN]``, the experts of each token, and their weights; one expert gets
    no token.
    """
    token = torch.arange(rows, dtype=torch.int64, device="cpu")
    index = torch.stack([token % (EXPERTS - 1), (token + 1) % (EXPERTS - 1)], dim=1)
    weights = torch.softmax(cases.random(rows, TOP_K, seed=3), dim=1).to(dtype)
    return cases.random(rows, HIDDEN, seed=4).to(dtype), index, weights


def inputs(layer: str, rows: int, device: Device) -> tuple[Tensor, ...]:
    """What a module of this kind is called with, on the device."""
    dtype = device.arch.compute
    arguments = (cases.activations(rows, HIDDEN, dtype),) if layer == "linear" else routed(rows, dtype)
    return tuple(t.to(device.torch_device) for t in arguments)
