"""Devices by the name of a product or of an architecture, as backends know them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from quantport.device import Arch, Device
from quantport.errors import DeviceError, did_you_mean
from quantport.plugins.hookspecs import Backend

_MEMORY = re.compile(r"(?<![a-z0-9])[0-9]+[ _-]?gi?b(?![a-z0-9])")
_SEPARATORS = re.compile(r"[^a-z0-9]")
_CLOSE = 0.7  # names of products are alike, so that what is less close is another product


def squeezed(name: str) -> str:
    """What counts of a name: letters in lower case and digits, without a size of memory (``X100-80GB``)."""
    return _SEPARATORS.sub("", _MEMORY.sub("", name.lower()))


def simulated(text: str, name: str, backends: Mapping[str, Backend], found: str) -> Device:
    """The simulated device that a name stands for, of an architecture (``v2``) or a product (``Toy 2000``).

    Args:
        text: The device as the user wrote it, for errors.
        name: The name in it.
        backends: Those that may know it, by kind.
        found: What to say where none of them does.

    Raises:
        DeviceError: none of them knows it, or it stands for several architectures.
    """
    named: dict[str, dict[Arch, str]] = {}  # squeezed -> architectures, each with the type of its tensors
    spelled: dict[str, str] = {}
    for backend in backends.values():
        for known, arch in (*backend.archs.items(), *backend.products.items()):
            named.setdefault(squeezed(known), {})[arch] = backend.torch_type
            spelled.setdefault(squeezed(known), known)
    archs = named.get(squeezed(name), {})
    asked = f"device {text[:80]!r}"
    if len(archs) > 1:
        several = ", ".join(sorted(map(str, archs)))
        raise DeviceError(asked, f"it stands for several architectures: {several}", "one of them")
    if not archs:
        close = difflib.get_close_matches(squeezed(name)[:80], list(spelled), n=1, cutoff=_CLOSE)
        hint = f"did you mean {spelled[close[0]]!r}? " if close else did_you_mean(name[:80], backends)
        kinds = [f"{kind}:{arch}" for kind, backend in backends.items() for arch in backend.archs]
        listed = ", ".join(kinds if len(backends) == 1 else backends) or "none"
        raise DeviceError(asked, found, f"{hint}known: {listed}, and products by their full name")
    ((arch, torch_type),) = archs.items()
    return Device(arch, name=arch.title, torch_type=torch_type, simulated=True)
