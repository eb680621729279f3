"""Memory that this process can still get: the least of what the system, its container and its limits have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]  # a module elsewhere

# By the version of cgroups: limits, use, and the parts of use that are given back under pressure: pages of
# files, read once or twice, as ``MemAvailable`` counts them. A group at ``memory.high`` is slowed down
# until it stands still.
_LIMITS = {
    2: (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


def at_hand(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a new allocation can get now without swapping; all memory where the system tells no more."""
    return min([*_of_system(proc), *_of_container(proc, cgroups), *_of_limits(proc)], default=None)


def _of_system(proc: Path) -> Iterator[int]:
    """``MemAvailable``, or what the machine has."""
    text = _read(proc / "meminfo")
    available = [int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable:")]
    if available:
        yield available[0] * 1024
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_container(proc: Path, cgroups: Path) -> Iterator[int]:
    """What the control groups that this process is in leave: its own, and each above.

    A container may see its own group as the root, whatever path the process has outside.
    """
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, cgroups / "memory") if controllers else (2, cgroups)
        group = root / path.lstrip("/")
        groups = [group, *group.parents] if root in group.parents and ".." not in group.parts else [root]
        for one in groups[: groups.index(root) + 1]:
            yield from _left(one, version)


def _left(group: Path, version: int) -> Iterator[int]:
    limits, use, reclaimable = _LIMITS[version]
    used = _read(group / use).strip()
    for most in (_read(group / limit).strip() for limit in limits):
        if most.isdigit() and used.isdigit():
            stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
            free = int(most) - int(used) + sum(int(stat.get(part, 0)) for part in reclaimable)
            yield min(max(0, free), int(most))


def _of_limits(proc: Path) -> Iterator[int]:
    """What ``ulimit -v`` and ``ulimit -d`` leave."""
    if resource is None:
        return
    status = dict(line.split(":", 1) for line in _read(proc / "self" / "status").splitlines() if ":" in line)
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY and used in status:
            yield max(0, most - int(status[used].split()[0]) * 1024)


def _read(path: Path) -> str:
    """The text of a file of the system; empty where it is not there, or is not for us."""
    try:
        return path.read_text()
    except OSError:
        return ""
