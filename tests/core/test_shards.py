"""A model that is loaded in shards: joined, those of all ranks are what one process loads, bit by bit."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from core_models import Tiny, made, same_bits, write
from core_references import check_parts, randn
from test_sharding import SCHEMES, sizes, weight

import quantport
from quantport import numerics
from quantport.engine import PartialLoad, RankError, Ranks, Shards, join_shards
from quantport.errors import ConfigError, SaveError, UnsupportedError, WeightError
from quantport.loading.build_context import building
from quantport.numerics.shard_steps import SharedMaxima
from quantport.numerics.sharding import spans_shards


class Threads:
    """Ranks of one process, each a thread. One that has ended breaks the wait of the others."""

    def __init__(self, count):
        self.count, self.calls = count, [0] * count
        self._barrier, self._brought = threading.Barrier(count, timeout=30), [None] * count

    def ranks(self, rank):
        def reduce(values):
            self.calls[rank] += 1
            self._brought[rank] = values
            self._barrier.wait()
            out = torch.stack(self._brought).amax(0)
            self._barrier.wait()
            return out

        return Ranks(rank, self.count, reduce)

    def each(self, run):
        """What each rank returns, or raises."""

        def one(rank):
            try:
                return run(self.ranks(rank))
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


@pytest.mark.parametrize("name", [name for name in SCHEMES if any(spans_shards(SCHEMES[name], d) for d in (0, 1))])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("rows", [1, 1000])
def test_two_passes_make_of_a_shard_what_it_is_of_the_whole(name, dim, rows):
    scheme = SCHEMES[name]
    whole = weight(*sizes(scheme, dim, 2))
    rows *= numerics.sharding.alignment(scheme, 0)
    parts = whole.chunk(2, dim)
    every = [SharedMaxima(scheme, dim, part.shape) for part in parts]

    def reader(part):
        @contextmanager
        def read(start, stop):
            yield part[start:stop]

        return read

    while not every[0].complete:
        for shared, part in zip(every, parts, strict=True):
            shared.find_next(reader(part), rows)
        agreed = torch.maximum(*(shared.found for shared in every))
        for shared in every:
            shared.agree(agreed)
    stored = [
        numerics.by_rows.join_steps(shared.quantize_steps(reader(part), rows), scheme, part.shape)
        for shared, part in zip(every, parts, strict=True)
    ]
    joined = join_shards(stored, scheme, dim)
    for key, tensor in numerics.quantize_weight(whole, scheme).items():
        assert same_bits(joined[key], tensor), key
