"""Checks of a backend as a whole: its architectures, its detection, its kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from functools import lru_cache

from quantport.device import Arch, Device
from quantport.plugins.hookspecs import Backend
from quantport.testing import cases
from quantport.testing.subject import Subject, alone

_PROBE = """
import faulthandler, importlib, json, sys, time
sys.path[:], limit = json.loads(sys.argv.pop()), float(sys.argv.pop())
start = time.perf_counter()
import torch
torch_s = time.perf_counter() - start
import quantport.plugins.registry
before = set(sys.modules)
module, name = sys.argv[1:]
backend = getattr(importlib.import_module(module), name)()
fresh = sorted(m for m in set(sys.modules) - before if "." not in m)
kind = backend.torch_type
awake = [kind] if kind != "cpu" and hasattr(torch, kind) and getattr(torch, kind).is_initialized() else []
faulthandler.dump_traceback_later(limit, exit=True)
start = time.perf_counter()
found = backend.detect()
print(json.dumps([torch_s, time.perf_counter() - start, fresh, awake, len(found)]))
"""
# What takes long to import or wakes a driver: allowed in ``detect`` and ``kernels``, never when the room is
# imported. By name, vendors' too, since a stranger's room may import any of them; nothing here is imported or
# chosen by these names.
RUNTIMES = {
    "triton",
    "torch_npu",
    "intel_extension_for_pytorch",
    "torch_xla",
    "transformers",
    "vllm",
    "pandas",
    "scipy",
}


def check_archs(subject: Subject) -> None:
    """The table of architectures is well formed.

    Raises:
        AssertionError: an entry is wrong.
    """
    backend = subject.registry.backends[subject.kind]
    findings = [] if backend.archs else ["archs is empty: nobody can plan for this backend"]
    for key, arch in backend.archs.items():
        findings += [f"archs[{key!r}]: {finding}" for finding in _arch(arch, subject.kind)]
        if arch.name != key:
            findings.append(f"archs[{key!r}] is called {arch.name!r}: the key must be the name")
        if key.isdigit():
            findings.append(f"archs[{key!r}]: a number reads as a device index in {subject.kind}:{key}")
    subject.conclude(f"architectures of {subject.kind}", len(backend.archs), findings)


def _arch(arch: Arch, kind: str) -> list[str]:
    findings = [f"{name} is empty" for name in ("name", "title", "source") if not getattr(arch, name).strip()]
    if arch.kind != kind:
        findings.append(f"kind is {arch.kind!r}, not {kind!r}")
    findings += [f"native format {f!r} is not known" for f in sorted(arch.native - cases.KNOWN_FORMATS)]
    return findings


def check_detection(subject: Subject) -> None:
    """Detection works on this machine, twice alike, and gives devices of its own kind.

    Raises:
        AssertionError: it raised, hangs, or a device is wrong.
    """
    backend = subject.registry.backends[subject.kind]
    _probed(type(backend).__module__, type(backend).__qualname__, subject.limit)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        registry = alone(backend)  # anew, so that devices found earlier, or by others, hide nothing
        found = registry.devices
    findings = [f"it raised at {p.stage}: {p.error}" for p in registry.problems]
    if not findings and [(d.arch, d.index) for d in backend.detect()] != [(d.arch, d.index) for d in found]:
        findings.append("it found other devices the second time")
    if len({d.index for d in found}) != len(found):
        findings.append("two devices have one index")
    for device in found:
        findings += [f"{device}: {finding}" for finding in _device(device, backend)]
    subject.conclude(f"detection of {subject.kind}", 1 + len(found), findings)


def _device(device: Device, backend: Backend) -> list[str]:
    findings = _arch(device.arch, backend.kind)
    known = backend.archs.get(device.arch.name)
    if known is not None and known != device.arch:
        findings.append("its architecture has a name of the table and other facts")
    if device.simulated:
        findings.append("a found device must not say that it is simulated")
    if device.torch_type != backend.torch_type:
        findings.append(f"torch_type is {device.torch_type!r}, that of its backend {backend.torch_type!r}")
    if device.memory is not None and device.memory <= 0:
        findings.append(f"memory is {device.memory} bytes")
    return findings


@lru_cache(maxsize=16)
def _probed(module: str, name: str, limit: float) -> tuple[float, float, list[str], list[str], int]:
    """What a fresh process says that imports a backend and detects.

    Raises:
        AssertionError: it fails, or detection takes longer than the limit.
    """
    call = [sys.executable, "-c", _PROBE, module, name, str(limit), json.dumps(sys.path)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=dict(os.environ))
    if "Timeout (" in done.stderr:
        raise AssertionError(
            f"{module}.{name}().detect() hangs: it takes longer than {limit:g} s\n{done.stderr[-2000:]}"
        )
    if done.returncode:
        raise AssertionError(
            f"{module}.{name}() and detect() fail in a fresh process:\n{done.stderr[-2000:]}"
        )
    torch_s, detect_s, fresh, awake, found = json.loads(done.stdout.splitlines()[-1])
    return torch_s, detect_s, fresh, awake, found


def check_import(subject: Subject) -> None:
    """Importing the room is light: no vendor runtime, no driver awake; and detection costs less than
    importing torch.

    Raises:
        AssertionError: the import loads a runtime or wakes a driver, or detection is slow, hangs or raises.
    """
    cls = type(subject.registry.backends[subject.kind])
    torch_s, detect_s, fresh, awake, _ = _probed(cls.__module__, cls.__qualname__, subject.limit)
    findings = [f"it imports {name}" for name in sorted(RUNTIMES & set(fresh))]
    findings += [f"it wakes the {name} driver" for name in awake]
    if detect_s > torch_s:
        findings.append(f"detect() took {detect_s:.2f} s, more than importing torch ({torch_s:.2f} s)")
    subject.conclude(f"import of {cls.__module__}", 1, findings)


def check_kernels(subject: Subject) -> None:
    """Kernels are listed without raising, have names of their own, and tolerances that mean something.

    Raises:
        AssertionError: one of these is not so.
    """
    kernels = tuple(subject.registry.backends[subject.kind].kernels())
    findings = (
        [] if kernels else ["it has no kernel: quantport.backend.aten.portable() gives two that run anywhere"]
    )
    names = [k.name for k in kernels]
    findings += [
        f"two kernels are named {name!r}" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    for kernel in kernels:
        if not 0 < kernel.tolerance <= cases.MAX_TOLERANCE:
            findings.append(
                f"{kernel.name}: tolerance {kernel.tolerance} is not in (0, {cases.MAX_TOLERANCE}]"
            )
        others = {k: b.kernels() for k, b in subject.registry.backends.items() if k != subject.kind}
        taken = [
            k
            for k, theirs in others.items()
            if any(t.name == kernel.name and type(t) is not type(kernel) for t in theirs)
        ]
        findings += [f"{kernel.name}: a kernel of {k} has this name" for k in taken]
    subject.conclude(f"kernels of {subject.kind}", len(kernels), findings)
