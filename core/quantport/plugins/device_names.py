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


class DeviceNames:
    """The names of every architecture and product that backends know, squeezed once.

    Args:
        backends: By kind.
    """

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = backends
        self._known: dict[str, list[tuple[str, str, Arch]]] = {}  # squeezed -> as spelled, kind, architecture
        for kind, backend in backends.items():
            for name, arch in (*backend.archs.items(), *backend.products.items()):
                self._known.setdefault(squeezed(name), []).append((name, kind, arch))

    def simulated(self, text: str, name: str, found: str, kind: str = "") -> Device:
        """The simulated device that a name stands for, of an architecture (``v2``) or a product
        (``Toy 2000``).

        Args:
            text: The device as the user wrote it, for errors.
            name: The name in it.
            found: What to say where no backend knows it.
            kind: Of the one backend to ask; by default all are.

        Raises:
            DeviceError: no backend knows it, or it stands for several architectures.
        """
        archs = {arch: owner for _, owner, arch in self._named(squeezed(name), kind)}
        asked = f"device {text[:80]!r}"
        if len(archs) > 1:
            several = ", ".join(sorted(map(str, archs)))
            raise DeviceError(asked, f"it stands for several architectures: {several}", "one of them")
        if not archs:
            raise DeviceError(asked, found, self._hint(name, kind))
        ((arch, owner),) = archs.items()
        return Device(arch, name=arch.title, torch_type=self._backends[owner].torch_type, simulated=True)

    def _named(self, key: str, kind: str) -> list[tuple[str, str, Arch]]:
        return [known for known in self._known.get(key, ()) if kind in ("", known[1])]

    def _hint(self, name: str, kind: str) -> str:
        """What to try instead of a name that is not known."""
        asked = [kind] if kind else list(self._backends)
        names = [key for key in self._known if self._named(key, kind)]
        close = difflib.get_close_matches(squeezed(name)[:80], names, n=1, cutoff=_CLOSE)
        spelled = self._named(close[0], kind)[0][0] if close else ""
        hint = f"did you mean {spelled!r}? " if close else did_you_mean(name[:80], asked)
        archs = [f"{one}:{arch}" for one in asked for arch in self._backends[one].archs]
        listed = archs if len(asked) == 1 else asked
        return f"{hint}known: {', '.join(listed) or 'none'}, and products by their full name"
