"""Checks of tracing: ``torch.compile`` without graph breaks, and ``opcheck`` of the operators."""

from __future__ import annotations

import torch

from quantport.kernels.base import Kernel
from quantport.modules import QuantModule
from quantport.modules.experts import QuantExperts
from quantport.scheme import Scheme
from quantport.testing import builders, cases
from quantport.testing.check_modules import build
from quantport.testing.subject import NotHere, Subject


def check_compile(
    subject: Subject, kernel: Kernel, scheme: Scheme, layer: str, backend: str = "aot_eager"
) -> None:
    """``torch.compile(fullgraph=True)`` gives the result of eager mode, also when the number of rows changes.

    Raises:
        AssertionError: it gives another.
        NotHere: there is no device, or the kernel refuses.
    """
    device = builders.device_for(subject, kernel, scheme, layer)
    module, _ = build(kernel, scheme, layer, device)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    findings = []
    try:
        for rows in (5, 7):
            given = builders.inputs(layer, rows, device)
            with torch.no_grad():
                same = cases.same_bits(compiled(*given), module(*given))
            findings += [] if same else [f"{rows} rows give another result than eager mode"]
    finally:
        torch._dynamo.reset()
    subject.conclude(f"torch.compile({backend}) of {kernel.name} with {scheme.name} as {layer}", 2, findings)


def check_op(subject: Subject, kernel: Kernel, scheme: Scheme, layer: str) -> None:
    """``torch.library.opcheck`` finds nothing on ``quantport::linear`` and ``quantport::experts`` with this
    kernel.

    Raises:
        AssertionError: it does.
        NotHere: there is no device, the kernel refuses, or its packed weight has no storage of its own.
    """
    device = builders.device_for(subject, kernel, scheme, layer)
    module, _ = build(kernel, scheme, layer, device)
    args = op_arguments(module, builders.inputs(layer, 5, device))
    if any(t.layout is not torch.strided for t in module.buffers()):
        raise NotHere(
            f"{kernel.name} packs into an opaque layout, which opcheck cannot hash; check_compile runs it"
        )
    loops = isinstance(module, QuantExperts) and not module.layout.one_launch
    name = "linear" if layer == "linear" else "experts_loop" if loops else "experts"
    op = getattr(torch.ops.quantport, name).default
    results = torch.library.opcheck(op, args, raise_exception=False)
    findings = [f"{name}: {result}" for name, result in results.items() if result != "SUCCESS"]
    subject.conclude(f"opcheck of {op} with {kernel.name} and {scheme.name}", len(results), findings)


def op_arguments(module: QuantModule, given: tuple[torch.Tensor, ...]) -> tuple[object, ...]:
    """The arguments with which a module calls its operator."""
    if isinstance(module, QuantExperts):
        return (*given, *module.operands())
    return (*given, module.packed(), module._parameters["bias"], module.bound[""].handle)
