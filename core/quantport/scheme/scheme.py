"""Schemes: what the numbers are, on every device. A scheme knows no hardware."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from quantport.errors import ConfigError, one_of
from quantport.scheme.formats import BF16, E8M0
from quantport.scheme.quant import RULES, SCALES, SEARCHES, Quant, blocks_of
from quantport.scheme.solver import Solver

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
GGUF_BYTES = {
    "q4_0": 18,
    "q4_1": 20,
    "q5_0": 22,
    "q5_1": 24,
    "q8_0": 34,
    "q2_k": 84,
    "q3_k": 110,
    "q4_k": 144,
    "q5_k": 176,
    "q6_k": 210,
    "q8_k": 292,
}
# What ggml quantizes activations to, by the block of the weight. Source: ``ggml-cpu.c``, ``type_traits_cpu``.
GGUF_ACTIVATIONS = {32: Quant("q8_0", (1, 32)), 256: Quant("q8_k", (1, 256))}
ROTATION = 128
ORDER = "weight_order"  # the stored tensor of a scheme in activation order
_ORDERED = "actorder"
INPUT_SCALE, INPUT_ZERO = "input_scale", "input_zero_point"  # stored tensors of activations
_STORED = ("asym", "channel", "tensor", _ORDERED, "static", "static_asym")
OPTIONS = frozenset(
    {*RULES, *SEARCHES, *SCALES, *_STORED, "nearest", "double", "hadamard", "a8"}
)  # no solver may take these, nor what `_GROUP` matches
_GROUP = re.compile(r"g([1-9]\d{0,3})$")
_BLOCKS = {"channel": (1, 0), "tensor": (0, 0)}


@dataclass(frozen=True)
class Scheme:
    """One quantization scheme for the weight ``[N, K]`` and the activations ``[M, K]`` of a linear layer.

    ``quantport.numerics`` is the judge of what the fields mean, and ``docs/numerics.md`` the contract.

    Attributes:
        name: Canonical name; options follow it after colons.
        weight: Weight quantization.
        activation: Activation quantization, or None (weight-only: activations stay 16-bit).
        summary: One line for people.
        aliases: Other spellings, as vLLM, vLLM-Omni and others write them.
        rotation: Size of the Hadamard blocks along K that rotate weights and activations alike; 0 for none.
        ordered: Whether columns are stored in another order than the inputs have, beside which it is stored.
        solver: Finds the codes and scales of the weight; None for the rule of ``weight``. What is stored and
            how it is multiplied do not depend on it.
    """

    name: str
    weight: Quant
    activation: Quant | None
    summary: str
    aliases: tuple[str, ...] = ()
    rotation: int = 0
    ordered: bool = False
    solver: Solver | None = field(default=None, compare=False)  # its name is part of the scheme's

    @cached_property
    def precision(self) -> str:
        """Bits of weights and activations, for example ``W8A8`` or ``W4A16``."""
        return f"W{self.weight.element.bits}A{self.activation.element.bits if self.activation else 16}"

    @property
    def activations(self) -> str:
        """How activations are quantized, for people: ``e4m3fn per token``, or ``16-bit``."""
        if self.activation is None:
            return "16-bit"
        if self.static:
            asymmetric = " and zero point" * self.activation.zero_point
            return f"{self.activation.format} per tensor, stored scale{asymmetric}"
        return f"{self.activation.format} per " + (
            f"1x{self.activation.group_size}" if self.activation.group_size else "token"
        )

    @property
    def static(self) -> bool:
        """Whether the scale of activations is stored with the weight, and not found while the model runs."""
        return self.activation is not None and self.activation.static

    @cached_property
    def weight_only(self) -> Scheme:
        """The same weights with 16-bit activations."""
        return replace(self, activation=None)

    @property
    def options(self) -> tuple[str, ...]:
        """What may follow the name after a colon."""
        weight = self.weight
        chosen = set(self.name.split(":")) & {*RULES, "mse"}  # one rule is enough
        rules = RULES if weight.scale == E8M0.name and not chosen else ()
        mse = ("mse",) if weight.scale in ("e8m0", "e4m3fn") and not weight.searched and not chosen else ()
        double = ("double",) if weight.element.codebook and not weight.scale_quant else ()
        hadamard = (
            ("hadamard",)
            if weight.element.bits == 4 and not (weight.element.block or self.rotation or self.static)
            else ()
        )
        a8 = ("a8",) if weight.element.block and self.activation is None else ()
        return tuple(r for r in rules if r != weight.rule) + mse + double + hadamard + a8

    def option(self, name: str) -> Scheme:
        """The scheme with one option: another scale rule, ``mse``, ``double``, ``hadamard`` or ``a8``; or, as
        checkpoints of others have them, blocks of another size (``g64``, ``channel``, ``tensor``), another
        format of scales (``fp32``, ``fp16``, ``bf16``), offsets (``asym``), columns in another order
        (``actorder``) or a scale of activations that is stored (``static``), with a zero point
        (``static_asym``).

        Raises:
            ConfigError: the scheme has no such option.
        """
        stored, static = self._stored_as(name), self._static_as(name)
        if stored is not None or static is not None:
            return replace(
                self,
                name=f"{self.name}:{name}",
                weight=stored or self.weight,
                activation=static or self.activation,
                ordered=self.ordered or name == _ORDERED,
                aliases=(),
                summary=f"{self.summary}; {name}",
            )
        if name not in self.options:
            suggestion = one_of(name, self.options) if self.options else f"{self.name!r}: it has no options"
            raise ConfigError(f"option {name!r} of scheme {self.name!r}", "no such option", suggestion)
        weight, activation, rotation = self.weight, self.activation, self.rotation
        if name == "hadamard":
            rotation = ROTATION
        elif name == "a8":
            activation = GGUF_ACTIVATIONS[weight.element.block]
        elif name == "double":
            weight = replace(weight, scale_quant=True)
        else:
            weight = replace(weight, rule=name)
            activation = (
                replace(activation, rule=name)
                if activation and activation.scale == "e8m0" and name in RULES
                else activation
            )
        changed = replace(
            self, name=f"{self.name}:{name}", weight=weight, activation=activation, rotation=rotation
        )
        return replace(changed, aliases=(), summary=f"{self.summary}; {name}")

    def _stored_as(self, option: str) -> Quant | None:
        """The weight with blocks, scales or offsets as an option has them; None for other options."""
        weight, group = self.weight, _GROUP.match(option)
        if weight.element.block or weight.element is BF16 or weight.scale not in SCALES or weight.outer_block:
            return None
        if option in SCALES:
            return replace(weight, scale=option)
        if group and weight.block_shape[0] == 1:
            return replace(weight, block_shape=(1, int(group[1])))
        if option in _BLOCKS and not weight.element.codebook:
            return replace(weight, block_shape=_BLOCKS[option])
        if option == _ORDERED and not self.ordered:
            return weight
        if option == "asym" and weight.format in ("int4", "uint4", "int8") and not weight.zero_point:
            return replace(weight, zero_point=True)
        return None

    def _static_as(self, option: str) -> Quant | None:
        """Activations with a stored scale, as an option has them; None for other options."""
        formats = {"static": ("e4m3fn", "int8"), "static_asym": ("int8",)}.get(option, ())
        active = self.activation
        if active is None or not active.plain or active.format not in formats or self.rotation:
            return None
        return Quant(active.format, (0, 0), zero_point=option == "static_asym", static=True)

    def solved_by(self, solver: Solver) -> Scheme:
        """The scheme, with codes and scales that another solver finds.

        Raises:
            ConfigError: the scheme has no codes, or a solver already.
        """
        if self.weight.element is BF16 or self.solver is not None:
            has = "no codes" if self.solver is None else f"solver {self.solver.name!r} already"
            suggestion = "a scheme that quantizes, and one solver"
            raise ConfigError(f"solver {solver.name!r} of scheme {self.name!r}", has, suggestion)
        name, summary = f"{self.name}:{solver.name}", f"{self.summary}; {solver.name}"
        return replace(self, name=name, aliases=(), summary=summary, solver=solver)

    @property
    def unsolved(self) -> Scheme:
        """The scheme without a solver of its own: what the stored tensors are, whoever found them."""
        return self if self.solver is None else replace(self._without(self.solver.name), solver=None)

    @cached_property
    def in_order(self) -> Scheme:
        """The scheme of the columns as they are stored."""
        return replace(self._without(_ORDERED), ordered=False) if self.ordered else self

    @cached_property
    def per_token(self) -> Scheme:
        """The scheme with a scale for each token in place of one that is stored."""
        if self.activation is None or not self.static:
            return self
        option = "static_asym" if self.activation.zero_point else "static"
        return replace(self._without(option), activation=Quant(self.activation.format, (1, 0)))

    def _without(self, option: str) -> Scheme:
        """The scheme under the name that it has without an option."""
        names, summaries = self.name.split(":"), self.summary.split("; ")
        names.remove(option)
        summaries.remove(option)
        return replace(self, name=":".join(names), summary="; ".join(summaries))

    def layout(self, n: int, k: int) -> Layout:
        """Stored tensors of one weight ``[n, k]``: name -> (shape, dtype). Where compressed-tensors has the
        format, its layout.

        ``weight`` [n, k] for 8-bit and bf16 elements, else ``weight_packed``: int4 eight to an int32 word,
        the others as bytes, low bits first. ``weight_scale``, one for each block. Where the scheme has them:
            ``weight_zero``
        (offsets), ``weight_global_scale`` [1] (what block scales were multiplied with, as in NVFP4),
        ``weight_outer_scale`` (a factor for each outer block), ``weight_scale_scale`` [n, 1] and
        ``weight_scale_offset`` [1] (of quantized scales), ``weight_order`` [k] (the input that each stored
        column is for), ``input_scale`` [1] and ``input_zero_point`` [1] (of activations). GGUF:
        ``weight_blocks`` uint8 [n, bytes].
        """
        quant, element = self.weight, self.weight.element
        if element is BF16:
            return {"weight": ((n, k), torch.bfloat16)}
        if element.block:
            return {
                "weight_blocks": ((n, math.ceil(k / element.block) * GGUF_BYTES[element.name]), torch.uint8)
            }
        scale = quant.scale_shape(n, k)
        out: Layout = {"weight_packed": ((n, math.ceil(k / 8)), torch.int32)}
        if element.bits == 8:
            out = {"weight": ((n, k), element.storage)}
        elif element.name != "int4":
            out = {"weight_packed": ((n, packed_bytes(k, element.bits)), torch.uint8)}
        out["weight_scale"] = (scale, torch.uint8 if quant.scale_quant else quant.scale_dtype)
        if quant.scale_quant:
            out |= {
                "weight_scale_scale": ((n, 1), torch.float32),
                "weight_scale_offset": ((1,), torch.float32),
            }
        if quant.zero_point:
            out["weight_zero"] = (scale, quant.scale_dtype)
        if quant.outer_block == (0, 0):
            out["weight_global_scale"] = ((1,), torch.float32)
        elif quant.outer_block:
            out["weight_outer_scale"] = (blocks_of(n, k, *quant.outer_block), torch.float32)
        if self.ordered:
            out[ORDER] = ((k,), torch.int32)
        if self.activation is not None and self.static:
            out[INPUT_SCALE] = ((1,), torch.float32)
            if self.activation.zero_point:
                out[INPUT_ZERO] = ((1,), torch.int8)
        return out

    def bytes(self, n: int, k: int) -> int:
        """Bytes of one quantized weight ``[n, k]`` with its scales."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.layout(n, k).values())


def packed_bytes(k: int, bits: int) -> int:
    """Bytes of ``k`` codes of 4 or 6 bits, in whole groups of two or four."""
    return math.ceil(k / 2) if bits == 4 else 3 * math.ceil(k / 4)


def is_group_size(option: str) -> bool:
    """Whether an option of a scheme names a group size, as ``g64``."""
    return _GROUP.match(option) is not None
