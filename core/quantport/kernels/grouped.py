"""Kernels that multiply the rows of every expert in one launch, and the loop for those that cannot."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor
from torch.nn import functional as F

from quantport.kernels.base import Kernel, Packed, WeightSpec
from quantport.numerics import rotate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class GroupedKernel(Kernel):
    """A kernel that multiplies each group of rows by weights of its own in one launch: the experts of a MoE
    layer.

    The weights of all groups lie side by side in one stack. ``QuantExperts`` allocates it with the first
    weight and copies every packed weight into its place, so that nothing is held twice.
    """

    def allocate(self, packed: Packed, groups: int, shared: int) -> Packed:
        """Empty tensors for ``shared`` weights of each of ``groups``, all of them like ``packed``."""
        return tuple(t.new_empty(groups, shared, *t.shape) for t in packed)

    def expert_view(self, stack: Packed, group: int, which: int) -> Packed:
        """One weight of a stack, as ``pack`` returned it: views of the memory of the stack."""
        return tuple(t[group, which] for t in stack)

    def prepare_grouped(self, packed: Sequence[Packed], shared: int = 1) -> Packed:
        """A stack of weights that were packed one by one: ``shared`` for each group, group by group.

        A single weight is viewed, several are copied.
        """
        if len(packed) == 1:
            shapes = self.allocate(tuple(t.to("meta") for t in packed[0]), 1, 1)
            return tuple(t.view(like.shape) for t, like in zip(packed[0], shapes, strict=True))
        stack = self.allocate(packed[0], len(packed) // shared, shared)
        for i, weight in enumerate(packed):
            for to, t in zip(self.expert_view(stack, *divmod(i, shared)), weight, strict=True):
                to.copy_(t)
        return stack

    @abstractmethod
    def run_grouped(
        self,
        x: Tensor,
        offsets: Tensor,
        stack: Packed,
        bias: Tensor | None,
        spec: WeightSpec,
        shared: int = 1,
    ) -> Tensor:
        """Multiplies each group of rows by weights of its own. On an accelerator it must not wait for the
        device: no ``item``, ``tolist`` or ``nonzero``.

        Args:
            x: Activations ``[T, K]``, contiguous, sorted by group; rotated already, if the scheme is.
            offsets: int32 ``[G + 1]`` on the device of ``x``, ascending, from 0 to T: group g has the rows
                ``offsets[g]`` to ``offsets[g + 1]``, perhaps none.
            stack: The weights, ``shared`` for each group.
            bias: ``[G, shared * N]`` or None.
            spec: Scheme and shape of every weight.
            shared: Weights of a group that read the same rows: 2 for gate and up.

        Returns:
            ``[T, shared * N]`` in the dtype of ``x``: the products of the weights of a group side by side.
        """

    def apply_grouped(
        self,
        x: Tensor,
        offsets: Tensor,
        stack: Packed,
        bias: Tensor | None,
        spec: WeightSpec,
        shared: int = 1,
    ) -> Tensor:
        """``run_grouped`` on activations as the layer gets them, as ``apply``."""
        return self.run_grouped(rotated(x, spec), offsets, stack, bias, spec, shared)

    def run_gated(
        self,
        x: Tensor,
        offsets: Tensor,
        gate_up: Packed,
        down: Packed,
        specs: tuple[WeightSpec, WeightSpec],
        activation: str,
    ) -> Tensor | None:
        """Experts as a whole, ``down(activation(gate(x)) * up(x))``, where that takes fewer launches than
        ``run_grouped`` twice.

        Args:
            x: Activations ``[T, K]``, as in ``run_grouped``.
            offsets: int32 ``[G + 1]``, as in ``run_grouped``.
            gate_up: The stack of gate and up of each expert.
            down: The stack of down of each expert.
            specs: Scheme and shape of gate and up, and of down.
            activation: A name in ``ACTIVATIONS``.

        Returns:
            ``[T, K]`` in the dtype of ``x``, or None (the default): there is no such way for these.
        """
        return None

    def run_token(
        self,
        x: Tensor,
        experts: Sequence[int],
        weights: Tensor,
        gate_up: Packed,
        down: Packed,
        specs: tuple[WeightSpec, WeightSpec],
        activation: str,
    ) -> Tensor | None:
        """The experts of a single token as a whole, ``sum_j weights[j] * down_j(activation(gate_j(x)) *
        up_j(x))``, where that takes fewer launches than ``run_grouped`` twice. On the host only.

        Args:
            x: Activations ``[1, K]``, contiguous.
            experts: The experts of the token, each of them there.
            weights: ``[1, top_k]``, as many.
            gate_up: The stack of gate and up of each expert.
            down: The stack of down of each expert.
            specs: Scheme and shape of gate and up, and of down; no scheme is rotated.
            activation: A name in ``ACTIVATIONS``.

        Returns:
            ``[1, K]`` in the dtype of ``x``, the products of experts added in fp32, or None (the default):
            there is no such way for these.
        """
        return None


def rotated(x: Tensor, spec: WeightSpec) -> Tensor:
    """Activations as ``run`` and ``run_grouped`` take them: rotated where the scheme is."""
    return rotate(x, spec.scheme.rotation) if spec.scheme.rotation else x


def loop_over_groups(
    multiply: Callable[[Tensor, Packed, Tensor | None], Tensor],
    x: Tensor,
    bounds: Sequence[int],
    weight: Callable[[int, int], Packed],
    bias: Tensor | None,
    columns: int,
    shared: int = 1,
) -> Tensor:
    """``GroupedKernel.run_grouped`` by one product for each weight of each group that has rows.

    Args:
        multiply: The product of rows, a packed weight and a bias.
        x: Activations ``[T, K]``, sorted by group.
        bounds: Where each group starts, and where the last one ends, on the host.
        weight: The packed weight of a group and its number among ``shared``.
        bias: ``[G, shared * columns]`` or None.
        columns: Columns of one product.
        shared: Weights of a group.

    Returns:
        ``[T, shared * columns]`` in the dtype of ``x``; rows of no group are undefined.
    """
    out = x.new_empty(x.shape[0], shared * columns)
    for g, (start, stop) in enumerate(pairwise(bounds)):
        for j in range(shared if start < stop else 0):
            own = slice(j * columns, (j + 1) * columns)
            part = None if bias is None else bias[g, own].contiguous()
            out[start:stop, own] = multiply(x[start:stop], weight(g, j), part)
    return out
