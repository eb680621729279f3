"""The user's own measurements (``quantport bench --save``), which come before those that a room ships with.

One file for each architecture, in the format of ``quantport.kernels.tuned``. They hold for the device and the
number of threads that they were made with.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from quantport.device import Device
from quantport.errors import CheckpointError, SaveError


def cache_folder() -> Path:
    """Where quantport keeps what can be made again: ``QUANTPORT_CACHE_DIR``, or ``quantport`` in the user's
    cache.

    Raises:
        OSError: this user has no home.
    """
    configured = os.environ.get("QUANTPORT_CACHE_DIR")
    if configured:
        return Path(configured)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantport"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def own_path(device: Device) -> Path:
    """The file of the architecture of a device.

    Raises:
        OSError: there is no folder for it.
    """
    return cache_folder().absolute() / "tuned" / f"{device.kind}-{device.arch.name}.json"


def own_table(device: Device) -> tuple[str, Mapping[str, Any]]:
    """``(file, table)``; an empty table of a device, or with a number of threads, that was not measured."""
    if device.simulated:
        return "", {}
    try:
        path = own_path(device)
    except OSError:
        return "", {}
    table = _read(path)
    run = table.get("run", {})
    holds = (run.get("device"), run.get("threads")) == (device.name, torch.get_num_threads())
    return str(path), table if holds else {}


@cache
def _read(path: Path) -> Mapping[str, Any]:
    """A file, or nothing, with one warning, where it is not what `save_own` writes."""
    from quantport.checkpoint.json import read_json  # kernels of a simulated device need no checkpoint

    try:
        table = read_json(path)
        if table:
            _check(table)
    except (CheckpointError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        found = error.found if isinstance(error, CheckpointError) else f"no table of speeds ({error!r})"
        warnings.warn(f"own measurements ignored: {path}: {found}", UserWarning, stacklevel=2)
        return {}
    return table


def _check(table: Mapping[str, Any]) -> None:
    """Raises where a table is not in the format."""
    run = table["run"]
    if not all(isinstance(run[name], str) for name in ("device", "date", "version")):
        raise ValueError("device, date or version of the run")
    if type(run["threads"]) is not int:
        raise ValueError("threads of the run")
    n, k = table["shape"]
    if not (type(n) is type(k) is int and min(n, k) > 0):
        raise ValueError("shape")
    for schemes in table["kernels"].values():
        for row in schemes.values():
            speeds = {int(tokens): speed for tokens, speed in row["speeds"].items()}
            if not all(0 <= float(x) < math.inf for x in (row["error"], *speeds.values())) or min(speeds) < 1:
                raise ValueError("an error, a speed or a number of tokens")


def save_own(device: Device, table: Mapping[str, Any]) -> Path:
    """Adds measurements to those that were made of the same device in the same way; others are replaced.

    Args:
        device: What was measured.
        table: In the format of ``quantport.kernels.tuned``; its run has device, date, version and threads.

    Returns:
        The file, which is written whole or not at all.

    Raises:
        SaveError: it cannot be written.
    """
    try:
        path = own_path(device)
        _read.cache_clear()
        before = _read(path)
        kernels = {name: dict(rows) for name, rows in before.get("kernels", {}).items()}
        kernels = kernels if before and _way(before) == _way(table) else {}
        for name, rows in table["kernels"].items():
            kernels.setdefault(name, {}).update(rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({**table, "kernels": kernels}, file, indent=1)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise SaveError(
            "save measurements", str(error), "QUANTPORT_CACHE_DIR with a folder that you may write"
        ) from error
    finally:
        _read.cache_clear()
    return path


def _way(table: Mapping[str, Any]) -> dict[str, Any]:
    """How a table was measured: all of it but the numbers and the date."""
    run = {name: value for name, value in table["run"].items() if name != "date"}
    return {**table, "run": run, "kernels": None}
