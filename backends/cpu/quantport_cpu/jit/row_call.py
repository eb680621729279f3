"""A single row of bf16 times one weight, with all that depends on the weight done once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quantport_cpu.jit.memory import Array, new_row, places, row_address
from quantport_cpu.jit.parallel_for import Kernel, threads_for


class RowCall:
    """Calls a kernel over jobs for one row, which it reads as bf16.

    Args:
        kernel: The kernel.
        weights: The tensors of the weight.
        before: The words before the result, memory of the weights among them.
        after: The words after the row: its stride, the number of rows, and what the kernel takes more.
        shape: Rows and columns of the weight.
        blocks: Blocks of the kernel.
        slot: Bytes of its scratch for each thread.
    """

    def __init__(
        self,
        kernel: Kernel,
        weights: Sequence[Tensor],
        before: Sequence[Array | int],
        after: Sequence[int],
        shape: tuple[int, int],
        blocks: int,
        slot: int,
    ) -> None:
        self._kernel, self._weights, self._held = kernel, weights, before
        self._places = places(weights)
        self._before = [word.address if isinstance(word, Array) else word for word in before]
        self._after, (self._n, self._k), self._blocks, self._slot = after, shape, blocks, slot

    def __call__(self, x: Tensor) -> Tensor | None:
        """``[..., K]``, one row in all, to ``[..., N]``; None for other activations, and where a weight has
        moved in memory.
        """
        source = row_address(x, self._k)
        if not source or places(self._weights) != self._places:
            return None
        out, place = new_row(x, x.shape[:-1], self._n)
        if not place:
            return None
        words = (*self._before, place, self._n, 1, source, *self._after)
        self._kernel.launch(self._blocks, words, threads_for(self._n * self._k), self._slot, (x, out))
        return out
