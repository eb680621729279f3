"""What every quantized module shares: packed weights, one bound kernel, and a canonical state dict.

Kernels may pack weights as they like; what is saved, copied, pickled and moved is always the stored layout of
the scheme (``Scheme.layout``), so a state dict does not depend on the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantport.errors import UnsupportedError, WeightError
from quantport.kernels import aten
from quantport.kernels.base import Kernel, Packed, Request, StoredWeight, WeightSpec
from quantport.kernels.packing import check_stored, pack_steps, unpack_steps
from quantport.kernels.wrapped import kernel_for
from quantport.modules import handles
from quantport.modules.handles import BoundWeight
from quantport.modules.stock_save import refuse_stock_save
from quantport.modules.weight_view import EmptyParameter
from quantport.numerics.by_rows import QuantizedRows
from quantport.numerics.sharding import shard_dims
from quantport.planning.select_kernel import select_kernel
from quantport.plugins.registry import Registry, default_registry

EMPTY_WEIGHT = "empty_weight"


class EmptyWeight(nn.Module):
    """A module whose weight is no parameter. For code that asks ``next(module.parameters())`` it has an empty
    one, which says dtype of the activations and device; it is in no state dict.
    """

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of ``nn.Module``; without ``recurse`` only what is stored, which is what accelerate offloads."""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if recurse or not name.endswith(EMPTY_WEIGHT):
                yield name, parameter

    def _set_empty_weight(self, dtype: torch.dtype, device: torch.device) -> None:
        known = self._parameters.get(EMPTY_WEIGHT)
        if type(known) is not EmptyParameter or known.device != device:
            empty = torch.empty(0, dtype=dtype, device=device)
            self._parameters[EMPTY_WEIGHT] = EmptyParameter(empty, requires_grad=False)

    def announce_size(self, nbytes: int) -> None:
        """Lets an empty module look as large as it will be, to code that places modules by the size of their
        parameters; 0 takes that back.
        """
        self._parameters.pop(EMPTY_WEIGHT, None)
        if nbytes:
            size = torch.empty(nbytes, dtype=torch.uint8, device="meta")
            self._parameters[EMPTY_WEIGHT] = nn.Parameter(size, requires_grad=False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + EMPTY_WEIGHT, None)


class QuantModule(EmptyWeight):
    """Holds named weights: ``""`` for a linear layer, ``"3.gate_proj"`` for a projection of an expert.

    Args:
        kernel: The kernel that runs every weight of the module, but for ``others``.
        specs: Weight name -> scheme and shape.
        layer: ``linear`` or ``moe``, for choosing a kernel again when the module moves to another device.
        dtype: Activation dtype that the kernel was chosen for.
        others: Weight name -> kernel, for the weights that another one runs.
        registry: Where kernels come from when the module moves; by default that of the process, which is also
            where a pickled module finds its kernels again.
    """

    registry: Registry
    specs: dict[str, WeightSpec]
    layer: str
    dtype: torch.dtype
    kernel: Kernel
    others: dict[str, Kernel]
    bound: dict[str, BoundWeight]
    _packed: dict[str, Packed]
    _buffer_names: dict[str, tuple[str, ...]]

    def __init__(
        self,
        kernel: Kernel,
        specs: dict[str, WeightSpec],
        layer: str,
        dtype: torch.dtype = torch.bfloat16,
        others: Mapping[str, Kernel] | None = None,
        registry: Registry | None = None,
    ) -> None:
        # not super(): a QuantLinear is an nn.Linear too, which would make a 16-bit weight
        nn.Module.__init__(self)
        refuse_stock_save(QuantModule)
        # past ``Module.__setattr__``, which looks for parameters: a model has thousands of these
        self.__dict__.update(
            registry=registry or default_registry(),
            specs=specs,
            layer=layer,
            dtype=dtype,
            _packed={},  # as the buffers were when somebody last asked
            _buffer_names={},  # of each weight that was set
        )
        self.bind(kernel, others or {})

    def bind(self, kernel: Kernel, others: Mapping[str, Kernel]) -> None:
        """Takes other kernels, which read the packed weights as they are."""
        bound = {
            name: handles.bind(others.get(name, kernel), spec, self.registry)
            for name, spec in self.specs.items()
        }
        self.__dict__.update(kernel=kernel, others=dict(others), bound=bound)

    def repack(self, kernel: Kernel, others: Mapping[str, Kernel] | None = None) -> None:
        """Takes other kernels, and packs every weight anew for them."""
        stored = {name: self.stored_weight(name) for name in self._buffer_names}
        self._rebind(kernel, others or {})
        for name, stored_weight in stored.items():
            self.set_weight(name, stored_weight)

    def _rebind(self, kernel: Kernel, others: Mapping[str, Kernel]) -> None:
        """Takes other kernels, for which every weight must be packed and set anew."""
        for key in dict.fromkeys(key for keys in self._buffer_names.values() for key in keys):
            del self._buffers[key]
        self._packed, self._buffer_names = {}, {}
        self.bind(kernel, others)

    def packed(self, name: str = "") -> Packed:
        """The packed tensors of one weight, as the buffers hold them now: accelerate moves a module by
        exchanging those.
        """
        keys = self._buffer_names[name]
        # shapes of buffers are constants, others vary as a batch does, and may equal it
        if torch.compiler.is_compiling():
            return tuple(self.get_buffer(key) for key in keys)
        packed = self._packed.get(name)
        if packed is None or packed[0] is not self._buffers[keys[0]]:
            packed = self._packed[name] = tuple(self.get_buffer(key) for key in keys)
        return packed

    @property
    def scheme(self) -> str:
        """Name of the scheme; several are joined by `` + ``."""
        return " + ".join(dict.fromkeys(spec.scheme.name for spec in self.specs.values()))

    def kernel_of(self, name: str) -> Kernel:
        """The kernel that runs a weight."""
        return kernel_for(self.others.get(name, self.kernel), self.specs[name].scheme)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        buffers = (self.get_buffer(keys[0]) for keys in self._buffer_names.values())
        return next((buffer.device for buffer in buffers), torch.device("meta"))

    def set_weight(self, name: str, stored_weight: StoredWeight, *, in_place: bool = False) -> None:
        """Packs the stored tensors of one weight and takes them.

        Args:
            name: Name of the weight.
            stored_weight: The tensors of its scheme's layout.
            in_place: Write them into the memory of the packed weight that is there, where that is packed
                alike.

        Raises:
            WeightError: a tensor is missing, or has another shape or dtype than ``Scheme.layout`` says.
        """
        spec = self.specs[name]
        check_stored(stored_weight, spec, name)
        packed = self.kernel_of(name).pack(stored_weight, spec)
        if not (in_place and name in self._buffer_names and _alike(self.packed(name), packed)):
            self._install(name, packed)
            return
        for old, new in zip(self.packed(name), packed, strict=True):
            _bytes(old).copy_(_bytes(new))

    def set_steps(self, name: str, steps: Iterable[QuantizedRows]) -> None:
        """Packs a weight that is quantized some rows at a time, and takes it: as `set_weight`. Where the
        kernel packs by rows, one step is held beside what is packed.
        """
        self._install(name, pack_steps(self.kernel_of(name), self.specs[name], steps, name))

    def _install(self, name: str, packed: Packed) -> None:
        """Takes the packed tensors of a weight as buffers, so that memory counts are right."""
        keys = tuple(f"packed_{name.replace('.', '_')}_{i}" for i in range(len(packed)))
        for key, tensor in zip(keys, packed, strict=True):
            # not persistent: state_dict writes the stored layout
            self.register_buffer(key, tensor, persistent=False)
        self._packed[name] = packed
        self._set(name, keys)

    def _set(self, name: str, keys: tuple[str, ...]) -> None:
        """Notes which buffers hold a weight."""
        self._buffer_names[name] = keys
        self._set_empty_weight(self.dtype, self.get_buffer(keys[0]).device)

    def stored_weight(self, name: str = "") -> StoredWeight:
        """The stored tensors of one weight, exactly as they were before packing."""
        return self.kernel_of(name).unpack(self.packed(name), self.specs[name])

    def stored_layout(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name in the state dict, shape and dtype of every stored tensor, set or not."""
        for name, spec in self.specs.items():
            for key, (shape, dtype) in spec.scheme.layout(spec.n, spec.k).items():
                yield f"{name}.{key}".lstrip("."), shape, dtype

    def stored_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor under its name in the state dict, one weight at a time."""
        for name in self.specs:
            if name in self._buffer_names:
                for key, tensor in self.stored_weight(name).items():
                    yield f"{name}.{key}".lstrip("."), tensor

    def stored_rows(self, elements: int) -> Iterator[tuple[str, Tensor]]:
        """As `stored_tensors`, but a weight of more elements comes, where its kernel packs by rows, some rows
        at a time: each name several times.
        """
        for name, spec in self.specs.items():
            if name not in self._buffer_names:
                continue
            steps = unpack_steps(self.kernel_of(name), self.packed(name), spec, elements)
            yield from self.stored_names(name, steps)

    def stored_names(self, name: str, steps: Iterable[QuantizedRows]) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor of the rows of one weight under its name in the state dict; what all rows share
        comes once.
        """
        dims = shard_dims(self.specs[name].scheme, 0)
        for start, _, stored_weight in steps:
            for key, tensor in stored_weight.items():
                if start == 0 or dims[key] is not None:
                    yield f"{name}.{key}".lstrip("."), tensor

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update((prefix + key, tensor) for key, tensor in self.stored_tensors())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = dict(state_dict)
        for name, spec in self.specs.items():
            keys = {
                key: f"{prefix}{name}.{key}" if name else prefix + key
                for key in spec.scheme.layout(spec.n, spec.k)
            }
            absent = [full for full in keys.values() if full not in rest]
            missing_keys += absent
            if absent:
                continue
            try:
                device = self.device if self.device.type != "meta" else None
                if device is None:  # the kernel was chosen for no device, or not at all
                    self._rebind(*self._kernels_for(rest[next(iter(keys.values()))].device, self.dtype))
                self.set_weight(
                    name, {key: _copy(rest.pop(full).detach(), device) for key, full in keys.items()}
                )
            except WeightError as error:
                error_msgs.append(f"{prefix.rstrip('.')}: {error}")
        if EMPTY_WEIGHT in self._parameters:
            rest[prefix + EMPTY_WEIGHT] = self._parameters[EMPTY_WEIGHT]
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantModule:
        """Moves between devices; never casts codes or scales, whatever ``.half()`` or ``.to(dtype)`` ask."""
        if not self._buffer_names and fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype is self.dtype:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
            return self  # empty: what fills it says where
        # nothing casts integers: only the device shows
        device = fn(torch.empty(0, dtype=torch.int8, device=self.device)).device
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        moves = (device, dtype) != (self.device, self.dtype)
        if moves:
            kernel, others = self._kernels_for(device, dtype)
            packed = {
                name: kernel_for(others.get(name, kernel), self.specs[name].scheme).pack(
                    self._moved(name, fn), self.specs[name]
                )
                for name in self._buffer_names
            }
        held = {key: self._buffers.pop(key) for key in list(self._buffers) if key.startswith("packed_")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        self._buffers.update(held)
        if moves:  # from here on nothing fails
            del held
            self._rebind(kernel, others)
            self.dtype = dtype
            for name in list(packed):
                self._install(name, packed.pop(name))
        return self

    def _moved(self, name: str, fn: Callable[[Tensor], Tensor]) -> StoredWeight:
        return {k: _bytes(fn(_bytes(t)), t.dtype) for k, t in self.stored_weight(name).items()}

    def _kernels_for(self, device: torch.device, dtype: torch.dtype) -> tuple[Kernel, dict[str, Kernel]]:
        """Chooses the kernels again, for the device or the dtype that the module goes to: one for each
        scheme.
        """
        by_scheme: dict[str, list[str]] = {}
        for name, spec in self.specs.items():
            by_scheme.setdefault(spec.scheme.name, []).append(name)
        chosen = {scheme: self._kernel_for(names, device, dtype) for scheme, names in by_scheme.items()}
        first, *rest = by_scheme
        return chosen[first], {name: chosen[scheme] for scheme in rest for name in by_scheme[scheme]}

    def _kernel_for(self, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> Kernel:
        scheme = self.specs[names[0]].scheme.name
        if device.type == "meta":
            return (
                self.kernel_of(names[0])
                if self.device.type == "meta"
                else aten.Dense()
                if scheme == "bf16"
                else aten.Dequantize()
            )
        target = self.registry.device(device)
        requests = [
            Request(spec, self.layer, target, dtype)
            for spec in dict.fromkeys(self.specs[name] for name in names)
        ]
        choice = select_kernel(requests, self._usable(self.registry.kernels(target.kind)))
        if not choice.kernel:
            suggestion = "another device: see `quantport matrix`"
            raise UnsupportedError(
                f"move {scheme} to {device}, {dtype}", "; ".join(choice.reasons), suggestion
            )
        return self.registry.kernel(choice.kernel)

    def _usable(self, kernels: Sequence[Kernel]) -> Sequence[Kernel]:
        """The kernels that the module may have."""
        return kernels

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {k: v for k, v in self._buffers.items() if not k.startswith("packed_")}
        state["_packed"] = {
            name: {k: _alone(_bytes(t)) for k, t in self.stored_weight(name).items()}
            for name in self._buffer_names
        }
        state["kernel"], state["_buffer_names"] = self.kernel.name, {}
        state["others"] = {name: kernel.name for name, kernel in self.others.items()}
        del state["bound"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        refuse_stock_save(QuantModule)
        weights = state.pop("_packed")
        super().__setstate__({**state, "_packed": {}})  # type: ignore[no-untyped-call]  # torch has no types here
        find = self.registry.kernel
        self.bind(find(state["kernel"]), {name: find(kernel) for name, kernel in state["others"].items()})
        for name, stored_weight in weights.items():
            spec = self.specs[name]
            layout = spec.scheme.layout(spec.n, spec.k)
            self.set_weight(name, {k: _bytes(t, layout[k][1]) for k, t in stored_weight.items()})


def _alike(a: Packed, b: Packed) -> bool:
    """Whether one can be written over the other, byte by byte: not what oneDNN packs, which has no bytes."""
    if any(t.layout is not torch.strided for t in (*a, *b)):
        return False
    return [(t.shape, t.dtype, t.device) for t in a] == [(t.shape, t.dtype, t.device) for t in b]


def _copy(tensor: Tensor, device: torch.device | None) -> Tensor:
    return _bytes(_bytes(tensor).to(device, copy=True), tensor.dtype)


def _alone(tensor: Tensor) -> Tensor:
    """A tensor whose memory holds nothing else: pickle writes all of it."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _bytes(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Views codes and scales as integers, which nothing casts and plain pickle knows; or views them back as
    ``dtype``.
    """
    return tensor.view(dtype or _INTEGERS.get(tensor.element_size(), tensor.dtype))
