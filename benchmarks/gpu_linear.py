"""Times linear layers of Llama-3.1-8B and 70B, weights cold in cache: every kernel of the room, BF16, peers and the limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu_peers
import torch
from gpu_checks import TIMED
from gpu_place import Call, Place, interleaved, one_line, weight
from gpu_targets import ROWS, SHAPES
from torch.nn import functional as F

Layers = list[Callable[[torch.Tensor], Any]]
Row = dict[str, Any]
BASE = "BF16 F.linear"
MIN_SECONDS = 6.0  # that one shape needs
# Measured only where a matrix unit multiplies them; the list has their weight-only schemes too.
NATIVE = ("mxfp8", "mxfp4", "nvfp4")
SMALL = (32, 256)
SMOKE = ("fp8_per_channel", "int4_weight_only")


class Bench:
    """The layers of one shape, each in as many copies as keep the cache cold.

    Attributes:
        layers: Copies of a layer, by name.
        about: What its row holds besides the time, by name: scheme, kernel, kind, and ``bytes`` of its weight.
        absent: Why a layer is not measured, by name.
    """

    def __init__(self, place: Place, n: int, k: int) -> None:
        self.place, self.n, self.k, self.dtype = place, n, k, place.dtypes[0]
        self.layers: dict[str, Layers] = {}
        self.about: dict[str, Row] = {}
        self.absent: dict[str, str] = {}
        self.dense = weight(n, k, self.dtype, place.torch)

    def add(
        self, name: str, make: Callable[[], Callable[[torch.Tensor], Any]], size: int, **about: Any
    ) -> None:
        """Makes and copies a layer; a layer that cannot be made here is absent, with the reason."""
        try:
            first = make()
            if about.get("kind") == "peer":
                self.check_peer(first)
            self.layers[name] = [first, *(make() for _ in range(self.place.copies(size) - 1))]
            self.about[name] = {"kind": "ours", "kernel": name, **about, "bytes": size}
        except Exception as error:  # a peer or a kernel that does not run here is a row that says so
            self.layers.pop(name, None)
            self.absent[name] = one_line(error)

    def check_peer(self, layer: Callable[[torch.Tensor], Any]) -> None:
        """Refuses a peer that computes something else. Our kernels are checked in a stage of their own."""
        x = torch.randn(32, self.k, device=self.place.torch).to(self.dtype)
        expected = F.linear(x, self.dense).float()
        error = ((layer(x).float() - expected).norm() / expected.norm()).item()
        if not error < 0.25:
            raise ValueError(f"it is {error:.2f} off BF16")

    def base(self) -> None:
        """Adds BF16 ``F.linear``."""
        copies = iter(
            [self.dense] + [self.dense.clone() for _ in range(self.place.copies(self.dense.nbytes) - 1)]
        )

        def make() -> Callable[[torch.Tensor], Any]:
            held = next(copies)
            return lambda x: F.linear(x, held)

        self.add(BASE, make, self.dense.nbytes, kind="baseline", scheme="bf16")

    def scheme(self, name: str) -> None:
        """Adds every kernel of the room that accepts the scheme, except the exact emulation."""
        from quantport import numerics
        from quantport.kernels.base import Request, WeightSpec
        from quantport.kernels.verdict import Accepted, Status
        from quantport.plugins.registry import default_registry

        scheme = default_registry().schemes[name]
        spec = WeightSpec(scheme, self.n, self.k)
        request = Request(spec, "linear", self.place.device, self.dtype)
        if (
            name in NATIVE
            and scheme.weight.unit not in self.place.device.arch.native
            and not self.place.smoke
        ):
            self.absent[name] = f"{self.place.device.arch.name} does not multiply {scheme.weight.unit}"
            return
        accepting = [
            (x, v)
            for x in self.place.kernels
            if isinstance(v := x.verdict(request), Accepted) and v.status is not Status.REFERENCE
        ]
        if not accepting:
            self.absent[name] = "no kernel of the room takes it here"
            return
        stored = numerics.quantize_weight(
            self.dense, scheme, fast=default_registry().backends[self.place.device.kind].quantize_weight
        )
        for kernel, verdict in accepting:
            if kernel.name.startswith("torch.") and (self.n, self.k) not in (SHAPES[0], SMALL):
                continue  # one shape shows what plain torch operators cost

            def make(kernel: Any = kernel) -> Callable[[torch.Tensor], Any]:
                packed = tuple(t.clone() for t in kernel.pack(stored, spec))
                return lambda x: kernel.apply(x, packed, None, spec)

            self.add(
                f"{name}, {kernel.name}",
                make,
                scheme.bytes(self.n, self.k),
                scheme=name,
                kernel=kernel.name,
                as_requested=verdict.precision == scheme.precision,
                unit=_unit(scheme, kernel),
            )

    def rows(self, m: int, previous: dict[str, Any]) -> list[Row]:
        """Times at m rows."""
        x = torch.randn(m, self.k, device=self.place.torch).to(self.dtype)
        calls: dict[str, Call] = {}
        for name, layers in self.layers.items():
            if not isinstance(layers[0], gpu_peers.Bare):
                calls[name] = lambda i, layers=layers: layers[i % len(layers)](x)  # type: ignore[misc]  # a default argument
                continue
            try:
                prepared = layers[0].prepare(x)

                def bare(i: int, layers: Any = layers, prepared: Any = prepared) -> Any:
                    return layers[i % len(layers)].run(prepared)

                calls[name] = bare
            except Exception as error:  # the others go on
                self.absent[f"{name}, {self.n}x{self.k}, M={m}"] = one_line(error)
        failed: dict[str, str] = {}
        seconds = interleaved(self.place, calls, 5, failed)
        self.absent |= {f"{name}, {self.n}x{self.k}, M={m}": why for name, why in failed.items()}
        return [self.row(name, m, s, previous) for name, s in seconds.items()]

    def row(self, name: str, m: int, seconds: float, previous: dict[str, Any]) -> Row:
        about = self.about[name]
        limits = previous.get("limits", {})
        moved = about["bytes"] + 2 * m * (self.n + self.k)
        work = 2 * m * self.n * self.k
        rate = limits.get(about.get("unit", "bf16")) or limits.get("bf16")
        limit = max(moved / limits["copy"], work / rate) if limits.get("copy") and rate else None
        return {"name": name, "shape": [self.n, self.k], "m": m, "seconds": seconds, "limit": limit, **about}


def _unit(scheme: Any, kernel: Any) -> str:
    """The measured matrix rate that bounds a kernel; that of fp8 for formats without one."""
    if not kernel.quantizes_activations or scheme.activation is None:
        return "bf16"
    return "int8" if scheme.activation.format == "int8" else "fp8"


def bench(place: Place, n: int, k: int) -> Bench:
    """The layers of one shape."""
    made = Bench(place, n, k)
    made.base()
    for name in SMOKE if place.smoke else TIMED:
        try:
            made.scheme(name)
        except Exception as error:  # the others go on
            made.absent[name] = one_line(error)
    gpu_peers.add(made)
    return made


def run(place: Place, previous: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Measures shape by shape; writes after each number of rows."""
    rows: list[Row] = []
    absent: dict[str, str] = {}
    with torch.no_grad():
        for n, k in [SMALL] if place.smoke else SHAPES:
            if place.over(0 if place.smoke else MIN_SECONDS):
                absent[f"{n}x{k}"] = "out of time"
                continue
            made = bench(place, n, k)
            for m in (1, 17) if place.smoke else ROWS:
                if place.over(1):
                    absent[f"{n}x{k}, M={m}"] = "out of time"
                    continue
                rows += made.rows(m, previous)
                absent |= made.absent
                keep({"rows": rows, "absent": absent})
            del made
            weight.cache_clear()
            if not place.smoke:
                torch.cuda.empty_cache()
    keep({"rows": rows, "absent": absent, "peers": gpu_peers.versions()})
