"""``quantize_checkpoint``: from a checkpoint to a quantized one, without the model in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantport.checkpoint import Checkpoint, CheckpointFormat, unchanged
from quantport.checkpoint.shard import Write
from quantport.errors import CheckpointError
from quantport.loading.build_context import collecting_later
from quantport.loading.destination import Put
from quantport.loading.executor import Progress, Task, run_tasks
from quantport.loading.load_model import fits, prepared, tie_weights
from quantport.loading.locate import Source
from quantport.loading.plan_model import warn
from quantport.loading.prepare import Prepared
from quantport.loading.renamed import renamed
from quantport.loading.save_model import (
    OWN,
    SHARD,
    described_model,
    format_of,
    layout_of,
    modules_to_save,
    write_model,
)
from quantport.modules import QuantModule
from quantport.numerics.by_rows import QuantizedRows
from quantport.planning.plan import Plan


@renamed("rows", "num_tokens")
def quantize_checkpoint(
    path_or_id: Source,
    directory: str | os.PathLike[str],
    scheme: str | None = None,
    *,
    num_tokens: int = 1,
    progress: Progress | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = SHARD,
    format: str = OWN,  # noqa: A002  # as every library calls it
    **options: Any,
) -> Plan:
    """Writes what ``save(load(...))`` writes, byte for byte, some rows of a few weights at a time: nothing
    large is ever in memory.

    Where it was killed, the same call goes on after the last whole shard, on the same machine. Nothing is
    quantized before it is sure that the disk has room for it.

    Args:
        path_or_id: As for ``load``.
        directory: As for ``save``.
        scheme: As for ``load``.
        num_tokens: As for ``load``.
        progress: As for ``load``.
        workers: As for ``load``.
        overwrite: As for ``save``.
        max_shard_bytes: As for ``save``.
        format: As for ``save``.
        options: The other arguments of ``load``. What is written does not depend on ``device``.

    Returns:
        The plan that was carried out; its warnings say why ``auto`` came to ``quantport``.

    Raises:
        QuantportError: as ``load`` and ``save``. Nothing is left behind.
    """
    with prepared(path_or_id, scheme, num_tokens=num_tokens, progress=progress, **options) as made:
        with collecting_later():
            stream = _Stream(made, progress, workers)
        fits(made.plan, f"quantize {made.plan.source} on {made.plan.device}", made.plan.budget)
        warn(made.plan.warnings)
        made.model.quantport_plan = made.plan  # type: ignore[assignment]  # a note on the model, as of ``load``
        if made.cache:
            made.cache.install()
        described = described_model(made.model)
        to, reason = format_of(described, format, directory, options.get("registry"))
        write_model(
            made.model,
            described,
            directory,
            stream.fill,
            stream.layout,
            to=to,
            registry=options.get("registry"),
            overwrite=overwrite,
            max_shard_bytes=max_shard_bytes,
            resume=_resume(made, to),
        )
    decided = made.filler.with_warnings()
    warn(decided.warnings[len(made.plan.warnings) :])
    return replace(decided, warnings=(*decided.warnings, reason)) if reason else decided


class _Stream:
    """Quantizes a checkpoint into files that are written meanwhile: a `Destination` that keeps nothing.

    Attributes:
        layout: Shape and dtype of every tensor that is written.
    """

    def __init__(self, made: Prepared, progress: Progress | None, workers: int | None) -> None:
        self._made, self._progress, self._workers = made, progress, workers
        tasks = made.filler.tasks(self)
        tie_weights(made.model)
        # what is tied is saved with the first module that has it, whatever it is stored under
        self._first = {name: group[0] for group in made.groups for name in group}
        self._filled = {self._first.get(name, name): dtype for name, dtype in made.filler.held().items()}
        self._tasks: dict[str, list[Task]] = {}
        modules = dict(made.model.named_modules())
        for task in tasks:
            home, name = task.module, made.filler.names[task.name]
            if name in self._first and not isinstance(modules.get(home), QuantModule):
                home = self._first[name].rpartition(".")[0]
            self._tasks.setdefault(home, []).append(task)
        self._modules = list(modules_to_save(made.model))
        self.layout = layout_of(self._modules, self._filled)
        self._refuse_incomplete()

    def fill(self, missing: Set[str], write: Write) -> None:
        """Writes what is missing, module by module; checks in the end that no file changed."""
        self._missing, self._write = missing, write
        tasks: list[Task] = []
        for prefix, module, kept in self._modules:
            if not missing.isdisjoint(self._names(prefix, module, kept)):
                tasks += self._tasks.get(prefix[:-1], ())
        with unchanged(self._made.filler.source):
            for prefix, _, kept in self._modules:
                for name, tensor in kept.items():
                    if prefix + name not in self._filled:
                        self._put(prefix + name, tensor.detach())
            run_tasks(tasks, self._progress, self._workers, self._made.plan.budget)

    def weight(self, path: str, module: QuantModule, name: str, steps: Iterator[QuantizedRows]) -> None:
        """Writes the rows of a weight as they are quantized."""
        for key, tensor in module.stored_names(name, steps):
            self._put(f"{path}.{key}", tensor)

    @contextmanager
    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Put]:
        """Writes what is put."""
        saved = self._first.get(name, name)
        yield lambda values: self._put(saved, values.to(dtype))

    def _put(self, name: str, tensor: Tensor) -> None:
        if name in self._missing:
            self._write(name, tensor)

    def _names(self, prefix: str, module: nn.Module, kept: Mapping[str, Tensor]) -> set[str]:
        stored = module.stored_layout() if isinstance(module, QuantModule) else ()
        return {prefix + name for name in (*kept, *(name for name, _, _ in stored))}

    def _refuse_incomplete(self) -> None:
        """Refuses parameters that nothing fills."""
        lost = [
            prefix + name
            for prefix, module, kept in self._modules
            for name, tensor in kept.items()
            if tensor.is_meta and prefix + name not in self._filled
        ]
        if lost:
            raise CheckpointError(
                f"quantize {self._made.plan.source}",
                f"the model needs {len(lost)} tensors that it does not hold: {', '.join(lost[:5])}",
                "the complete checkpoint, or the model class that it was saved from",
            )


def _resume(made: Prepared, to: CheckpointFormat) -> str:
    """Everything that the written bytes depend on; empty for tensors that are not in files."""
    source = made.filler.checkpoint.source
    if not isinstance(source, Checkpoint):
        return ""
    files = [(Path(file).resolve(), os.stat(file)) for file in source.files]
    # times of an archive or of an image may be those of another file; when it came here is not
    stamps = [
        [str(file), found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns]
        for file, found in files
    ]
    schemes = [[step.layer.name, step.requested_scheme] for step in made.plan.steps]
    settings = [
        import_module("quantport").__version__,
        to.name,
        made.plan.config.nonfinite,
        str(made.filler.dtypes.dtype),
    ]
    return json.dumps([settings, stamps, schemes])
