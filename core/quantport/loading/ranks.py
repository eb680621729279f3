"""The ranks that load one model together: what they agree on, and that all fail where one does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quantport.errors import RankError


@dataclass(frozen=True)
class Ranks:
    """The ranks that load one model, each a share of it.

    Attributes:
        rank: This one, from 0.
        count: How many there are.
        reduce: Elementwise maximum over all ranks of an fp32 tensor on the CPU; each has to call it as often
            as the others.
    """

    rank: int
    count: int
    reduce: Callable[[Tensor], Tensor]

    @classmethod
    def of_group(cls, device: str | torch.device, group: Any = None) -> Ranks:
        """The ranks of a ``torch.distributed`` group.

        Args:
            device: Whose tensors its backend reduces.
            group: None for the default group.
        """

        def reduce(values: Tensor) -> Tensor:
            reduced = values.to(device, copy=True)
            dist.all_reduce(reduced, dist.ReduceOp.MAX, group)
            return reduced.to(values.device)

        return cls(dist.get_rank(group), dist.get_world_size(group), reduce)

    @contextmanager
    def together(self, asked: str) -> Iterator[None]:
        """Where one rank fails inside, all fail: none goes on to wait for one that has given up.

        Args:
            asked: What is done inside, for the error of the others.

        Raises:
            RankError: another rank has failed, or is gone.
        """
        try:
            yield
        except Exception:  # whatever it is, the others must not wait for this rank
            with suppress(RuntimeError):  # of a group that is broken: what was raised inside says more
                self.reduce(_number(self.rank + 1))
            raise
        failed = int(self.maximum(_number(0), asked).item())
        if failed:
            raise RankError(asked, f"rank {failed - 1} has failed", "see the error of that rank")

    def maximum(self, values: Tensor, asked: str) -> Tensor:
        """Elementwise maximum over all ranks of an fp32 tensor on the CPU.

        Raises:
            RankError: a rank is gone, or does not answer within the time that the group gives it.
        """
        try:
            return self.reduce(values)
        except RuntimeError as error:
            found = f"a rank is gone, or does not answer: {error}"
            raise RankError(asked, found, "all ranks again; see what the others say") from error

    def agree(self, text: str, asked: str) -> None:
        """Makes sure that all ranks have the same text.

        Raises:
            RankError: they have not; on every rank.
        """
        digest = hashlib.sha256(text.encode()).digest()
        pieces = [int.from_bytes(digest[i : i + 3], "big") for i in range(0, 24, 3)]  # fp32 holds 24 bits
        own = torch.tensor(pieces, dtype=torch.float32, device="cpu")
        most, least = self.maximum(torch.cat([own, -own]), asked).split(len(pieces))
        if not torch.equal(most, -least):
            found = "the ranks have made different plans"
            suggestion = (
                "the same files, scheme and version everywhere; a scheme by name where devices differ"
            )
            raise RankError(asked, found, suggestion)

    def shares(self, size: int) -> list[tuple[int, int]]:
        """First and last of so many rows or columns that each rank holds, as ``torch.chunk`` deals them."""
        most = -(-size // self.count)
        return [(min(size, r * most), min(size, (r + 1) * most)) for r in range(self.count)]


def _number(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.float32, device="cpu")
