"""Checks of evidence: what a claim rests on exists, and says what is claimed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterator
from dataclasses import fields
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantport.kernels.base import Kernel
from quantport.kernels.verdict import Claim, Evidence, MachineCode, Measurement

Proof = Measurement | MachineCode
_NEEDED: dict[Evidence, type[Proof]] = {Evidence.MEASURED: Measurement, Evidence.COMPILED: MachineCode}


@lru_cache(maxsize=4096)
def claim_findings(claim: Claim, kernel: Kernel, scheme: str, arch: str) -> tuple[str, ...]:
    """What is wrong with a claim: it has no source, or its proof is incomplete, is not where it says, or says
    something else.
    """
    if not claim.source.strip():
        return ("the claim has no source",)
    needed = _NEEDED.get(claim.evidence)
    if needed is None:
        return ()
    if claim.proof is None or not isinstance(claim.proof, needed):
        return (f"a {claim.evidence} claim needs a {needed.__name__} as its proof, not {claim.proof!r}",)
    if empty := [f.name for f in fields(claim.proof) if not str(getattr(claim.proof, f.name)).strip()]:
        return (f"the proof of a {claim.evidence} claim names no {', '.join(empty)}",)
    path = _found(claim.proof.file, kernel)
    if path is None:
        return (
            f"a {claim.evidence} claim names {claim.proof.file}, which is neither in an installed "
            "package nor in the sources",
        )
    return _other(claim.proof, _lines(path), kernel.name, scheme, arch)


def _other(
    proof: Proof, passages: Collection[Collection[str]], kernel: str, scheme: str, arch: str
) -> tuple[str, ...]:
    """What a file does not say."""
    apart = (proof.device, proof.date, proof.commit) if isinstance(proof, Measurement) else (proof.version,)
    together = (kernel, scheme) if isinstance(proof, Measurement) else (arch, proof.instruction)
    findings = [
        f"{proof.file} does not say {word!r}"
        for word in apart
        if not any(word in words for words in passages)
    ]
    if (
        isinstance(proof, Measurement)
        and arch not in proof.file
        and not any(arch in words for words in passages)
    ):
        findings.append(f"{proof.file} is not about {arch!r}")
    if not any(all(word in words for word in together) for words in passages):
        findings.append(f"{proof.file} says nothing of {together[0]!r} with {together[1]!r}")
    return tuple(findings)


def _found(file: str, kernel: Kernel) -> Path | None:
    """A file of an installed package, or of the sources that the kernel is in."""
    package, _, inner = file.partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    places = [Path(folder) / inner for folder in (spec.submodule_search_locations or ())] if spec else []
    places += [folder / file for folder in Path(inspect.getfile(type(kernel))).resolve().parents]
    return next((place for place in places if place.is_file()), None)


@lru_cache(maxsize=16)
def _lines(path: Path) -> frozenset[frozenset[str]]:
    """What a file says together: the names on the way to each value of JSON with the value, or the cells of a
    line of text.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return frozenset(frozenset(words) for words in _branches(json.loads(text), ()))
    lines = (
        line.replace("`", "").replace(",", "|").replace(";", "|").split("|") for line in text.splitlines()
    )
    return frozenset(frozenset(cell.strip() for cell in cells) for cells in lines)


def _branches(value: Any, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _branches(inner, (*names, str(name)))
    elif isinstance(value, list):
        for inner in value:
            yield from _branches(inner, names)
    else:
        yield (*names, str(value))
