"""The quantizer: Diffusers builds the model and loads what stays; quantport loads what is quantized."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer

import quantport
from quantport.engine import METHOD, CheckpointError, DeviceError, PartialLoad, SaveError, parse_size
from quantport_diffusers.config import QuantportConfig

logger = logging.getLogger("quantport_diffusers")
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
# further arguments of save_pretrained, and the value that a quantized model is written with
_ONLY: Mapping[str, Any] = {
    "save_function": None,
    "safe_serialization": True,
    "variant": None,
    "push_to_hub": False,
    "use_flashpack": False,
}


class QuantportQuantizer(DiffusersQuantizer):  # type: ignore[misc]  # diffusers is not typed here
    """Stands in ``from_pretrained`` for one model; the order of the calls is that of Diffusers 0.42.

    Args:
        quantization_config: What was asked for.
        options: Of Diffusers.
    """

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: QuantportConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._device, self._dtype = torch.device("cpu"), torch.float32
        self._files: Sequence[str] = ()
        self._keys: list[str] = []
        self._load: PartialLoad | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **options: Any) -> None:
        """Takes the device, and the dtype of what stays: without one Diffusers makes it FP32."""
        self._device = _one_device(device_map)
        if "torch_dtype" in options:
            self._dtype = options["torch_dtype"] or torch.float32

    def maybe_update_loaded_keys(
        self, loaded_keys: Sequence[str], checkpoint_files: Sequence[str]
    ) -> list[str]:
        """Takes note of the files. From the list that it returns the weights that are quantized are taken off
        once the model is there, so that nobody misses them.
        """
        self._files, self._keys = checkpoint_files, list(loaded_keys)
        return self._keys

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        def rename(names: Iterable[str]) -> dict[str, str]:
            """Blocks of attention that older versions named otherwise, as Diffusers itself renames them."""
            by_name = {name: name for name in names}
            model._fix_state_dict_keys_on_load(by_name)
            return {stored: name for name, stored in by_name.items()}

        config = self.quantization_config.config
        self._load = load = PartialLoad(
            _one_path(self._files), model, rename, config, self._dtype, self._device
        )
        own = tuple(f"{path}." for path in load.modules)
        biases = {name for name, _ in model.named_parameters() if name.startswith(own)}
        self._keys[:] = [key for key in self._keys if key in biases or not key.startswith(own)]

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Leaves out what is decoded here."""
        assert self._load is not None  # it was made before
        return [key for key in missing_keys if key not in self._load.decoded]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        load, self._load = self._load, None
        assert load is not None  # it was made before
        logger.info("%s", load.fill())

    @property
    def is_serializable(self) -> bool:
        """``save_pretrained`` writes what this reads."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on quantized layers."""
        return True

    def save_pretrained(
        self,
        model: Any,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        max_shard_size: int | str = "10GB",
        **options: Any,
    ) -> None:
        """What ``model.save_pretrained`` does, in quantport's own format: Diffusers reads no other that holds
        these weights. Arguments as there.

        Raises:
            SaveError: an argument that has no meaning for a quantized model; or as ``quantport.save``.
        """
        for name, value in options.items():
            if name not in _ONLY or value != _ONLY[name]:
                raise SaveError(
                    "save_pretrained of a quantized model", f"{name}={value!r}", f"without {name}"
                )
        if is_main_process:
            limit = parse_size(max_shard_size, "max_shard_size")
            quantport.save(model, save_directory, format=METHOD, max_shard_bytes=limit)


def _one_device(device_map: Any) -> torch.device:
    """The device of a model.

    Raises:
        DeviceError: there are several, or it is to be chosen later.
    """
    places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map or "cpu"}
    try:
        (place,) = {torch.device(place) for place in places}
    except (RuntimeError, ValueError):  # no device of torch, or not one
        raise DeviceError(
            f"load a quantized model with device_map={device_map!r}",
            "a component of a pipeline is quantized for one device",
            "device_map='cuda:0', or none, and pipe.to('cuda') or pipe.enable_model_cpu_offload()",
        ) from None
    return place


def _one_path(files: Sequence[str]) -> Path:
    """The directory of a component, or its file.

    Raises:
        CheckpointError: no index names these files.
    """
    first = Path(files[0])
    if len(files) == 1:
        return first
    if (first.parent / _INDEX).is_file():
        return first.parent
    found = f"{len(files)} files, and no {_INDEX}"
    raise CheckpointError(f"load {first.parent}", found, "the checkpoint without variant=, or as one file")
