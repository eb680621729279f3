"""How Transformers splits a model over processes, and which of that the quantized layers take part in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from quantport.engine import PartialLoad, Ranks, Shards, UnsupportedError

# The styles of Transformers 5.23 for parameters, and the dimension of a matrix that each splits; None for
# those that leave it whole.
_DIMS = {
    "colwise": 0,
    "colwise_rep": 0,
    "colwise_gather_output": 0,
    "rowwise": 1,
    "rowwise_rep": 1,
    "rowwise_split_input": 1,
    "embedding_rowwise": 0,
    "embedding_colwise": 1,
    "mla_kv_a_proj": None,
    "replicate": None,
    "replicated_with_grad_allreduce": None,
}
# of an experts module and its parameters
_EXPERTS = {"": "moe_tp_experts", "gate_up_proj": "packed_colwise", "down_proj": "rowwise"}
_DATA = {"fsdp_size", "dp_replicate_size"}
_KINDS = ("tp_size", "fsdp_size", "dp_replicate_size", "pp_size", "ep_size")


class Parallel:
    """One rank's part of a model that Transformers splits over processes: by its ``tp_plan``, or by FSDP,
    which splits parameters and leaves quantized weights whole.

    Args:
        model: On meta, as Transformers has built it.
        asked: The ``DistributedConfig``.
        device: That of this rank.
    """

    def __init__(self, model: Any, asked: Any, device: str | torch.device) -> None:
        self._model, self._asked = model, asked
        self._ranks = Ranks.of_group(device)
        self._dims: dict[str, int] = {}
        self._others: dict[str, str] = {}  # path -> what splits its weights otherwise
        self._sizes: dict[str, tuple[int, int]] = {}

    @contextmanager
    def planning(self) -> Iterator[Shards]:
        """Yields what a `PartialLoad` is made with inside, on every rank or on none."""
        with self._ranks.together(f"load {self._model.name_or_path}"):
            if self._asked.tp_size > 1:
                self._read_plan()
            yield Shards(self._ranks, self._dims)

    def _read_plan(self) -> None:
        styles, _, _ = self._model._resolve_parallel_plans(self._asked)
        for path, module in self._model.named_modules():
            names = [name for name, _ in module.named_parameters(recurse=False)]
            own = {name: styles[full] for name in names if (full := f"{path}.{name}") in styles}
            if not own:
                continue
            if {"": styles.get(path), **own} == _EXPERTS:
                self._dims[path] = 0
            elif (style := own.get("weight")) not in _DIMS or own.keys() - {"weight", "bias"}:
                self._others[path] = ", ".join(f"{name}={style}" for name, style in own.items())
            elif (dim := _DIMS[style]) is not None:
                self._dims[path] = dim
            if isinstance(module, nn.Linear):
                self._sizes[path] = module.in_features, module.out_features

    def prepare(self, load: PartialLoad) -> None:
        """Makes the quantized modules ready for what Transformers hangs onto modules.

        Raises:
            UnsupportedError: names one whose weight it splits as quantized ones are not.
        """
        for path in (*load.modules, *load.decoded):
            found = f"the plan of the model: {self._others[path]}" if path in self._others else ""
            if path in load.decoded and path in self._dims:
                found = "its weight is stored as codes that no module holds, and is decoded to 16 bits"
            if found:
                asked = f"split {path} over {self._ranks.count} ranks"
                raise UnsupportedError(asked, found, f"one process, or ignore=[{path!r}]")
        for path in self._dims.keys() & load.modules.keys():
            module: Any = load.modules[path]
            module._hf_quantized_needs_local_tp = True
            if path in self._sizes:  # styles ask for those of the whole
                module.in_features, module.out_features = self._sizes[path]
            else:
                self._forget_rules(path)

    def _forget_rules(self, path: str) -> None:
        """Drops rules for parameters that experts have no longer, which Transformers would warn of."""
        said = self._asked.tp_plan if isinstance(self._asked.tp_plan, dict) else {}
        for name in filter(None, _EXPERTS):
            rule = replace_layer_number_by_wildcard(f"{path}.{name}")
            if rule not in said:
                self._model._tp_plan.pop(rule, None)


def parallel_of(model: Any, device: str | torch.device) -> Parallel | None:
    """How a model that is to be loaded is split; None for one process.

    Raises:
        UnsupportedError: by a kind of parallelism, or by two of them, that quantized layers take no part in.
    """
    asked = getattr(model.config, "distributed_config", None)
    if asked is None:
        return None
    sizes = {name: size for name in _KINDS if (size := getattr(asked, name, None) or 1) > 1}
    if sizes.keys() - {"tp_size"} and sizes.keys() - _DATA:
        said = ", ".join(f"{name}={size}" for name, size in sizes.items())
        found = "quantized layers are split by tp_size alone, and whole on each rank of fsdp_size"
        raise UnsupportedError(f"load shards with {said}", found, "one of these two, or one process")
    if sizes.keys() & _DATA:
        text = (
            "FSDP shards what stays in 16 bits; quantized weights, which are no parameters, it leaves whole"
        )
        warnings.warn(text, UserWarning, stacklevel=2)
    return Parallel(model, asked, device) if sizes else None
