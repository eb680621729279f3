"""Measures the limits of the device, which every other stage is compared with: copies and bare matrix multiplications."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_place import Place, Timer, one_line

Keep = Callable[[dict[str, Any]], None]


def median(place: Place, call: Callable[[int], object], graph: bool = True, rounds: int = 9) -> float:
    """Median seconds of one call."""
    timer = Timer(place, call, graph)
    return sorted(timer.run() for _ in range(rounds))[rounds // 2]


def copy(place: Place) -> float:
    """Bytes read and written per second by a copy on the device."""
    size = 1 << (20 if place.smoke else 32)
    source = torch.empty(size, dtype=torch.uint8, device=place.torch).random_()
    target = torch.empty_like(source)
    return 2 * size / median(place, lambda _: target.copy_(source))


def host(place: Place) -> float:
    """Bytes per second from pinned host memory to the device."""
    if place.smoke:
        raise LookupError("needs a GPU")
    source = torch.empty(1 << 30, dtype=torch.uint8).random_().pin_memory()
    target = torch.empty_like(source, device=place.torch)
    return source.numel() / median(
        place, lambda _: target.copy_(source, non_blocking=True), graph=False, rounds=3
    )


def operands(place: Place, dtype: torch.dtype) -> tuple[int, torch.Tensor, torch.Tensor]:
    """The size and two random square matrices of that size, the second one column-major."""
    size = 64 if place.smoke else 8192
    a, b = (torch.randn(size, size, device=place.torch) for _ in range(2))
    scale = 40 if dtype is torch.int8 else 1
    return size, (a * scale).to(dtype), (b * scale).to(dtype).t()


def matmul(place: Place) -> float:
    """Operations per second in 16 bits."""
    n, a, b = operands(place, place.dtypes[0])
    return 2 * n**3 / median(place, lambda _: a @ b)


def scaled_mm(place: Place) -> float:
    """e4m3fn operations per second of ``torch._scaled_mm`` with one scale for each operand."""
    n, a, b = operands(place, torch.float8_e4m3fn)
    one = torch.ones((), device=place.torch)
    return 2 * n**3 / median(place, lambda _: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16))


def int_mm(place: Place) -> float:
    """int8 operations per second of ``torch._int_mm``."""
    n, a, b = operands(place, torch.int8)
    return 2 * n**3 / median(place, lambda _: torch._int_mm(a, b))


def run(place: Place, previous: dict[str, Any], keep: Keep) -> None:
    """Measures each limit; one that does not run here is left out, with the reason."""
    absent: dict[str, str] = {}
    for name, measure in (
        ("copy", copy),
        ("bf16", matmul),
        ("fp8", scaled_mm),
        ("int8", int_mm),
        ("host", host),
    ):
        try:
            keep({name: measure(place), "rows": []})
        except Exception as error:  # a limit that does not run here is a cell that says so
            absent[name] = one_line(error)
    keep({"absent": absent})
