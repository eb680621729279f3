"""``quantize_checkpoint``: from a checkpoint to a quantized one, without the model in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantport.checkpoint import Checkpoint, unchanged
from quantport.errors import CheckpointError
from quantport.loading.build_context import collecting_later
from quantport.loading.executor import Progress, Task, run_tasks
from quantport.loading.load_model import Prepared, fits, prepared, tie_weights
from quantport.loading.locate import Source
from quantport.loading.plan_model import refuse_quantized, warn
from quantport.loading.renamed import renamed
from quantport.loading.save_model import SHARD, Saved, layout_of, modules_to_save, tensors_of, write_model
from quantport.loading.settle_ties import tie_again
from quantport.modules import QuantModule
from quantport.planning.memory import BUDGET
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
    **options: Any,
) -> Plan:
    """Writes what ``save(load(...))`` writes, byte for byte, a few modules at a time: neither the 16-bit nor
    the quantized model is ever in memory.

    Where it was killed, the same call goes on after the last whole shard, on the same machine. Nothing is
    quantized before it is sure that the disk has room for it.

    Args:
        path_or_id: As for ``load``; not quantized yet.
        directory: As for ``save``.
        scheme: As for ``load``.
        num_tokens: As for ``load``.
        progress: As for ``load``.
        workers: As for ``load``.
        overwrite: As for ``save``.
        max_shard_bytes: As for ``save``.
        options: The other arguments of ``load``. What is written does not depend on ``device``.

    Returns:
        The plan that was carried out.

    Raises:
        QuantportError: as ``load`` and ``save``. Nothing is left behind.
    """
    with prepared(path_or_id, scheme, num_tokens=num_tokens, progress=progress, **options) as made:
        refuse_quantized(made.filler.checkpoint)
        with collecting_later():
            batches = _Batches(made, made.filler.tasks(), progress, workers)
        peak = batches.most + made.plan.budget
        fits(made.plan, f"quantize {made.plan.source} on {made.plan.device}", peak)
        warn(made.plan.warnings)
        made.model.quantport_plan = made.plan  # type: ignore[assignment]  # a note on the model, as of ``load``
        if made.cache:
            made.cache.install()
        write_model(
            made.model,
            directory,
            batches.tensors,
            batches.layout,
            overwrite=overwrite,
            max_shard_bytes=max_shard_bytes,
            resume=_resume(made),
        )
    decided = made.filler.with_warnings()
    warn(decided.warnings[len(made.plan.warnings) :])
    return decided


class _Batches:
    """Fills a model module by module, as many at a time as fit a window, and empties each when it is written.

    Attributes:
        layout: Shape and dtype of every tensor that is written.
        most: Most bytes of quantized and other tensors that are held at a time.
    """

    def __init__(
        self, made: Prepared, tasks: Sequence[Task], progress: Progress | None, workers: int | None
    ) -> None:
        self._made, self._progress, self._workers = made, progress, workers
        tie_weights(made.model)
        # what is tied is saved with the first module that has it, whatever it is stored under
        self._names_of = {group[0]: group for group in made.groups}
        first = {name: group[0] for group in made.groups for name in group}
        dtypes = {first.get(name, name): dtype for name, dtype in made.filler.held().items()}
        homes = {stored: first[name] for stored, name in made.filler.names.items() if name in first}
        self._tasks: dict[str, list[Task]] = {}
        modules = dict(made.model.named_modules())
        for task in tasks:
            stays = task.name in homes and not isinstance(modules.get(task.module), QuantModule)
            home = homes[task.name].rpartition(".")[0] if stays else task.module
            self._tasks.setdefault(home, []).append(task)
        # held, so that no tensor which comes later is taken for one of these
        self._modules = list(modules_to_save(made.model))
        self.layout = layout_of(self._modules, dtypes)
        self._refuse_incomplete(dtypes)
        sizes = [self._size(prefix, module, kept) for prefix, module, kept in self._modules]
        self.most = min(sum(sizes), max(BUDGET, *sizes))

    def tensors(self, missing: Set[str]) -> Iterator[tuple[str, Tensor]]:
        """Those that are missing, and others of the same modules; checks in the end that no file changed."""
        with unchanged(self._made.filler.source):
            yield from self._batches(missing)

    def _batches(self, missing: Set[str]) -> Iterator[tuple[str, Tensor]]:
        batch: list[Saved] = []
        size, done = 0, 0
        wanted = [some for some in self._modules if missing & self._names(*some)]
        total = sum(task.size for prefix, _, _ in wanted for task in self._tasks.get(prefix[:-1], ()))
        for some in [*wanted, None]:
            own = 0 if some is None else self._size(*some)
            if batch and (some is None or size + own > BUDGET):
                done += self._fill([prefix[:-1] for prefix, _, _ in batch], done, total)
                for prefix, module, kept in batch:
                    now = {name: getattr(module, name) for name in kept}
                    for name, tensor in tensors_of(prefix, module, now):
                        if name in missing:
                            yield name, tensor
                    del now
                    self._empty(prefix, module, kept)
                batch, size = [], 0
            if some is not None:
                batch.append(some)
                size += own

    def _fill(self, paths: Sequence[str], done: int, total: int) -> int:
        """Runs the tasks of some modules, and forgets them with what they hold; returns the bytes read."""
        tasks = [task for path in paths for task in self._tasks.pop(path, ())]
        run_tasks(tasks, self._after(done, total), self._workers, self._made.plan.budget)
        tie_again(self._made.model, self._made.groups)
        return sum(task.size for task in tasks)

    def _after(self, done: int, total: int) -> Progress | None:
        report = self._progress
        if report is None:
            return None
        return lambda some, _total, name: report(done + some, total, name)

    def _names(self, prefix: str, module: nn.Module, kept: Mapping[str, Tensor]) -> set[str]:
        stored = module.stored_layout() if isinstance(module, QuantModule) else ()
        return {prefix + name for name in (*kept, *(name for name, _, _ in stored))}

    def _size(self, prefix: str, module: nn.Module, kept: Mapping[str, Tensor]) -> int:
        specs = [self.layout[name] for name in self._names(prefix, module, kept)]
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs)

    def _empty(self, prefix: str, module: nn.Module, kept: dict[str, Tensor]) -> None:
        """Lets go of the weights and parameters of a module, and of those that are tied to them."""
        if isinstance(module, QuantModule):
            module.forget()
        for name in kept.keys() & module._parameters.keys():
            empty = nn.Parameter(torch.empty_like(kept[name], device="meta"), requires_grad=False)
            kept[name] = module._parameters[name] = empty
            for tied in self._names_of.get(prefix + name, ()):
                path, _, leaf = tied.rpartition(".")
                parameters = self._made.model.get_submodule(path)._parameters
                if parameters.get(leaf) is not None:
                    parameters[leaf] = empty

    def _refuse_incomplete(self, filled: Mapping[str, torch.dtype]) -> None:
        """Refuses parameters that nothing fills."""
        lost = [
            prefix + name
            for prefix, module, kept in self._modules
            for name, tensor in kept.items()
            if tensor.is_meta and prefix + name not in filled
        ]
        if lost:
            raise CheckpointError(
                f"quantize {self._made.plan.source}",
                f"the model needs {len(lost)} tensors that it does not hold: {', '.join(lost[:5])}",
                "the complete checkpoint, or the model class that it was saved from",
            )


def _resume(made: Prepared) -> str:
    """Everything that the written bytes depend on; empty for tensors that are not in files."""
    source = made.filler.checkpoint.source
    if not isinstance(source, Checkpoint):
        return ""
    files = [(Path(file).resolve(), os.stat(file)) for file in source.files]
    stamps = [[str(file), found.st_size, found.st_mtime_ns] for file, found in files]
    schemes = [[step.layer.name, step.requested_scheme] for step in made.plan.steps]
    settings = [
        import_module("quantport").__version__,
        made.plan.config.nonfinite,
        str(made.filler.dtypes.dtype),
    ]
    return json.dumps([settings, stamps, schemes])
