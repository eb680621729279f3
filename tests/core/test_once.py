"""What is made once is made once, whichever threads ask, and an error is not kept."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from quantport.errors import QuantportError
from quantport.plugins.hookspecs import Backend
from quantport.plugins.once import once, once_property
from quantport.testing.subject import alone

THREADS = 4


def together(ask):
    """What so many threads get that ask while the first is still at work."""
    started = threading.Barrier(THREADS)

    def run(_):
        started.wait(60)
        return ask()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def slow(made):
    made.append(object())
    threading.Event().wait(0.05)  # time enough for the others to ask
    return made[-1]


def test_threads_that_ask_together_get_the_one_that_was_made():
    made = []
    kept = once(lambda key: slow(made))
    assert set(together(lambda: kept(1))) == {made[0]}
    assert len(made) == 1
    assert kept(2) is made[1]


def test_a_property_is_made_once_for_each_object():
    made = []

    class Owner:
        value = once_property(lambda self: slow(made))

    first, second = Owner(), Owner()
    assert set(together(lambda: first.value)) == {made[0]}
    assert len(made) == 1
    assert second.value is made[1]
    assert first.value is made[0]


def test_kernels_and_devices_of_a_host_are_made_once():
    made = []

    class Slow(Backend):
        kind = "slow"
        torch_type = "cpu"
        archs = {}  # noqa: RUF012

        def detect(self):
            slow(made)
            return ()

        def kernels(self):
            slow(made)
            return ()

    host = alone(Slow())
    together(lambda: (host.devices, host.kernels("slow")))
    assert len(made) == 2


def test_an_error_is_not_kept_and_a_table_may_ask_for_another():
    asked = []

    @once
    def table(n):
        asked.append(n)
        if len(asked) == 1:
            raise QuantportError("a", "b", "c")
        return n and table(n - 1)

    with pytest.raises(QuantportError):
        table(1)
    assert table(1) == 0
    assert asked == [1, 1, 0]
