"""Solvers: how the codes and scales of a weight are found. What they mean is the scheme's to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from quantport.errors import ShapeError

if TYPE_CHECKING:
    from quantport.scheme.scheme import Scheme


@dataclass(frozen=True, eq=False)
class Stats:
    """What is known of the inputs of a layer: how large each channel is.

    Of a scheme that rotates, the rotated inputs: those that the quantized weight is multiplied with.

    Attributes:
        square_sums: fp64 ``[K]``: for each input channel, the sum of the squares of its values.
        count: Number of tokens that were added up.
    """

    square_sums: Tensor
    count: int

    @classmethod
    def of(cls, x: Tensor) -> Stats:
        """The statistics of inputs ``[..., K]``, any floating dtype."""
        tokens = x.detach().reshape(-1, x.shape[-1])
        return cls(tokens.double().square().sum(0), tokens.shape[0])

    @property
    def second_moments(self) -> Tensor:
        """fp64 ``[K]``: the mean square of each input channel; zeros of no tokens."""
        return self.square_sums / max(1, self.count)

    def update(self, x: Tensor) -> Stats:
        """These statistics and those of more inputs ``[..., K]``.

        Raises:
            ShapeError: the inputs have another number of channels.
        """
        return self.merge(Stats.of(x))

    def merge(self, other: Stats) -> Stats:
        """The statistics of both sets of inputs, on the device of these.

        Raises:
            ShapeError: the inputs have another number of channels.
        """
        if other.square_sums.shape != self.square_sums.shape:
            raise ShapeError(
                "merge statistics of inputs",
                f"{list(self.square_sums.shape)} and {list(other.square_sums.shape)} channels",
                "statistics of one layer",
            )
        sums = self.square_sums + other.square_sums.to(self.square_sums.device)
        return Stats(sums, self.count + other.count)


class Solver(ABC):
    """Finds the codes and scales of a weight.

    Attributes:
        name: Unique among the solvers and the options of schemes; ``int8:NAME`` is solved by it.
    """

    name: str

    @abstractmethod
    def solve(self, weight: Tensor, scheme: Scheme, stats: Stats | None = None) -> dict[str, Tensor]:
        """Quantizes one weight.

        Args:
            weight: ``[n, k]``, bf16, fp16 or fp32, on any device; finite, unless the solver is one of
                quantport's; of a scheme that rotates, rotated already.
            scheme: The scheme, which is not ``bf16``.
            stats: What is known of the inputs; a solver that uses none may ignore them.

        Returns:
            The tensors of ``scheme.layout(n, k)``, on the device of the weight.
        """
