"""Where the parts of a model go: what a ``device_map`` says, for quantized modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.accelerate import get_device

from quantport.engine import DeviceError, QuantModule

_CPU = torch.device("cpu")


class Placement:
    """A ``device_map`` as Transformers hands it on.

    Args:
        device_map: None for the CPU, a device, a mapping of module paths, or a strategy (``"auto"``), which
            becomes a mapping once the sizes of the modules are known.

    Attributes:
        undecided: Whether it is a strategy still.
        spread: Whether several devices share the model.
        device: The one that computes: an accelerator if there is one.

    Raises:
        DeviceError: a part is to stay on disk.
    """

    def __init__(self, device_map: Any) -> None:
        self.undecided = isinstance(device_map, str)
        whole = device_map if isinstance(device_map, torch.device) else "cpu"
        self._map = dict(device_map) if isinstance(device_map, Mapping) else {"": whole}
        on_disk = [path for path, device in self._map.items() if str(device) == "disk"]
        if on_disk:
            raise DeviceError(
                f"a device_map with {len(on_disk)} modules on disk ({on_disk[0] or 'the whole model'}, ...)",
                "what is quantized while it loads is in no file to be read again",
                "a scheme of fewer bits, or 'cpu' for these modules",
            )
        devices = [torch.device(device) for device in self._map.values()]
        main = next((device for device in devices if device.type != "cpu"), _CPU)
        self.device: str | torch.device = "auto" if self.undecided else main
        self.spread = self.undecided or len(set(devices)) > 1

    def agree_with(self, planned: torch.device) -> None:
        """Checks that a strategy came to the kind of device that was planned for.

        Raises:
            DeviceError: no part of the model is there.
        """
        if torch.device(self.device).type != planned.type:
            found = f"no part of the model fits the memory of {planned}"
            raise DeviceError(f"place the model on {planned}", found, "device_map='cpu', or fewer bits")

    def device_of(self, path: str) -> torch.device:
        """The device that computes the module at a path: accelerate computes on no CPU where there is an
        accelerator.
        """
        device = torch.device(get_device(self._map, path))
        return torch.device(self.device) if device.type == "cpu" else device

    def refuse_waiting(self, decoded: Iterable[str]) -> None:
        """Refuses 16-bit modules that would wait on the CPU and are not loaded by Transformers: accelerate
        knows nothing of their weights.

        Raises:
            DeviceError: names one.
        """
        waiting = [path for path in decoded if self._waits(path)]
        if waiting:
            raise DeviceError(
                f"a device_map with {waiting[0]} on the CPU beside an accelerator",
                "its weights are stored as codes that no module holds, and are decoded to 16 bits",
                "an accelerator for it, or the CPU for everything",
            )

    def offload(self, path: str, module: QuantModule) -> None:
        """Keeps a module that is mapped to the CPU beside an accelerator there between its calls."""
        if self._waits(path):
            keep_on_cpu(module, self.device_of(path))

    def _waits(self, path: str) -> bool:
        return torch.device(get_device(self._map, path)) != self.device_of(path)


def keep_on_cpu(module: QuantModule, device: torch.device) -> None:
    """Holds the packed weights of a module on the CPU, and fetches them for each call. (accelerate leaves
    buffers that are in no state dict where they are.)
    """
    held = {key: tensor.to(_CPU) for key, tensor in _packed(module).items()}

    def fetch(called: nn.Module, _: Any) -> None:
        called._buffers.update({key: tensor.to(device) for key, tensor in held.items()})

    def drop(called: nn.Module, *_: Any) -> None:
        called._buffers.update(held)

    module._buffers.update(held)
    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(drop, always_call=True)


def _packed(module: QuantModule) -> dict[str, Tensor]:
    return {key: t for key, t in module._buffers.items() if t is not None and key.startswith("packed_")}
