"""Checks of the modules with each kernel in them: forward, state dict, copies, pickles, moves."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import torch
from torch import Tensor

from quantport.device import Device
from quantport.kernels.base import Kernel
from quantport.modules import QuantModule
from quantport.scheme import Scheme
from quantport.testing import builders, cases
from quantport.testing.subject import Subject

Call = Callable[..., Tensor]


def build(kernel: Kernel, scheme: Scheme, layer: str, device: Device) -> tuple[QuantModule, Call]:
    """A module of a layer kind, on a device that takes it, and its reference."""
    return (
        builders.linear(kernel, scheme, device)
        if layer == "linear"
        else builders.experts(kernel, scheme, device)
    )


def check_forward(subject: Subject, kernel: Kernel, scheme: Scheme, layer: str) -> None:
    """The module meets the reference, for few and many rows, and for activations of three dimensions or
    strided ones.

    Raises:
        AssertionError: it does not.
        NotHere: there is no device, or the kernel refuses.
    """
    device = builders.device_for(subject, kernel, scheme, layer)
    module, reference = build(kernel, scheme, layer, device)
    # Experts multiply three times in a row, and round to 16 bits in between.
    tolerance = kernel.tolerance if layer == "linear" else 4 * kernel.tolerance
    findings, counts = [], (1, 7) if layer == "moe" else (1, 7, 40)
    for rows in counts:
        arguments = builders.inputs(layer, rows, device)
        y = module(*arguments)
        error = cases.relative_error(y, reference(*(t.cpu() for t in arguments)))
        findings += (
            [f"{rows} rows: relative error {error:.2e} is over {tolerance:.2e}"] if error > tolerance else []
        )
    if layer == "linear":
        findings += _views(module, device.torch_device, device.arch.compute)
    subject.conclude(f"{layer} module of {kernel.name} with {scheme.name}", len(counts), findings)


def _views(module: QuantModule, where: torch.device, dtype: torch.dtype) -> list[str]:
    x = cases.random(2, 3, builders.HIDDEN, seed=5).to(where, dtype)
    flat = module(x.reshape(6, -1))
    strided = x.reshape(6, -1).t().contiguous().t()
    findings = (
        [] if torch.equal(module(x).reshape(6, -1), flat) else ["[2, 3, K] gives another result than [6, K]"]
    )
    return findings + (
        [] if torch.equal(module(strided), flat) else ["strided activations give another result"]
    )


def _differs(module: QuantModule, other: QuantModule, arguments: tuple[Tensor, ...]) -> list[str]:
    mine, theirs = module.state_dict(), other.state_dict()
    findings = [] if list(mine) == list(theirs) else [f"keys {list(theirs)}, not {list(mine)}"]
    findings += [
        f"{k} has other bits" for k in mine if k in theirs and not cases.same_bits(mine[k], theirs[k])
    ]
    if other.kernel.name != module.kernel.name:
        findings.append(f"it has kernel {other.kernel.name}, not {module.kernel.name}")
    return (
        findings
        if cases.same_bits(module(*arguments), other(*arguments))
        else [*findings, "it computes another result"]
    )


def check_copies(subject: Subject, kernel: Kernel, scheme: Scheme, layer: str) -> None:
    """State dict, ``torch.save`` with ``weights_only``, ``deepcopy`` and pickle give back the same bits and
    results.

    Raises:
        AssertionError: something is lost.
        NotHere: there is no device, or the kernel refuses.
    """
    device = builders.device_for(subject, kernel, scheme, layer)
    arguments = builders.inputs(layer, 5, device)
    (module, _), (other, _) = (build(kernel, scheme, layer, device) for _ in range(2))
    other.load_state_dict(
        {name: torch.zeros_like(t, device="cpu") for name, t in module.state_dict().items()}
    )
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    twin = copy.deepcopy(module)
    made = {"state dict": other, "deepcopy": twin, "pickle": pickle.loads(pickle.dumps(module))}
    findings = [f"{how}: {f}" for how, back in made.items() for f in _differs(module, back, arguments)]
    shared = _addresses(module) & _addresses(twin)
    findings += ["deepcopy: it shares memory with the original"] if shared else []
    findings += _layout(module, scheme)
    subject.conclude(f"copies of a {layer} module of {kernel.name} with {scheme.name}", len(made), findings)


def _addresses(module: QuantModule) -> set[int]:
    return {t.data_ptr() for t in module.buffers() if t.layout is torch.strided and t.numel()}


def _layout(module: QuantModule, scheme: Scheme) -> list[str]:
    """The state dict holds the stored layout of the scheme, whatever the kernel packs."""
    state = module.state_dict()
    findings = []
    for name, spec in module.specs.items():
        for key, expected in scheme.layout(spec.n, spec.k).items():
            full = f"{name}.{key}".lstrip(".")
            found = (tuple(state[full].shape), state[full].dtype) if full in state else None
            findings += [] if found == expected else [f"state dict: {full} is {found}, not {expected}"]
    return findings


def check_moves(subject: Subject, kernel: Kernel, scheme: Scheme, layer: str) -> None:
    """To meta and back, and casts: weights keep their dtype and bits, and no memory stays behind on meta.

    Raises:
        AssertionError: they do not.
        NotHere: there is no device, or the kernel refuses.
    """
    device = builders.device_for(subject, kernel, scheme, layer)
    module, reference = build(kernel, scheme, layer, device)
    arguments = builders.inputs(layer, 5, device)
    # a device may only move some dtypes
    state = {name: t.to("cpu", copy=True) for name, t in module.state_dict().items()}
    findings = []
    for dtype in (torch.float16, torch.float64):
        cast = copy.deepcopy(module).to(dtype).state_dict()
        names = [n for n in state if n != "bias"]
        findings += [f".to({dtype}) changed {n}" for n in names if not cases.same_bits(cast[n], state[n])]
    module.to("meta")
    tensors = (*module.parameters(), *module.buffers(), *module.state_dict().values())
    findings += ["a tensor is not on meta after .to('meta')"] if any(not t.is_meta for t in tensors) else []
    module.to_empty(device=device.torch_device)
    module.load_state_dict(state)
    back = module.state_dict()
    findings += [
        f"{n} has other bits after meta and back" for n in state if not cases.same_bits(back[n], state[n])
    ]
    error = cases.relative_error(module(*arguments), reference(*(t.cpu() for t in arguments)))
    # The kernel is chosen anew for the device, perhaps one with 16-bit activations: coarse ones then make the
    # difference.
    coarse = scheme.activation is not None and scheme.activation.element.bits < 8
    findings += (
        [f"relative error {error:.2e} after meta and back"]
        if error > (1 if coarse else 4 * cases.MAX_TOLERANCE)
        else []
    )
    subject.conclude(f"moves of a {layer} module of {kernel.name} with {scheme.name}", len(state), findings)
