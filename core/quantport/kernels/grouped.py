"""Experts whose weights lie side by side, for operators that multiply groups of rows by one tensor of
weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantport.kernels.base import Kernel, Packed


class StackedKernel(Kernel):
    """A kernel whose ``run_grouped`` reads the weights of all groups as one tensor.

    ``QuantExperts`` makes the stack with the first weight and packs every weight into its slot, so that
    nothing is held twice.
    """

    def stack(self, packed: Packed, groups: int, shared: int) -> Packed:
        """Empty tensors for ``shared`` weights of each of ``groups``, all of them like ``packed``."""
        return tuple(t.new_empty(groups, shared, *t.shape) for t in packed)

    def slot(self, stack: Packed, group: int, which: int) -> Packed:
        """Where one weight lies in a stack: views. The first slot starts where the stack does."""
        return tuple(t[group, which] for t in stack)

    def bundle(self, packed: Sequence[Packed], shared: int = 1) -> Sequence[Packed]:
        """The stack in which the weights lie, or a new one where they lie elsewhere."""
        groups = len(packed) // shared
        stack = self._around(packed, groups, shared)
        if stack is None:
            stack = self.stack(packed[0], groups, shared)
            for i, weight in enumerate(packed):
                for to, t in zip(self.slot(stack, *divmod(i, shared)), weight, strict=True):
                    to.copy_(t)
        return (stack,)

    def _around(self, packed: Sequence[Packed], groups: int, shared: int) -> Packed | None:
        """The stack whose slots these are, or None."""
        first = packed[0]
        like = self.stack(tuple(t.to("meta") for t in first), groups, shared)
        for t, whole in zip(first, like, strict=True):
            if t.untyped_storage().nbytes() < (t.storage_offset() + whole.numel()) * t.itemsize:
                return None
        stack = tuple(
            t.as_strided(w.shape, w.stride(), t.storage_offset()) for t, w in zip(first, like, strict=True)
        )
        slots = (self.slot(stack, *divmod(i, shared)) for i in range(len(packed)))
        return stack if all(_place(a) == _place(b) for a, b in zip(slots, packed, strict=True)) else None


def _place(packed: Packed) -> list[object]:
    """What tells whether tensors are the same views of the same memory."""
    return [(t.untyped_storage()._cdata, t.storage_offset(), t.stride()) for t in packed]
