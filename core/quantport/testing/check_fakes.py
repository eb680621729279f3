"""Checks of shapes and dtypes on fake tensors, for every architecture of a backend, be it here or not."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch._subclasses.fake_tensor import UnsupportedOperatorException

from quantport.device import Device
from quantport.kernels.base import Kernel, Packed, Request, StoredWeight, WeightSpec
from quantport.kernels.verdict import Accepted
from quantport.scheme import Scheme
from quantport.testing.fakes import allowed, fake_tensors
from quantport.testing.subject import NotHere, Subject

SHAPE = (64, 256)
# namespaces whose operators need not have a shape function
TORCHS_OWN = (
    "aten",
    "mkldnn",
    "onednn",
    "quantized",
)


def check_fakes(subject: Subject, device: Device) -> None:
    """Every kernel that accepts a scheme on an architecture computes the right shape and dtype on fake
    tensors of it.

    Raises:
        AssertionError: it raised, or a shape, dtype or device is wrong.
        NotHere: this torch knows no tensors of its type, not even fake ones.
    """
    if not allowed(device.torch_type):
        raise NotHere(f"this torch makes no fake tensors of type {device.torch_type!r}")
    findings, notes, compared = [], [], 0
    for scheme in subject.schemes:
        spec = WeightSpec(scheme, *SHAPE)
        for dtype in {device.arch.compute, torch.float32}:
            for kernel in subject.kernels:
                if not isinstance(kernel.verdict(Request(spec, "linear", device, dtype)), Accepted):
                    continue
                try:
                    found = _run(kernel, scheme, device.torch_type, dtype)
                    compared += 1
                except NotHere as reason:
                    notes.append(f"{kernel.name}: {reason}")
                    continue
                findings += [f"{kernel.name}, {scheme.name}, {dtype}: {f}" for f in found]
    subject.conclude(f"fake tensors of {device.arch}", compared, findings, notes)


@lru_cache(maxsize=1024)  # architectures of one kind have the same fake tensors
def _run(kernel: Kernel, scheme: Scheme, where: str, dtype: torch.dtype) -> list[str]:
    n, k = SHAPE
    spec = WeightSpec(scheme, n, k)
    layout = scheme.layout(n, k)
    findings = []
    with fake_tensors():
        try:
            empty = {name: torch.empty(shape, dtype=t, device=where) for name, (shape, t) in layout.items()}
            packed = _packed(kernel, empty, spec)
            for rows in (1, 17):
                x, bias = (
                    torch.empty(rows, k, dtype=dtype, device=where),
                    torch.empty(n, dtype=dtype, device=where),
                )
                y = kernel.run(x, packed, bias if rows > 1 else None, spec)
                found = (tuple(y.shape), y.dtype, y.device.type)
                if found != ((rows, n), dtype, where):
                    findings.append(f"run gives {found}, not {((rows, n), dtype, where)}")
            back = {name: (tuple(t.shape), t.dtype) for name, t in kernel.unpack(packed, spec).items()}
        except NotHere:
            raise
        except UnsupportedOperatorException as error:
            if getattr(error.func, "namespace", "") in TORCHS_OWN:
                raise NotHere(f"torch has no shape function for {error.func}") from None
            return [f"raised {type(error).__name__}: {error}"]
        except Exception as error:
            return [f"raised {type(error).__name__}: {error}"]
    return findings if back == layout else [*findings, f"unpack gives {back}, not {layout}"]


def _packed(kernel: Kernel, stored: StoredWeight, spec: WeightSpec) -> Packed:
    """Packs fake tensors. Nothing traces ``pack``: an operator of the vendor that it calls may lack a shape
    function.

    Raises:
        NotHere: one does.
    """
    try:
        return kernel.pack(stored, spec)
    except UnsupportedOperatorException as error:
        raise NotHere(f"pack calls {error.func}, which has no shape function") from None
