"""The device of the GPU benchmark, a GPU or in smoke mode CPU tensors in Triton's interpreter, and timing on it."""

from __future__ import annotations

import os
import platform
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import cache, cached_property
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from quantport.device import Device
    from quantport.kernels.base import Kernel

ROOT = Path(__file__).resolve().parent.parent
GROUP = "quantport.backends"
Call = Callable[[int], object]


def find_quantport() -> None:
    """Makes the source tree importable, and its rooms findable, where the package is not installed."""
    folders = [
        str(ROOT / "core"),
        *(str(room) for room in sorted((ROOT / "backends").iterdir()) if any(room.glob("quantport_*"))),
    ]
    if find_spec("quantport") is None:
        sys.path[:0] = folders
    if not entry_points(group=GROUP):
        import tomllib  # Python 3.11 and later; elsewhere: pip install -e . --no-deps

        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        info = Path(tempfile.mkdtemp(prefix="quantport-")) / f"quantport-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: quantport\nVersion: {project['version']}\n", encoding="utf-8"
        )
        lines = [f"{name} = {value}" for name, value in project["entry-points"][GROUP].items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]), encoding="utf-8")
        sys.path.append(str(info.parent))


def begin(smoke: bool) -> None:
    """The first call in every process. In smoke mode it fixes the interpreter's arithmetic as the tests do, if they are here."""
    find_quantport()
    torch.backends.cuda.matmul.allow_tf32 = False  # the reference is fp32, whatever the environment says
    tests = ROOT / "tests" / "backends" / "triton"
    if smoke and (tests / "conftest.py").exists() and find_spec("pytest") and find_spec("ml_dtypes"):
        sys.path.append(str(tests))
        runpy.run_path(str(tests / "conftest.py"))


@dataclass(frozen=True)
class Place:
    """A device to measure.

    Attributes:
        smoke: Whether tensors are on the CPU, for the interpreter; sizes are tiny then, and times mean nothing.
        until: The end of the stage, in seconds of ``time.monotonic``.
    """

    smoke: bool
    until: float

    @cached_property
    def device(self) -> Device:
        """The GPU; in smoke mode a simulated Hopper, for the verdicts of its kernels."""
        from quantport.plugins.registry import default_registry

        if self.smoke:
            return default_registry().device("cuda:sm_90")
        gpus = [d for d in default_registry().devices if d.torch_type == "cuda"]
        if not gpus:
            raise LookupError(
                f"no GPU found ({'; '.join(p.error for p in default_registry().problems) or 'torch sees none'})"
            )
        return gpus[0]

    @property
    def torch(self) -> torch.device:
        """The device of tensors."""
        return torch.device("cpu") if self.smoke else self.device.torch_device

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Activation dtypes, the main one first. The interpreter keeps bf16 as bits, so smoke mode takes fp16."""
        if self.smoke:
            return (torch.float16,)
        both = (torch.bfloat16, torch.float16)
        return both if self.device.arch.compute is torch.bfloat16 else both[1:]

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels of the device's room; in smoke mode those that the interpreter or plain torch runs."""
        from quantport.backend import aten
        from quantport.plugins.registry import default_registry

        kernels = default_registry().kernels(self.device.kind)
        if not self.smoke:
            return kernels
        from quantport_triton.kernels.base import TritonKernel
        from quantport_triton.kernels.weight_only import TritonWeightOnly

        triton = [k for k in kernels if isinstance(k, TritonKernel)] or [TritonWeightOnly("cuda")]
        return (*triton, *aten.portable())

    def over(self, keep: float = 0.0) -> bool:
        """Whether less than ``keep`` seconds are left."""
        return time.monotonic() + keep > self.until

    def within(self, seconds: float) -> Place:
        """The same place with a limit of ``seconds``."""
        return replace(self, until=min(self.until, time.monotonic() + seconds))

    def enter(self) -> None:
        """Makes the device and a stream that can be captured current, for the whole stage."""
        if not self.smoke:
            torch.cuda.set_device(self.torch)
            torch.cuda.set_stream(torch.cuda.Stream())

    def synchronize(self) -> None:
        if not self.smoke:
            torch.cuda.synchronize()

    @cached_property
    def cold(self) -> int:
        """Bytes of the copies that calls rotate over: more than twice the L2 cache."""
        return 1 if self.smoke else 5 * torch.cuda.get_device_properties(self.torch).L2_cache_size // 2

    def copies(self, size: int) -> int:
        """Number of copies of ``size`` bytes each that keep the cache cold."""
        return max(2, -(-self.cold // max(1, size)))

    def describe(self) -> dict[str, str]:
        """Device, date, commit and versions of this run."""
        triton: Any = __import__("triton") if find_spec("triton") else None
        return {
            "device": "Triton's interpreter, smoke mode" if self.smoke else self.device.name,
            "arch": self.device.arch.name,
            "date": date.today().isoformat(),
            "commit": os.environ.get("QUANTPORT_COMMIT") or commit(),
            "torch": torch.__version__,
            "triton": getattr(triton, "__version__", "none"),
            "cuda": str(torch.version.cuda),
            "python": platform.python_version(),
        }


def commit() -> str:
    """The commit of the source tree; a copy without its history has ``QUANTPORT_COMMIT`` in the environment."""
    try:
        git = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return git.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Timer:
    """Times a call, ``count`` times in a row: from a CUDA graph where it can be captured, else launch by launch."""

    def __init__(self, place: Place, call: Call, graph: bool = True, pool: Any = None) -> None:
        self.place, self.call, self.graph = place, call, None
        for i in range(1 if place.smoke else 3):
            call(i)
        self.count = 1 if place.smoke else self.calls_in_two_ms()
        if graph and not place.smoke:
            self.graph = capture(self.launch, pool)

    def calls_in_two_ms(self) -> int:
        """Number of calls that take about two milliseconds, from 2 to 50."""
        self.place.synchronize()
        start = time.perf_counter()
        self.call(3)
        self.place.synchronize()
        return max(2, min(50, int(2e-3 / (time.perf_counter() - start + 1e-9))))

    def launch(self) -> None:
        """Makes the calls one after the other."""
        for i in range(self.count):
            self.call(i)

    def run(self) -> float:
        """Seconds of one call."""
        if self.place.smoke:
            start = time.perf_counter()
            self.call(0)
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            self.launch()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / self.count


def capture(run: Callable[[], object], pool: Any = None) -> Any:
    """A CUDA graph of what ``run`` launches; None where it cannot be captured, since it waits for the device.

    ``torch.cuda.graph`` would empty the allocator's cache for each of thousands of captures.

    Args:
        run: Launches on the current stream.
        pool: Memory that is shared by graphs whose results are not read.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        graph.capture_begin(*([] if pool is None else [pool]))
        try:
            run()
        finally:
            graph.capture_end()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def interleaved(
    place: Place, calls: Mapping[str, Call], rounds: int = 7, failed: dict[str, str] | None = None
) -> dict[str, float]:
    """Median seconds of one call of each, all in turn in every round. A call that raises is left out, with the reason in ``failed``."""
    timers: dict[str, Timer] = {}
    pool = None if place.smoke else torch.cuda.graph_pool_handle()
    for name, call in calls.items():
        try:
            timers[name] = Timer(place, call, pool=pool)
            timers[name].run()
        except Exception as error:  # a cell of the page says why
            timers.pop(name, None)
            if failed is None:
                raise
            failed[name] = one_line(error)
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(1 if place.smoke else rounds):
        for name, timer in timers.items():
            times[name].append(timer.run())
        if place.over():
            break
    return {name: statistics.median(t) for name, t in times.items()}


def one_line(error: BaseException) -> str:
    """The error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


@cache
def weight(n: int, k: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """A random weight ``[n, k]`` with the magnitude of real ones."""
    maker = torch.Generator(device).manual_seed(seed)
    return torch.randn(n, k, device=device, generator=maker, dtype=torch.float32).mul_(0.02).to(dtype)
