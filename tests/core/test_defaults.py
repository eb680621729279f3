"""The same bits whatever the default dtype and the default device of the process, and while another thread
changes them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import core_defaults as program
import pytest
import torch
from core_models import DENSE, MOE, made, same_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import quantport
import quantport_cpu.detect
from quantport.kernels import aten
from quantport.plugins.registry import default_registry
from quantport.scheme.catalog import BUILTIN

ROOMS = ("reference", pytest.param("room", marks=pytest.mark.slow))
pytestmark = pytest.mark.xdist_group("defaults")  # one worker asks the processes for all
PLAIN = ("float32", "cpu")
DEFAULTS = (("bfloat16", "cpu"), ("float16", "meta"), ("float64", "context"))
RESULTS = ("stored", "values", "empty", "shard", "linear", "forward", "experts", "updated")


@pytest.fixture(scope="module", params=ROOMS)
def told(request):
    """What a fresh process says under each of the defaults."""
    command = [sys.executable, str(Path(program.__file__))]
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
    }
    children = {d: subprocess.Popen([*command, *d, request.param], **pipes) for d in (PLAIN, *DEFAULTS)}
    out = {}
    for defaults, child in children.items():
        text, errors = child.communicate(timeout=300)
        out[defaults] = json.loads(text) if child.returncode == 0 else errors[-2000:]
    assert isinstance(out[PLAIN], dict), out[PLAIN]
    return out


@pytest.mark.parametrize("defaults", DEFAULTS, ids="-".join)
def test_a_process_with_other_defaults_ends_well(told, defaults):
    assert isinstance(told[defaults], dict), told[defaults]
    assert told[defaults].keys() == told[PLAIN].keys()


@pytest.mark.parametrize("defaults", DEFAULTS, ids="-".join)
@pytest.mark.parametrize("scheme", program.schemes())
def test_bits_of_a_scheme(told, scheme, defaults):
    names = [f"{scheme}/{result}" for result in RESULTS]
    assert [told[defaults][n] for n in names] == [told[PLAIN][n] for n in names]


@pytest.mark.parametrize("defaults", DEFAULTS, ids="-".join)
def test_bits_of_caches_and_of_models_that_are_loaded_saved_and_quantized_in_place(told, defaults):
    names = [n for n in told[PLAIN] if n.startswith("kv/") or n.partition("/")[2] not in RESULTS]
    assert len(names) == 4 + 5 * len(program.LOADED)
    assert {n: told[defaults][n] for n in names} == {n: told[PLAIN][n] for n in names}


class NoDoubles(TorchDispatchMode):
    """Finds tensors that took the default dtype, which is fp64 meanwhile, even where the result is rounded
    back.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not any(isinstance(t, torch.Tensor) and t.dtype is torch.float64 for t in tree_leaves(out)), (
            func
        )
        return out


@pytest.fixture
def doubles():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("scheme", program.schemes())
def test_nothing_on_the_way_has_the_default_dtype(scheme, doubles):
    with NoDoubles():
        program.of_numerics(BUILTIN[scheme])
        program.of_modules(BUILTIN[scheme])


@contextmanager
def engine(dtype, device, inference):
    """What an engine sets while it builds a model and loads its weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.inference_mode(inference):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("scheme", program.schemes())
def test_inside_and_outside_of_an_engine(scheme):
    """Whatever is made inside and kept must do outside, and the other way round."""

    def bits():
        return {**program.of_numerics(BUILTIN[scheme]), **program.of_modules(BUILTIN[scheme])}

    with engine(torch.bfloat16, "meta", inference=True):
        inside = bits()
    outside = bits()
    with engine(torch.float16, "cpu", inference=False):
        again = bits()
    assert inside == outside == again
    assert set(outside) == set(RESULTS)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "int8", "int4"])
def test_nothing_on_the_way_of_a_cache_has_the_default_dtype(name, doubles):
    with NoDoubles():
        program.of_cache(name)


def test_the_watch_can_fail(doubles):
    with NoDoubles(), pytest.raises(AssertionError, match="div"):
        torch.arange(3, dtype=torch.int64) / 2


@pytest.mark.parametrize(
    "scheme", ["int8", "fp8_per_tensor", "fp8_per_block", "mxfp4", "nf4:double", "int4_mse"]
)
def test_a_process_that_flushes_subnormal_numbers(scheme):
    """As a library does that is built for fast arithmetic, for the whole process."""

    def quantized(flush):
        model = made()
        for parameter in model.parameters():
            parameter.data = parameter.mul(2.0**-124)
        if flush and not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot")
        try:
            quantport.quantize_(model, scheme)
        finally:
            torch.set_flush_denormal(False)
        return model

    same_state(quantized(flush=True), quantized(flush=False))


@pytest.fixture(params=ROOMS)
def room(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(quantport_cpu.detect, "why_unavailable", lambda: "off")
        monkeypatch.setitem(
            vars(default_registry()), "_kernels", {**default_registry()._kernels, "cpu": aten.portable()}
        )


@pytest.mark.parametrize("scheme", ["int8", "int4_g32", "fp8_per_block", "mxfp4", "nf4:double", "q4_k"])
def test_another_thread_changes_the_default_dtype_all_the_time(scheme, room):
    def work(model):
        quantport.quantize_(model, scheme)
        return [quantport.load(DENSE, scheme), quantport.load(MOE, scheme), model]

    def toggle():
        while not stop.wait(1e-6):  # waiting leaves Python to the other thread, which would crawl
            for dtype in (torch.bfloat16, torch.float64, torch.float32):
                torch.set_default_dtype(dtype)

    expected, again, stop = work(made()), made(), threading.Event()
    thread = threading.Thread(target=toggle)
    thread.start()
    try:
        found = work(again)
    finally:
        stop.set()
        thread.join()
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        same_state(one, other)
