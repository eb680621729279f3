"""Which checks of the suite run over the simulated driver: those of arithmetic, packing and refusals, of the room's own kernels.

The others look at modules, checkpoints and compilation, which are the same on every device, and take minutes here.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
CHECKS = ("architectures", "detection", "kernels", "accepted_runs", "special_weights", "refused_fails", "packing", "grouped")
OWN = ("architectures", "detection", "kernels")


def _wanted(item) -> bool:
    if HERE not in item.path.parents:
        return True  # other rooms' tests are theirs
    check = item.originalname.removeprefix("test_")
    return item.cls is None or (check in CHECKS and (check in OWN or "[npu." in item.name))


def pytest_collection_modifyitems(config, items):
    dropped = [item for item in items if not _wanted(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if _wanted(item)]
