"""The quantizer: Transformers builds the model and loads what stays; quantport loads what is quantized."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.utils.logging import tqdm

from quantport.engine import (
    PartialLoad,
    Progress,
    QuantModule,
    TiedLinear,
    transformers_names,
)
from quantport_transformers.checkpoint_files import one_path
from quantport_transformers.config import QuantportConfig
from quantport_transformers.parallel import Parallel, parallel_of
from quantport_transformers.placement import Placement
from quantport_transformers.save import save_pretrained

# for one model while it is loaded, the names too that are loaded here
_IGNORED = "_keys_to_ignore_on_load_unexpected"

logger = logging.getLogger("quantport_transformers")


class QuantportQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is not typed here
    """Stands in ``from_pretrained`` for one model; the order of the calls is that of Transformers 5.23.

    Args:
        quantization_config: What was asked for.
        options: Of Transformers.
    """

    def __init__(self, quantization_config: QuantportConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._place = Placement(None)
        self._files: Sequence[str] | None = None
        self._parallel: Parallel | None = None
        self._load: PartialLoad | None = None
        self._ignored: Any = None

    def validate_environment(self, *args: Any, device_map: Any = None, **options: Any) -> None:
        """Takes the device map; of ``"auto"`` it is called again with what that has become."""
        self._place = Placement(device_map)
        if self._load is not None:
            self._place.agree_with(self._load.plan.device.torch_device)
            for module in self._load.modules.values():
                module.announce_size(0)

    def _process_model_before_weight_loading(
        self, model: Any, *, checkpoint_files: Sequence[str] | None = None, device_map: Any = None, **_: Any
    ) -> None:
        self._files, self._place = checkpoint_files, Placement(device_map)
        self._parallel = parallel_of(model, self._place.device)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Plans, and puts quantized modules where the plan says: here Transformers has found out under which
        names it loads the tensors of the checkpoint.
        """
        with self._parallel.planning() if self._parallel else nullcontext() as shards:
            self._load = load = PartialLoad(
                one_path(self._files),
                model,
                partial(transformers_names, model, transforms=weight_conversions),
                self.quantization_config.config,
                model.config.dtype,
                self._place.device,
                spread=self._place.spread,
                shards=shards,
            )
            self._place.refuse_waiting(load.decoded)
            if self._parallel:
                self._parallel.prepare(load)
        for module in self._filled(model):
            if not any(True for _ in module.parameters(recurse=False)):  # a bias may have to be drawn
                module._is_hf_initialized = True  # type: ignore[assignment]  # no tensor of it is
        if self._place.undecided:
            for path, size in load.sizes.items():
                load.modules[path].announce_size(size)
        prefix = f"{model.base_model_prefix}."
        paths = (re.escape(path.removeprefix(prefix)) for path in (*load.modules, *load.decoded))
        self._ignored = getattr(model, _IGNORED)
        setattr(model, _IGNORED, {*(self._ignored or ()), *(rf"(^|\.){path}\." for path in paths)})
        return weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        load = self._load
        assert load is not None  # Transformers has asked for the conversions before
        setattr(model, _IGNORED, self._ignored)
        with _bar() as progress:
            plan = load.fill(self._place.device_of, progress)
        for path, module in load.modules.items():
            self._place.offload(path, module)
        self._load = None
        logger.info("%s", plan)

    def _filled(self, model: nn.Module) -> Iterator[nn.Module]:
        """The modules whose weights are loaded here."""
        assert self._load is not None
        yield from (m for m in model.modules() if isinstance(m, QuantModule | TiedLinear))
        yield from map(model.get_submodule, self._load.decoded)

    @property
    def is_trainable(self) -> bool:
        """Adapters train on quantized layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        """``generate`` compiles with a static cache."""
        return True

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes what others load."""
        return True

    def save_pretrained(self, model: Any, *args: Any, **options: Any) -> None:
        """What ``model.save_pretrained`` does; arguments as there."""
        save_pretrained(model, *args, **options)


@contextmanager
def _bar() -> Iterator[Progress]:
    """The progress bar of Transformers, which it can be told not to show."""
    with tqdm(desc="Quantizing weights", unit="B", unit_scale=True) as bar:
        shown = 0

        def progress(done: int, total: int, name: str) -> None:
            nonlocal shown
            bar.total = total
            bar.update(done - shown)
            shown = done

        yield progress
