"""What compiled code may touch, and where machine code comes from: defaults of torch, threads, guard pages,
the cache on disk.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cpu_schemes import DECLINED
from torch import Tensor

from quantport import numerics
from quantport.backend import BackendError, Request, Scheme, WeightSpec
from quantport.plugins.registry import default_registry
from quantport.scheme.catalog import BUILTIN
from quantport.testing.fakes import fake_tensors
from quantport_cpu import jit
from quantport_cpu.kernels import int8, kernels

UNAVAILABLE = jit.why_unavailable()
pytestmark = pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE or "numba is installed")

if not UNAVAILABLE:
    import stress

    from quantport_cpu.jit import (
        encode,
        grouped_small_batch,
        least_squares,
        parallel_for,
        quantize,
        small_batch,
        store,
        target,
    )
    from quantport_cpu.jit.grouped_small_batch import Scales
    from quantport_cpu.jit.jobs import Job
    from quantport_cpu.jit.memory import array

SCHEMES = [s for s in BUILTIN.values() if s.name not in DECLINED]
DEFAULTS = [torch.bfloat16, torch.float16, torch.float64]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(
        torch.equal(left[k].view(torch.uint8), right[k].view(torch.uint8)) for k in right
    )


def weight() -> Tensor:
    return torch.randn(48, 320, generator=torch.Generator().manual_seed(1)).bfloat16()


def accepted(scheme: Scheme) -> list[tuple[object, WeightSpec]]:
    """The compiled kernels of the room that run a scheme here."""
    spec = WeightSpec(scheme, 48, 320)
    requests = [
        (k, Request(spec, "linear", default_registry().device("cpu")))
        for k in kernels()
        if k.name.startswith("cpu.")
    ]
    return [(k, spec) for k, r in requests if k.serves(scheme) and not k.reasons_against(r)]


@pytest.fixture
def defaults():
    """Puts torch's defaults back."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_no_default_of_torch_changes_a_byte(scheme: Scheme, defaults: None) -> None:
    w, x = weight(), torch.randn(12, 320, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = numerics.quantize_weight(w, scheme)
    runs = [(k, spec, k.pack(expected, spec)) for k, spec in accepted(scheme)]
    results = [k.run(x[:rows], packed, None, spec) for k, spec, packed in runs for rows in (1, 3, 12)]
    for dtype, device in [*((d, None) for d in DEFAULTS), (torch.float32, "meta")]:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        assert same(quantize.quantize_weight(w, scheme), expected)
        again = [
            k.run(x[:rows], k.pack(expected, spec), None, spec) for k, spec, _ in runs for rows in (1, 3, 12)
        ]
        assert all(map(torch.equal, again, results))
        torch.set_default_device(None)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if accepted(s)], ids=lambda s: s.name)
def test_fake_tensors_give_shapes_and_touch_nothing(scheme: Scheme) -> None:
    for kernel, spec in accepted(scheme):
        with fake_tensors():
            layout = scheme.layout(spec.n, spec.k)
            stored = {
                name: torch.empty(shape, dtype=dtype, device="cpu") for name, (shape, dtype) in layout.items()
            }
            for rows in (1, 17, 130):
                y = kernel.run(
                    torch.empty(rows, spec.k, dtype=torch.bfloat16, device="cpu"),
                    kernel.pack(stored, spec),
                    None,
                    spec,
                )
                assert (y.shape, y.dtype) == ((rows, spec.n), torch.bfloat16)


def test_fake_and_real_memory_do_not_meet() -> None:
    codes = torch.zeros(8, 64, dtype=torch.int8)
    with fake_tensors():
        x = torch.empty(1, 64, device="cpu")
    with pytest.raises(BackendError, match="some of them are fake"):
        parallel_for.Kernel(encode._body(encode.INT8))(
            1, array(x, torch.float32, 1, 64), array(codes, torch.int8, 8, 64)
        )


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.zeros(4, 8, dtype=torch.float16), "float16"),
        (torch.zeros(4, 9), r"\[4, 9\]"),
        (torch.zeros(8, 4).t(), "strides"),
        (torch.zeros(4, 8, dtype=torch.float32).to_sparse(), "sparse"),
    ],
    ids=["dtype", "shape", "strides", "sparse"],
)
def test_another_memory_is_refused(tensor: Tensor, found: str) -> None:
    with pytest.raises((BackendError, RuntimeError), match=found):
        array(tensor, torch.float32, 4, 8)


def test_a_tensor_subclass_is_refused() -> None:
    class Mine(Tensor):
        pass

    with pytest.raises(BackendError, match="a Mine of"):
        array(torch.zeros(4, 8).as_subclass(Mine), torch.float32, 4, 8)


def test_a_kernel_takes_no_bare_tensor_and_no_address_of_one() -> None:
    with pytest.raises(TypeError):
        encode.kernel(encode.INT8)(1, torch.zeros(4))
    room = Path(jit.__file__).parents[1]
    assert [path.name for path in room.rglob("*.py") if "data_ptr" in path.read_text()] == ["memory.py"]


def guarded(tensor: Tensor) -> Tensor:
    """A copy of a contiguous tensor that ends where an unreadable page begins."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    whole = -(-size // page) * page
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    base = libc.mmap(
        None, whole + page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    assert libc.mprotect(base + whole, page, 0) == 0
    memory_ = (ctypes.c_uint8 * size).from_address(base + whole - size)
    out = torch.frombuffer(memory_, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
    return out.copy_(tensor)


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made by Linux's mmap")
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(5, 33), (48, 320), (129, 96)], ids=str)
def test_nothing_is_read_past_the_end(scheme: Scheme, shape: tuple[int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    expected = numerics.quantize_weight(w, scheme)
    assert same(quantize.quantize_weight(guarded(w), scheme), expected)
    spec = WeightSpec(scheme, *shape)
    for kernel in (k for k in kernels() if k.name.startswith("cpu.") and k.serves(scheme)):
        if kernel.reasons_against(Request(spec, "linear", default_registry().device("cpu"))):
            continue
        for rows in (1, 2, 5, 40):
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(4)).bfloat16()
            packed = kernel.pack(dict(expected), spec)
            y = kernel.run(guarded(x), tuple(map(guarded, packed)), None, spec)
            assert torch.equal(y, kernel.run(x, packed, None, spec))


def test_a_part_of_memory_is_inside_of_it() -> None:
    whole = array(torch.zeros(4, 8), torch.float32, 4, 8)
    assert whole.at(32, 96).address == whole.address + 32
    for offset, size in ((0, 132), (96, 36), (-4, 8), (128, 4)):
        with pytest.raises(BackendError, match="128 bytes"):
            whole.at(offset, size)


def test_jobs_outside_of_the_activations_or_of_the_result_are_refused() -> None:
    x, codes = torch.zeros(4, 64), torch.zeros(3, 16, 64, dtype=torch.int8)
    x8 = grouped_small_batch.quantized_int8(x.bfloat16())
    for job in (Job(2, 6, 0, 0), Job(3, 3, 0, 0), Job(-1, 2, 0, 0), Job(0, 2, 0, 8), Job(0, 2, 3, 0)):
        with pytest.raises(BackendError, match="rows, a weight and columns that are there"):
            grouped_small_batch.fp8(x, [job], codes.view(torch.uint8), Scales(), 16)
        with pytest.raises(BackendError, match="rows, a weight and columns that are there"):
            grouped_small_batch.int8(x, [Job(0, 1, 0, 0), job], codes, Scales(), 16)
        with pytest.raises(BackendError, match="rows, a weight and columns that are there"):
            grouped_small_batch.int8_int8(x8, [job], codes, torch.ones(3, 1, 1), 16)


def test_a_panel_of_another_size_is_refused() -> None:
    scheme = BUILTIN["mxfp4"]
    stored = numerics.quantize_weight(torch.randn(32, 256).bfloat16(), scheme)
    weight = small_batch.Blocks(
        "e2m1", "e8m0", 32, stored["weight_packed"], stored["weight_scale"], None, 256
    )
    with pytest.raises(BackendError, match=r"\[32, 256\]"):
        small_batch.decode(weight, torch.empty(32, 32))


def test_buffers_of_inference_mode_are_not_kept() -> None:
    x, codes = torch.ones(40, 96), torch.ones(48, 96, dtype=torch.int8)

    def both() -> list[Tensor]:  # in a thread without buffers yet
        with torch.inference_mode():
            first = int8.matmul_by_panels(x, codes)
        return [first, int8.matmul_by_panels(x, codes)]

    with ThreadPoolExecutor(1) as fresh:
        first, second = fresh.submit(both).result()
    assert torch.equal(first, second)


def test_a_kernel_is_compiled_once_by_many_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUANTPORT_CACHE_DIR", str(tmp_path))
    compiled = []
    made = parallel_for.machine.compile_object
    monkeypatch.setattr(
        parallel_for.machine, "compile_object", lambda text: compiled.append(text) or made(text)
    )
    kernel, found = parallel_for.Kernel(encode._body(encode.INT8)), []
    threads = [threading.Thread(target=lambda: found.append(kernel.code[1])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    "damage", [lambda b: b[:100], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b + b"x"]
)
def test_a_damaged_entry_is_compiled_again(damage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUANTPORT_CACHE_DIR", str(tmp_path))
    name = store.key(encode._body(encode.INT8), target.host_target())
    assert parallel_for.Kernel(encode._body(encode.INT8)).code
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(damage(whole))
    assert store.read(name) is None
    assert parallel_for.Kernel(encode._body(encode.INT8)).code
    assert store.read(name) is not None


def test_a_whole_entry_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUANTPORT_CACHE_DIR", str(tmp_path))
    assert parallel_for.Kernel(encode._body(encode.INT8)).code
    monkeypatch.setattr(parallel_for.machine, "assembly", lambda body: pytest.fail("compiled"))
    assert parallel_for.Kernel(encode._body(encode.INT8)).code


def test_without_a_folder_kernels_are_compiled_in_each_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("QUANTPORT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert parallel_for.Kernel(encode._body(encode.INT8)).code


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("QUANTPORT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(store.Path, "home", homeless)
    store.write("one", b"code")
    assert store.read("one") is None


def test_old_entries_of_a_kernel_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUANTPORT_CACHE_DIR", str(tmp_path))
    for i in range(12):
        store.write(f"one.kernel-{i:02}", b"code")
        os.utime(tmp_path / f"one.kernel-{i:02}", (i, i))
    store.write("other.kernel-0", b"code")
    assert len(list(tmp_path.glob("one.kernel-*"))) <= store._MAX_ENTRIES + 1
    assert store.read("one.kernel-11") == b"code"
    assert store.read("other.kernel-0") == b"code"


def test_the_key_covers_every_source_and_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.key(encode._body(encode.INT8), target.host_target())
    assert store.key(encode._body(encode.INT8), target.host_target()._replace(listed="+avx2")) != first
    assert store.key(encode._body(encode.INT8), target.host_target()._replace(name="another")) != first
    assert store.key(least_squares._rows, target.host_target()) != first
    package = tmp_path / "jit"
    shutil.copytree(Path(store.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    assert store.sources(package) == store._IMPORTED
    for helper in sorted(package.glob("*.py")):
        before = store.sources(package)
        with helper.open("a") as file:
            file.write("\n# another constant\n")
        assert store.sources(package) != before
    monkeypatch.setattr(store, "_IMPORTED", store.sources(package))
    assert store.key(encode._body(encode.INT8), target.host_target()) != first


def test_the_key_covers_constants_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store.ELEMENTS, "nf4", store.ELEMENTS["nf4"]._replace(values=(0.0,) * 16))
    assert store.sources(Path(store.__file__).parent) != store._IMPORTED


def test_a_package_without_sources_has_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert store.sources(tmp_path) == ""
    monkeypatch.setattr(store, "_IMPORTED", "")
    assert not store.are_sources_unchanged()


def test_code_of_edited_sources_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What runs was imported before the edit: its code must not be found by the next process, which imports
    the edited files.
    """
    monkeypatch.setenv("QUANTPORT_CACHE_DIR", str(tmp_path))
    assert parallel_for.Kernel(least_squares._rows).code
    entry = next(tmp_path.iterdir())
    monkeypatch.setattr(store, "_IMPORTED", "another digest")
    assert store.read(entry.name) is None
    entry.unlink()
    assert parallel_for.Kernel(encode._body(encode.INT8)).code
    assert list(tmp_path.iterdir()) == []


def test_kernels_capture_plain_numbers_only() -> None:
    table = torch.zeros(3)

    def body(frame):
        return table

    with pytest.raises(TypeError, match="plain numbers"):
        store.captured(body)


def test_fresh_processes_store_the_bytes_of_the_reference() -> None:
    """Eight workers, a clean and a warm cache, beside a thread that builds models, and fresh memory full of
    noise.
    """
    assert stress.run(2, options=False, MALLOC_PERTURB_="165") == []


@pytest.mark.slow
def test_fifty_fresh_processes_store_the_bytes_of_the_reference() -> None:
    assert stress.run(50) == []


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stress") / "model"
    stress.checkpoint(folder)
    return folder


@pytest.mark.parametrize("threads", [1, 2])
def test_forwards_beside_loads(model_folder: Path, threads: int) -> None:
    """Forwards of fp8 and int8 in one thread, while another loads and one more builds models."""
    # large enough for several threads
    x, codes = torch.randn(5, 512), torch.randint(0, 120, (1024, 512), dtype=torch.uint8)
    before, started, stop = torch.get_num_threads(), threading.Event(), threading.Event()
    torch.set_num_threads(threads)
    jobs = [Job(0, 5, 0, 0)]
    calls = [
        lambda: grouped_small_batch.fp8(x, jobs, codes, Scales(), 1024),
        lambda: grouped_small_batch.int8(x, jobs, codes.view(torch.int8), Scales(), 1024),
    ]
    expected = [call() for call in calls]
    try:
        with ThreadPoolExecutor(2) as beside:
            building = beside.submit(stress.build_models, started, stop)
            started.wait()
            loading = beside.submit(lambda: [stress.digest(model_folder, "nvfp4", 2) for _ in range(3)])
            same_ = []
            while not loading.done() or len(same_) < 200:
                same_ += [torch.equal(call(), e) for call, e in zip(calls, expected, strict=True)]
            stop.set()
            assert building.result() > 0
            assert len(set(loading.result())) == 1
    finally:
        stop.set()
        torch.set_num_threads(before)
    assert all(same_)
