"""Launches Triton kernels: on a GPU, in Triton's interpreter, or not at all where tensors are fake.

A launch with fake tensors runs nothing: ``traced`` records what would be launched, with its types and
constants. Cross-compilation compiles exactly that, so that the evidence is about what is really launched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


@dataclass(frozen=True)
class Config:
    """How a kernel is tiled and compiled.

    Attributes:
        blocks: Block sizes by name.
        warps: Warps of a program.
        stages: Stages of the load pipeline.
        fusion: Whether multiplication and addition may be fused, so that the product is not rounded; False
            where results must equal the reference bit for bit.
    """

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 3
    fusion: bool = True


@dataclass(frozen=True)
class Launch:
    """One specialization of a kernel, as Triton compiles it.

    Attributes:
        kernel: The jitted function.
        types: Each argument and its type: ``*bf16``, ``i32``, ``constexpr``...
        constants: The constant arguments and their values.
        divisible: Arguments that are multiples of 16, and pointers aligned to 16 bytes.
        warps: Warps of a program.
        stages: Stages of the load pipeline.
        fusion: Whether multiplication and addition may be fused.
    """

    kernel: Any
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: frozenset[str]
    warps: int
    stages: int
    fusion: bool = True

    @property
    def name(self) -> str:
        """The kernel and its constants, for people."""
        constants = ", ".join(f"{k}={v}" for k, v in self.constants)
        kinds = ", ".join(v for _, v in self.types if v != "constexpr")
        fused = "" if self.fusion else ", no fused multiply-add"
        return (
            f"{self.kernel.__name__}({kinds}; {constants}; {self.warps} warps, {self.stages} stages{fused})"
        )


_TRACE: ContextVar[tuple[str, list[Launch]] | None] = ContextVar("quantport_triton_trace", default=None)


@contextmanager
def traced(target: str) -> Iterator[list[Launch]]:
    """Records the launches with fake tensors inside, as they would be made on ``target`` (``sm_90``)."""
    launches: list[Launch] = []
    token = _TRACE.set((target, launches))
    try:
        yield launches
    finally:
        _TRACE.reset(token)


def target_of(device: torch.device) -> str:
    """The name that the rooms give the architecture of a torch device: ``sm_90``, ``gfx942``; in the
    interpreter ``cpu``. Inside of ``traced`` it is the target of that.
    """
    trace = _TRACE.get()
    return _architecture(device) if trace is None else trace[0]


@cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    config: Config,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, int],
    **constants: Any,
) -> None:
    """Launches a kernel on the device of its tensors.

    Args:
        kernel: A function decorated with ``triton.jit``.
        grid: Numbers of programs along up to three axes; where one is 0, nothing is launched.
        config: Block sizes, which become compile-time constants, and compile options.
        tensors: Pointer arguments.
        numbers: Integer arguments.
        constants: Compile-time constants.
    """
    if 0 in grid:
        return
    first = next(iter(tensors.values()))
    constants = {**constants, **config.blocks}
    if isinstance(first, FakeTensor):
        if trace := _TRACE.get():
            trace[1].append(_specialized(kernel, config, tensors, numbers, constants))
        return
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": config.fusion}
    if (
        first.device.type == "cpu"
        or first.device.index == torch.get_device_module(first.device).current_device()
    ):
        kernel[grid](**tensors, **numbers, **constants, **options)
    else:
        with torch.get_device_module(first.device).device(first.device):
            kernel[grid](**tensors, **numbers, **constants, **options)


def _specialized(
    kernel: Any,
    config: Config,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, int],
    constants: Mapping[str, Any],
) -> Launch:
    """The specialization that Triton's own rules give: an integer of 1 becomes a constant, and the compiler
    knows which integers are multiples of 16.
    """
    ones = {name: 1 for name, number in numbers.items() if number == 1}
    types = {name: "*" + _TYPES[t.dtype] for name, t in tensors.items()}
    types |= {name: "i32" if abs(number) < 2**31 else "i64" for name, number in numbers.items()}
    types |= dict.fromkeys([*ones, *constants], "constexpr")
    ordered = tuple((name, types[name]) for name in kernel.arg_names)
    even = frozenset([*tensors, *(name for name, number in numbers.items() if number % 16 == 0)])
    return Launch(
        kernel,
        ordered,
        tuple({**ones, **constants}.items()),
        even,
        config.warps,
        config.stages,
        config.fusion,
    )
