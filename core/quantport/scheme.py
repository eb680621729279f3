"""Schemes: what the numbers are, on every device. A scheme knows no hardware."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from quantport.errors import ConfigError, did_you_mean
from quantport.formats import BF16, E4M3FN, FORMATS, INT4, INT8, Format

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Quant:
    """How one operand is quantized: a symmetric scale per block of ``rows`` x ``cols`` elements.

    Attributes:
        format: Name of the element format.
        rows: Rows (output channels, or tokens) that share a scale; 0 means all of them.
        cols: Columns (along K) that share a scale; 0 means all of them. A last, shorter block has its own scale.
        scale: Dtype of the stored scales. A 16-bit scale is rounded (to nearest even) before the codes are computed.
    """

    format: str
    rows: int
    cols: int
    scale: torch.dtype = torch.float32

    @property
    def element(self) -> Format:
        """The element format."""
        return FORMATS[self.format]

    def scale_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the scales of an [n, k] operand: one per block."""
        return (math.ceil(n / self.rows) if self.rows else 1, math.ceil(k / self.cols) if self.cols else 1)

    def __str__(self) -> str:
        names = {(0, 0): "per tensor", (1, 0): "per row"}
        return f"{self.format} {names.get((self.rows, self.cols), f'per {self.rows}x{self.cols} block')}"


@dataclass(frozen=True)
class Scheme:
    """One quantization scheme for the weight ``[N, K]`` and the activations ``[M, K]`` of a linear layer.

    Numerics (``quantport.numerics`` is the judge): all arithmetic in fp32; ``scale = amax / half_range`` (448, 127.5,
    7.5), an all-zero block gets ``2**-23``; ``code = clamp(round_half_even(x / scale))``; value = ``code * scale``.
    This is the arithmetic of compressed-tensors (``calculate_qparams``, symmetric); int4 scales are rounded to bf16, as
    it does for bf16 weights.

    Attributes:
        name: Canonical name.
        weight: Weight quantization.
        activation: Dynamic activation quantization, or None (weight-only: activations stay 16-bit).
        summary: One line for people.
        aliases: Other spellings, as vLLM, vLLM-Omni and others write them.
    """

    name: str
    weight: Quant
    activation: Quant | None
    summary: str
    aliases: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """Bits of weights and activations, for example ``W8A8`` or ``W4A16``."""
        return f"W{self.weight.element.bits}A{self.activation.element.bits if self.activation else 16}"

    @property
    def activations(self) -> str:
        """How activations are quantized, for people: ``e4m3fn per token``, or ``16-bit``."""
        if self.activation is None:
            return "16-bit"
        return f"{self.activation.format} per " + (f"1x{self.activation.cols}" if self.activation.cols else "token")

    @property
    def weight_only(self) -> Scheme:
        """The same weights with 16-bit activations."""
        return replace(self, activation=None)

    def layout(self, n: int, k: int) -> Layout:
        """Stored tensors of one weight ``[n, k]``: name -> (shape, dtype). This is the layout of compressed-tensors.

        8-bit formats: ``weight`` [n, k] and ``weight_scale`` fp32. int4: ``weight_packed`` int32 [n, ceil(k/8)], eight
        codes + 8 to a word, low nibble first, and ``weight_scale`` bf16. bf16: ``weight`` alone.
        """
        if self.weight.element is BF16:
            return {"weight": ((n, k), torch.bfloat16)}
        scale = (self.weight.scale_shape(n, k), self.weight.scale)
        if self.weight.element.bits == 4:
            return {"weight_packed": ((n, math.ceil(k / 8)), torch.int32), "weight_scale": scale}
        return {"weight": ((n, k), self.weight.element.storage), "weight_scale": scale}

    def bytes(self, n: int, k: int) -> int:
        """Bytes of one quantized weight ``[n, k]`` with its scales."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.layout(n, k).values())


def _builtin() -> tuple[Scheme, ...]:
    dense = Quant(BF16.name, 0, 0)
    e4m3, i8, i4 = E4M3FN.name, INT8.name, INT4.name
    token = Quant(e4m3, 1, 0)
    return (
        Scheme(
            "fp8_per_tensor", Quant(e4m3, 0, 0), token, "FP8 weights, one scale; per-token activations", ("fp8", "fp8_dynamic")
        ),
        Scheme(
            "fp8_per_channel", Quant(e4m3, 1, 0), token, "FP8 weights per output channel; per-token activations",
            ("ptpc_fp8", "fp8_per_token"),
        ),
        Scheme(
            "fp8_per_block", Quant(e4m3, 128, 128), Quant(e4m3, 1, 128), "FP8 weights per 128x128; activations per 1x128",
            ("per_block_fp8", "fp8_block"),
        ),
        Scheme(
            "int8", Quant(i8, 1, 0), Quant(i8, 1, 0), "INT8 weights per output channel; per-token activations",
            ("int8_w8a8", "w8a8", "int8_dynamic"),
        ),
        Scheme("fp8_weight_only", Quant(e4m3, 1, 0), None, "FP8 weights per output channel; 16-bit activations", ("fp8_wo",)),
        Scheme(
            "int8_weight_only", Quant(i8, 1, 0), None, "INT8 weights per output channel; 16-bit activations",
            ("int8_wo", "int8_per_channel_weight_only", "w8a16"),
        ),
        Scheme(
            "int4_weight_only", Quant(i4, 1, 128, torch.bfloat16), None, "INT4 weights in groups of 128; 16-bit activations",
            ("int4", "int4_wo", "w4a16", "int4_per_group_128"),
        ),
        Scheme(
            "int4_weight_only_g32", Quant(i4, 1, 32, torch.bfloat16), None, "INT4 weights in groups of 32; 16-bit activations",
            ("int4_g32", "int4_per_group_32"),
        ),
        Scheme("bf16", dense, None, "not quantized: BF16 as stored, prepacked where that is faster", ("bfloat16",)),
    )  # fmt: skip


class Schemes(Mapping[str, Scheme]):
    """A read-only table of schemes. Look-up understands aliases; iteration gives canonical names only.

    Raises:
        ConfigError: on look-up of an unknown name, and on construction when two schemes claim one name.
    """

    def __init__(self, schemes: Iterable[Scheme]) -> None:
        self._schemes: dict[str, Scheme] = {}
        self._alias: dict[str, str] = {}
        for scheme in schemes:
            for name in (scheme.name, *scheme.aliases):
                if name in self._alias:
                    raise ConfigError(
                        f"scheme {scheme.name!r} under the name {name!r}",
                        f"the name is taken by scheme {self._alias[name]!r}",
                        "give the new scheme a name and aliases of its own",
                    )
                self._alias[name] = scheme.name
            self._schemes[scheme.name] = scheme

    def __getitem__(self, name: str | Scheme) -> Scheme:
        name = name.name if isinstance(name, Scheme) else name
        try:
            return self._schemes[self._alias[name]]
        except (KeyError, TypeError):
            works = f"{did_you_mean(str(name), self._alias)}known: {', '.join(self)}"
            raise ConfigError(f"scheme {name!r}", "no scheme has this name", works) from None

    def __contains__(self, name: object) -> bool:
        return name in self._alias

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemes)

    def __len__(self) -> int:
        return len(self._schemes)


BUILTIN = Schemes(_builtin())
