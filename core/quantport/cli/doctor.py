"""``quantport doctor``: what is installed, what was found, what was set aside and why, and what is
missing.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from quantport.cli.page import Column, Grid, Page
from quantport.cli.show import device_dict
from quantport.errors import QuantportError
from quantport.kernels.base import Request, WeightSpec, guarded_verdict
from quantport.kernels.verdict import ReasonCode, Rejected
from quantport.plugins.registry import Problem, Registry, default_registry

NOT_TOLD = {"bench", "dev"}  # extras that nobody needs to run a model


def packages() -> tuple[str, ...]:
    """What a bug report needs to name: quantport and all that it asks for, extras included. Read from the
    installed metadata, so that nothing is imported and no device has to be named here."""
    asked = [
        r
        for r in requires("quantport") or ()
        if not any(f"extra == '{extra}'" in r.replace('"', "'") for extra in NOT_TOLD)
    ]
    names = (re.split(r"[^A-Za-z0-9._-]", r)[0] for r in asked)
    return tuple(dict.fromkeys(("quantport", *names, "tokenizers")))


@dataclass(frozen=True)
class Findings:
    """What the doctor found; ``problems`` make the exit code 1, ``advice`` does not."""

    registry: Registry
    versions: dict[str, str | None]
    advice: dict[str, list[str]]
    auto: str
    problems: list[Problem]


def examine() -> Findings:
    """Asks every backend for its devices, kernels and advice, and the installation for its versions."""
    found = default_registry()
    _ = found.devices, [found.kernels(kind) for kind in found.backends]  # both record their problems
    problems: list[Problem] = []
    advice: dict[str, list[str]] = {}
    for kind in found.backends:
        try:
            advice[kind] = list(found.advice(kind))
        except Exception as error:  # a stranger's code: named, never fatal
            problems.append(Problem(kind, "advice", f"{type(error).__name__}: {error}"))
    problems += _verdict_problems(found)
    try:
        auto = str(found.device("auto"))
    except QuantportError as error:
        auto = ""
        problems.append(
            Problem("device auto", "QUANTPORT_DEVICE", f"{error.asked}: {error.found}; {error.suggestion}")
        )
    versions = {"python": platform.python_version(), **{name: _version(name) for name in packages()}}
    if not versions["transformers"]:
        advice["transformers"] = [
            "not installed: load and run need it for checkpoints: pip install 'quantport[transformers]'"
        ]
    return Findings(found, versions, advice, auto, [*found.problems, *problems])


def _verdict_problems(registry: Registry) -> list[Problem]:
    """Kernels that raise, or answer nonsense, when they are asked about the schemes on the devices here."""
    specs = [WeightSpec(scheme, 4096, 4096) for scheme in registry.schemes.values()]
    problems: dict[str, Problem] = {}
    for device in registry.devices:
        requests = [Request(spec, "linear", device, device.arch.compute) for spec in specs]
        for kernel in registry.kernels(device.kind):
            for request in requests:
                verdict = guarded_verdict(kernel, request)
                if isinstance(verdict, Rejected) and verdict.reasons[0].code is ReasonCode.RAISED:
                    problems.setdefault(kernel.name, Problem(kernel.name, "verdict", str(verdict.reasons[0])))
    return list(problems.values())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def doctor_page(found: Findings) -> Page:
    """The findings."""
    registry = found.registry
    data: dict[str, Any] = {
        "ok": not found.problems,
        "platform": platform.platform(),
        "versions": found.versions,
        "auto": found.auto,
        "backends": sorted(registry.backends),
        "schemes": list(registry.schemes),
        "devices": [device_dict(d) for d in registry.devices],
        "problems": [vars(p) for p in found.problems],
        "advice": {kind: lines for kind, lines in found.advice.items() if lines},
    }
    page = Page(data, title="quantport doctor")
    installed = [f"{name} {number or '(not installed)'}" for name, number in found.versions.items()]
    page.say(f"{', '.join(installed)}; {data['platform']}")
    rows = []
    for kind in sorted(registry.backends):
        here = ", ".join(str(d) for d in registry.devices if d.kind == kind)
        rows.append((kind, here or "none found", str(len(registry.kernels(kind)))))
    page.blocks.append(
        Grid((Column("backend"), Column("devices", prose=True), Column("kernels", right=True)), rows)
    )
    page.say("")
    page.say(f"--device auto is {found.auto}" if found.auto else "--device auto finds nothing")
    for kind, lines in data["advice"].items():
        for line in lines:
            page.say(f"advice: {kind}: {line}", "warn")
    for p in found.problems:
        page.say(f"problem: {p.plugin} at {p.stage}: {p.error}", "bad")
    if not found.problems:
        page.say("no problem found", "good")
    return page
