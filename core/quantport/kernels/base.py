"""The contract of a kernel: a request in, the reasons against it out; no reasons means yes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from quantport.device import Device
from quantport.errors import UnsupportedError
from quantport.kernels.verdict import (
    Accepted,
    Claim,
    Evidence,
    Reason,
    ReasonCode,
    Refusal,
    Rejected,
    Status,
    Verdict,
    check_verdict,
)
from quantport.numerics import raw, rotate
from quantport.numerics.sharding import shard_dims
from quantport.scheme import Scheme

StoredWeight = dict[str, Tensor]
Packed = tuple[Tensor, ...]
RowFunction = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class WeightSpec:
    """Which weight a kernel is bound to: the scheme and the logical shape [n, k]. Passed to every call of the
    kernel.
    """

    scheme: Scheme
    n: int
    k: int


@dataclass(frozen=True)
class Request:
    """What a layer needs.

    Attributes:
        weight: Scheme and shape of one weight (of one expert, for ``moe``).
        layer: ``linear`` or ``moe``.
        device: Where it shall run.
        dtype: Activation dtype.
        num_tokens: Expected tokens at a time: rows of the activations (1 = decode of one sequence).
    """

    weight: WeightSpec
    layer: str
    device: Device
    dtype: torch.dtype = torch.bfloat16
    num_tokens: int = 1


class CodedRows(NamedTuple):
    """Activations that are quantized.

    Attributes:
        codes: ``[M, K]``, contiguous, in the storage dtype of their format.
        scale: The scale of each token, fp32 ``[M, 1]``.
        dtype: Of the activations before.
    """

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype


class PackedTensor(NamedTuple):
    """One packed tensor of a weight.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        rows: The dimension along which those of ranges of rows are joined; None where all have the same.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: int | None


class PackedLayout(NamedTuple):
    """What a kernel packs a weight into, where it packs ranges of rows each by itself.

    Attributes:
        tensors: The packed tensors.
        block: Ranges begin at multiples of this many rows.
    """

    tensors: tuple[PackedTensor, ...]
    block: int = 1


class Kernel(ABC):
    """One way to run one or more schemes on one kind of device. Stateless: one instance serves every layer.

    Attributes:
        name: Unique name, for example ``cpu.int8``.
        status: ``native`` if it computes on units built for the precision, ``dequantize`` or
            ``reference`` otherwise.
        tolerance: Largest accepted relative error against the reference,
            ``max|y - y_ref| / max|y_ref|`` over a whole output.
        numeric_deviation: Named difference from the scheme's numerics; empty when there is none.
        quantizes_activations: False for weight-only kernels.
        layers: Kinds of layers that it is for.
        reads_input_scale: Whether ``run`` takes the scale of activations, where a scheme stores one, from the
            packed weight.
    """

    name: str
    status: Status = Status.NATIVE
    tolerance: float = 2.0**-6
    numeric_deviation: str = ""
    quantizes_activations: bool = False
    layers: tuple[str, ...] = ("linear", "moe")
    reads_input_scale: bool = False

    def serves(self, scheme: Scheme) -> bool:
        """Whether the kernel is for this scheme at all; what it needs of hardware and shape is in
        ``reasons_against``.
        """
        return True

    @abstractmethod
    def reasons_against(self, request: Request) -> Sequence[Reason]:
        """Returns why the request cannot run; empty means that it can."""

    @abstractmethod
    def claim(self, request: Request) -> Claim:
        """Returns how we know that an accepted request runs on this architecture."""

    def speed(self, request: Request) -> float | None:
        """Returns the speed relative to the best BF16 path for ``request.num_tokens``, or None when nobody
        measured it.
        """
        return None

    def slow(self, request: Request) -> str:
        """Returns why the request is known to be slower than BF16 without measuring it, or an empty
        string.
        """
        return ""

    def pack(self, stored_weight: StoredWeight, spec: WeightSpec) -> Packed:
        """Turns the stored tensors (``Scheme.layout``) into what ``run`` reads.

        The default keeps them, float8 viewed as uint8: torch compares, pickles and traces bytes better than
        float8.
        """
        return tuple(raw(stored_weight[name]) for name in spec.scheme.layout(spec.n, spec.k))

    @property
    def keeps_layout(self) -> bool:
        """Whether packed weights are the stored tensors as they are, so that single rows can be read out of
        them.
        """
        return type(self).pack is Kernel.pack

    def packed_layout(self, spec: WeightSpec) -> PackedLayout | None:
        """What `pack` returns, where a weight may be packed (and unpacked) some rows at a time; None where it
        is packed as a whole, which takes memory for the stored tensors beside the packed ones.
        """
        return PackedLayout(self.stored_layout(spec)) if self.keeps_layout else None

    def stored_layout(self, spec: WeightSpec) -> tuple[PackedTensor, ...]:
        """The stored tensors as what a weight is packed into: by the default `pack`."""
        dims = shard_dims(spec.scheme, 0)
        stored = spec.scheme.layout(spec.n, spec.k).items()
        return tuple(PackedTensor(shape, _raw(dtype), dims[key]) for key, (shape, dtype) in stored)

    def unpack(self, packed: Packed, spec: WeightSpec) -> StoredWeight:
        """The exact inverse of ``pack``."""
        layout = spec.scheme.layout(spec.n, spec.k)
        return {name: t.view(dtype) for (name, (_, dtype)), t in zip(layout.items(), packed, strict=True)}

    @abstractmethod
    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        """Computes ``x @ W.T + bias``.

        Args:
            x: Activations ``[M, K]``, contiguous, in the dtype of the request; rotated already, if the
                scheme is.
            packed: What ``pack`` returned.
            bias: ``[N]`` or None.
            spec: Scheme and shape.

        Returns:
            ``[M, N]`` in the dtype of ``x``.
        """

    def run_codes(self, x: CodedRows, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        """As ``run``, on activations that are quantized already. A kernel that has it also runs schemes with
        a stored scale of activations.

        Args:
            x: The activations.
            packed: As for ``run``.
            bias: As for ``run``; fp32 where activations have a zero point, whose part it then holds too.
            spec: Scheme and shape; activations of the scheme have a scale for each token.

        Returns:
            ``[M, N]`` in ``x.dtype``.
        """
        raise UnsupportedError(f"multiply codes by {self.name}", "it quantizes by itself", "run")

    @property
    def takes_codes(self) -> bool:
        """Whether it has ``run_codes``."""
        return type(self).run_codes is not Kernel.run_codes

    def row_function(self, packed: Packed, spec: WeightSpec) -> RowFunction | None:
        """A function for a single row of activations, as ``run`` without a bias, which does once what
        depends on the weight alone: for layers so small that the call takes as long as the product.

        Args:
            packed: What ``pack`` returned. The function finds out by itself if it has moved in memory.
            spec: Scheme and shape; the scheme is not rotated.

        Returns:
            A function of ``[..., K]``, one row in all, that returns ``[..., N]`` in the dtype of it, or None
            for what it does not take; or None (the default): there is no such function.
        """
        return None

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        """Runs on activations as the layer gets them: rotates them first where the scheme is rotated."""
        return self.run(rotate(x, spec.scheme.rotation) if spec.scheme.rotation else x, packed, bias, spec)

    def unrelated(self, scheme: Scheme, layer: str) -> Rejected | None:
        """The refusal of a scheme or a kind of layer that the kernel is not for at all, which is the same on
        every device and for every shape; None where it depends on them.
        """
        if scheme.ordered and layer == "moe":
            return _unrelated(self.name, "no kernel orders the inputs of experts")
        served = _served(scheme)
        if not self.serves(served):
            return _unrelated(self.name, f"it does not run {served.name}")
        if layer not in self.layers:
            return _unrelated(self.name, f"it is for {', '.join(self.layers)} layers")
        return None

    def verdict(self, request: Request) -> Verdict:
        """Folds the methods above into a verdict. Ask through ``guarded_verdict`` a kernel that may raise, or
        return nonsense.
        """
        scheme = request.weight.scheme
        if unrelated := self.unrelated(scheme, request.layer):
            return unrelated
        if scheme.static and self.quantizes_activations and not (self.takes_codes or self.reads_input_scale):
            text = "it finds the scales of activations by itself, and takes none that is stored"
            return Rejected(self.name, (Reason(text, Refusal.NOT_OFFERED),))
        if scheme.ordered or scheme.static:
            verdict = self.verdict(replace(request, weight=replace(request.weight, scheme=_served(scheme))))
            if isinstance(verdict, Accepted) and scheme.static and self.quantizes_activations:
                return _not_measured(verdict)
            return verdict
        reasons = _reasons(self.reasons_against(request))
        if reasons:
            return Rejected(self.name, reasons)
        effective = scheme if self.quantizes_activations else scheme.weight_only
        status = self.status
        if scheme.activation and not self.quantizes_activations:
            status = Status.WEIGHT_ONLY
        claim, speed = self.claim(request), self.speed(request)
        return Accepted(
            self.name,
            status,
            effective.precision,
            claim,
            speed,
            self.slow(request),
            self.numeric_deviation,
        )


def _not_measured(verdict: Accepted) -> Accepted:
    """A verdict on a kernel that was measured with scales of activations that it finds by itself."""
    claim = verdict.claim
    if claim.evidence is Evidence.MEASURED:
        claim = Claim(Evidence.DECLARED, f"multiplies such codes where it finds their scales: {claim.source}")
    return replace(verdict, claim=claim, speed=None)


def _served(scheme: Scheme) -> Scheme:
    """What a kernel is asked for: the scheme without what is done before it is called."""
    return scheme.in_order.per_token


@cache
def _unrelated(kernel: str, text: str) -> Rejected:
    """The matrix and the plan hear it many thousand times."""
    return Rejected(kernel, (Reason(text),), unrelated=True)


def _raw(dtype: torch.dtype) -> torch.dtype:
    """The dtype that ``numerics.raw`` views codes and scales as."""
    return raw(torch.empty(0, dtype=dtype, device="cpu")).dtype


def guarded_verdict(kernel: Kernel, request: Request) -> Verdict:
    """What a kernel answers; one that raises or returns nonsense refuses, and says so."""
    try:
        verdict = kernel.verdict(request)
        check_verdict(verdict)
    except (Exception, SystemExit) as error:  # a stranger's code: a reason, never a crash of the plan
        text = f"the kernel raised {type(error).__name__}: {error}"
        return Rejected(kernel.name, (Reason(text, code=ReasonCode.RAISED),))
    return verdict


def unrelated_verdicts(kernels: Sequence[Kernel], scheme: Scheme, layer: str) -> dict[str, Rejected]:
    """What those of some kernels answer that are for other schemes or layers, by name: asked once for many
    devices or shapes. A kernel that raises, or folds its verdict by itself, is asked each time.
    """
    found = {}
    for kernel in kernels:
        if type(kernel).verdict is Kernel.verdict:
            with suppress(Exception, SystemExit):  # it answers for that when it is asked for its verdict
                if refusal := kernel.unrelated(scheme, layer):
                    found[kernel.name] = refusal
    return found


def _reasons(answer: Sequence[Reason]) -> tuple[Reason, ...]:
    """What ``reasons_against`` returned, if that is what it must be: a kernel of a stranger may have been
    written for texts.

    Raises:
        TypeError: it is something else.
    """
    reasons = (answer,) if isinstance(answer, str) else tuple(answer)
    for one in reasons:
        if not isinstance(one, Reason):
            raise TypeError(
                f"reasons_against returned {one!r}, a {type(one).__name__}: return a sequence of "
                "Reason(text, kind)"
            )
    return reasons
