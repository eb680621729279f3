"""The memory at hand: of the system, of containers under either version of cgroups, and of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quantport_cpu import memory
from quantport_cpu.memory import at_hand

KB = 1024
resource = pytest.importorskip("resource", reason="no limits of processes on Windows")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 1,000,000 kB free, and a process that has no limits."""
    monkeypatch.setattr(memory.resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    write(tmp_path / "proc" / "meminfo", "MemTotal: 2000000 kB\nMemAvailable: 1000000 kB\n")
    write(tmp_path / "proc" / "self" / "status", "Name:\tx\nVmSize:\t  300 kB\nVmData:\t  100 kB\n")
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def found(machine: Path) -> int | None:
    return at_hand(machine / "proc", machine / "cgroup")


def test_the_system(machine: Path) -> None:
    assert found(machine) == 1_000_000 * KB
    (machine / "proc" / "meminfo").unlink()
    assert (found(machine) or 0) > 0


def two(folder: Path, limit: str, used: int, inactive: int = 0, active: int = 0, high: str = "max") -> None:
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.high", f"{high}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 7\ninactive_file {inactive}\nactive_file {active}\n")


def test_cgroups_of_version_2(machine: Path) -> None:
    write(machine / "proc" / "self" / "cgroup", "0::/a/b\n")
    two(machine / "cgroup" / "a" / "b", "max", 10)
    assert found(machine) == 1_000_000 * KB
    two(machine / "cgroup" / "a" / "b", "5000", 4000, 300)
    assert found(machine) == 1300
    two(machine / "cgroup" / "a", "4500", 4400)  # a group above has less
    assert found(machine) == 100
    two(machine / "cgroup" / "a", "4000", 4400)
    assert found(machine) == 0


def test_pages_of_files_that_were_read_twice_are_at_hand(machine: Path) -> None:
    """As those of a checkpoint that was downloaded, checked and is loaded now."""
    write(machine / "proc" / "self" / "cgroup", "0::/a\n")
    two(machine / "cgroup" / "a", "5000", 4900, inactive=300, active=4000)
    assert found(machine) == 4400
    two(machine / "cgroup" / "a", "5000", 100, inactive=300, active=4000)  # the numbers are not of one moment
    assert found(machine) == 5000


def test_a_limit_that_only_slows_down_counts(machine: Path) -> None:
    write(machine / "proc" / "self" / "cgroup", "0::/a\n")
    two(machine / "cgroup" / "a", "max", 1000, high="3000")
    assert found(machine) == 2000
    two(machine / "cgroup" / "a", "2500", 1000, high="3000")
    assert found(machine) == 1500


def test_cgroups_of_version_1(machine: Path) -> None:
    write(machine / "proc" / "self" / "cgroup", "3:cpu,cpuacct:/x\n9:memory:/x\n0::/\n")
    group = machine / "cgroup" / "memory" / "x"
    write(group / "memory.limit_in_bytes", "9000\n")
    write(group / "memory.usage_in_bytes", "8000\n")
    write(group / "memory.stat", "total_inactive_file 500\ntotal_active_file 40\n")
    assert found(machine) == 1540


@pytest.mark.parametrize("path", ["/", "/../..", "/docker/1234"])
def test_a_container_sees_its_group_as_the_root(machine: Path, path: str) -> None:
    write(machine / "proc" / "self" / "cgroup", f"0::{path}\n")
    two(machine / "cgroup", "5000", 4000)
    assert found(machine) == 1000


@pytest.mark.parametrize(("limit", "used"), [("RLIMIT_AS", 300), ("RLIMIT_DATA", 100)])
def test_limits_of_the_process(machine: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: int) -> None:
    own = {getattr(resource, limit): (1000 * KB, 2000 * KB)}
    monkeypatch.setattr(
        memory.resource, "getrlimit", lambda which: own.get(which, (resource.RLIM_INFINITY,) * 2)
    )
    assert found(machine) == (1000 - used) * KB


LIMITED = """
import resource, sys
sys.path[:0] = sys.argv[1:]
from quantport_cpu.memory import at_hand
before = at_hand()
resource.setrlimit(resource.RLIMIT_AS, (1 << 36, resource.getrlimit(resource.RLIMIT_AS)[1]))
resource.setrlimit(resource.RLIMIT_DATA, (1 << 28, resource.getrlimit(resource.RLIMIT_DATA)[1]))
after = at_hand()
assert 0 <= after <= 1 << 28, after
assert before is None or after <= before
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not count these")
def test_a_limit_that_is_set_meanwhile_is_seen() -> None:
    subprocess.run([sys.executable, "-c", LIMITED, *sys.path], check=True, timeout=120)
