"""Tensors that are only a shape, kernels and backends that are only a promise."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import torch

from quantport.backend import (
    Arch,
    Backend,
    Claim,
    Device,
    Evidence,
    Kernel,
    Reason,
    Request,
    Status,
    hookimpl,
)


@dataclass(frozen=True)
class Shape:
    """What find_layers needs of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16


def tensors(**shapes: Any) -> dict[str, Shape]:
    """``a__b__weight=(2, 3)`` names the tensor ``a.b.weight``."""
    return {name.replace("__", "."): Shape(tuple(shape)) for name, shape in shapes.items()}


def arch(kind: str = "acme", name: str = "a1", native: Sequence[str] = ("bf16", "int8")) -> Arch:
    return Arch(kind, name, f"Acme {name}", frozenset(native), "acme.example/isa")


class FakeKernel(Kernel):
    """Accepts what ``accepts`` says; runs nothing."""

    def __init__(
        self,
        name: str,
        status: Status = Status.NATIVE,
        accepts: Callable[[Request], bool] = lambda request: True,
        quantizes: bool = False,
        speed: float | None = None,
        slow: str = "",
    ) -> None:
        self.name, self.status, self.quantizes_activations = name, status, quantizes
        self._accepts, self._speed, self._slow = accepts, speed, slow

    def reasons_against(self, request):
        return (
            ()
            if self._accepts(request)
            else (Reason(f"{self.name} refuses {request.weight.n} x {request.weight.k}"),)
        )

    def claim(self, request):
        return Claim(Evidence.DECLARED, "acme.example/kernels")

    def speed(self, request):
        return self._speed

    def slow(self, request):
        return self._slow

    def run(self, x, packed, bias, spec):
        raise NotImplementedError


class FakeBackend(Backend):
    """A room whose every answer is given; an exception as an answer is raised."""

    def __init__(
        self, kind: str = "acme", torch_type: str = "cpu", rank: int = 10, found: Any = (), kernels: Any = ()
    ) -> None:
        self.kind, self.torch_type, self.rank = kind, torch_type, rank
        self.archs = {"a1": arch(kind), "a2": arch(kind, "a2", ("bf16",))}
        self._found, self._kernels = found, kernels

    def detect(self):
        return _answer(self._found)

    def kernels(self):
        return _answer(self._kernels)


def _answer(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value() if callable(value) else value


def device(kind: str = "acme", index: int = 0, **fields: Any) -> Device:
    return Device(arch(kind), index, **fields)


def plugin(
    monkeypatch: Any,
    name: str,
    group: str = "quantport.backends",
    entry: str = "",
    **hooks: Callable[[], Any],
) -> EntryPoint:
    """A module with these hooks, importable, and the entry point that names it."""
    module = types.ModuleType(f"fake_{name}")
    for hook, function in hooks.items():
        function.__name__ = hook
        setattr(module, hook, hookimpl(function))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return EntryPoint(entry or name, module.__name__, group)


def backend_plugin(monkeypatch: Any, name: str, backend: Any, entry: str = "") -> EntryPoint:
    """The entry point of a plugin whose hook gives this backend (an exception is raised)."""
    return plugin(monkeypatch, name, entry=entry, quantport_backend=lambda: _raise(backend))


def _raise(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value
