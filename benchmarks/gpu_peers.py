"""Peers on the same weights: torchao, gemlite, and torch's scaled matmul with operands that are quantized beforehand."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from gpu_place import one_line

COMPILED = ((4096, 4096), (28672, 4096))  # shapes of torchao's compiled layers: each takes seconds to compile
# Scheme -> configuration, its options, and whether the layer is meant to be compiled.
TORCHAO = {
    "fp8_per_channel": ("Float8DynamicActivationFloat8WeightConfig", {"granularity": "PerRow"}, True),
    "fp8_per_tensor": ("Float8DynamicActivationFloat8WeightConfig", {"granularity": "PerTensor"}, True),
    "fp8_weight_only": ("Float8WeightOnlyConfig", {}, True),
    "int8": ("Int8DynamicActivationInt8WeightConfig", {}, True),
    "int8_weight_only": ("Int8WeightOnlyConfig", {}, True),
    "int4_weight_only": ("Int4WeightOnlyConfig", {"group_size": 128}, False),
}
# Scheme -> names that the class has had.
GEMLITE = {
    "fp8_per_channel": ("A8W8_FP8_dynamic", "A8W8_fp8_dynamic"),
    "int8": ("A8W8_INT8_dynamic", "A8W8_int8_dynamic"),
    "int8_weight_only": ("A16W8_INT8", "A16W8"),
    "fp8_weight_only": ("A16W8_FP8",),
    "mxfp4_weight_only": ("A16W4_MXFP",),
}


class Bare:
    """torch's product of quantized e4m3fn operands; ``kind`` is that of the scales: tensor, row or block.

    ``prepare``, which quantizes the activations, is not timed; ``run`` is.
    """

    def __init__(self, weight: torch.Tensor, kind: str) -> None:
        from quantport import numerics
        from quantport.plugins.registry import default_registry

        names = {"tensor": "fp8_per_tensor", "row": "fp8_per_channel", "block": "fp8_per_block"}
        self.kind, self.scheme = kind, default_registry().schemes[names[kind]]
        stored = numerics.quantize_weight(weight, self.scheme)
        self.weight, scale = stored["weight"].t(), stored["weight_scale"]
        self.scale = (
            scale.view(())
            if kind == "tensor"
            else scale.t()
            if kind == "block"
            else scale.view(1, -1).contiguous()
        )

    def prepare(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of the activations: one scale, one for each token, or one for each 1x128 (column-major)."""
        from quantport import numerics

        if self.kind == "tensor":
            scale = x.float().abs().amax() / 448
            return (x.float() / scale).to(torch.float8_e4m3fn), scale
        assert self.scheme.activation is not None
        codes, scale = numerics.quantize(x, self.scheme.activation)
        return codes, scale.t().contiguous().t() if self.kind == "block" else scale

    def run(self, prepared: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The product, in BF16."""
        codes, scale = prepared
        y: torch.Tensor = torch._scaled_mm(
            codes, self.weight, scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16
        )
        return y

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self.prepare(x))


def linear_of(bench: Any) -> torch.nn.Linear:
    """A linear layer with the weight of the bench."""
    layer = torch.nn.Linear(bench.k, bench.n, bias=False, device="meta", dtype=bench.dtype)
    layer.weight = torch.nn.Parameter(bench.dense.clone(), requires_grad=False)
    return layer


def torchao(bench: Any, scheme: str) -> Callable[[torch.Tensor], Any]:
    """torchao's layer, compiled where it is slow otherwise."""
    name, options, compiled = TORCHAO[scheme]
    q = importlib.import_module("torchao.quantization")
    options = {k: getattr(q, v)() if isinstance(v, str) else v for k, v in options.items()}
    if name == "Int4WeightOnlyConfig":
        try:
            config = q.Int4WeightOnlyConfig(**options, int4_packing_format="tile_packed_to_4d")
        except TypeError:  # a version without this argument
            config = q.Int4WeightOnlyConfig(**options)
    else:
        config = getattr(q, name)(**options)
    model = torch.nn.Sequential(linear_of(bench))
    q.quantize_(model, config)
    if compiled and (bench.n, bench.k) not in COMPILED:
        raise LookupError("compiled layers are measured at two shapes only")
    return torch.compile(model) if compiled else model


def gemlite(bench: Any, scheme: str) -> Callable[[torch.Tensor], Any]:
    """gemlite's layer."""
    helper = importlib.import_module("gemlite.helper")
    if scheme == "int4_weight_only":
        wide = bench.dense.float().view(bench.n, -1, 128)
        scale = wide.abs().amax(2, keepdim=True) / 7
        codes = (wide / scale).round().clamp(-8, 7).add(8).to(torch.uint8).view(bench.n, bench.k)
        scale = scale.view(bench.n, -1).to(bench.dtype)
        layer = helper.A16Wn(device=str(bench.place.torch)).from_weights(
            codes, scale, torch.full_like(scale, 8), 4, 128
        )
    else:
        name = next(n for n in GEMLITE[scheme] if hasattr(helper, n))
        try:
            processor = getattr(helper, name)(device=str(bench.place.torch), dtype=bench.dtype)
        except TypeError:  # a version without this argument
            processor = getattr(helper, name)(device=str(bench.place.torch))
        layer = processor.from_linear(linear_of(bench))
    call: Callable[[torch.Tensor], Any] = layer
    return call


def add(bench: Any) -> None:
    """Adds the peers to a bench; one that does not run here is absent, with the reason."""
    from quantport.plugins.registry import default_registry

    if hasattr(torch, "_scaled_mm"):
        for kind, label in (
            ("tensor", "bare _scaled_mm, tensor scales"),
            ("row", "bare _scaled_mm, row scales"),
            ("block", "bare blockwise _scaled_mm"),
        ):
            bench.add(
                label,
                lambda kind=kind: Bare(bench.dense, kind),
                bench.n * bench.k,
                kind="bare",
                scheme=f"fp8_{kind}",
                unit="fp8",
            )
    logging.getLogger("torchao").setLevel(logging.ERROR)
    for peer, make, schemes in (
        ("torchao", torchao, TORCHAO),
        ("gemlite", gemlite, [*GEMLITE, "int4_weight_only"]),
    ):
        try:
            importlib.import_module(peer)
        except Exception as error:  # whatever a peer raises, it is not measured, and the page says why
            bench.absent[peer] = one_line(error)
            continue
        for scheme in list(schemes)[: 1 if bench.place.smoke else None]:
            name, size = f"{peer} {scheme}", default_registry().schemes[scheme].bytes(bench.n, bench.k)
            bench.add(
                name, lambda make=make, scheme=scheme: make(bench, scheme), size, kind="peer", scheme=scheme
            )


def versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    out = {}
    for name in ("torchao", "gemlite"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out
