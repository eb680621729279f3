"""PyTorch's own operators on the simulated NPU: each runs on CPU tensors over the NPU's memory.

torch_npu's kernels for them call CANN, which has no host version. Allocation, views and metadata are
torch_npu's own.

Dtypes that CANN's Cast and InplaceCopy do not list for a chip are mere bytes there: they are allocated,
viewed, and copied whole between host and device, and every other operator refuses them (hicann/ops-math
math/cast/docs/aclnnCast.md and conversion/view_copy/docs/aclnnInplaceCopy.md; Ascend/pytorch
torch_npu/csrc/aten/ops/op_api/CopyKernelOpApi.cpp, which converts on the host where a copy between the two
changes the dtype).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch_npu
from simulator.memory import NZ, check, layout, lies, matrix, over, place
from simulator.register import A5, I310, family
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_OURS = (
    "empty",
    "new_empty",
    "set_",
    "resize",
    "record_stream",
    "is_pinned",
    "_pin_memory",
    "is_set_to",
    "_reshape_alias",
    "npu_",
)

# torch_npu's own autograd of these leads to CANN at once; here they have no gradients.
CUSTOM = (
    "scaled_dot_product_attention",
    "softmax.int",
    "argsort",
    "argsort.stable",
    "one_hot",
    "repeat_interleave.self_int",
    "repeat_interleave.self_Tensor",
)


_FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)


def _known(name: str, tensor: Tensor) -> None:
    """Refuses a tensor of a dtype with which the SoC does not compute."""
    absent = (tensor.dtype in _FLOAT8 and family() != A5) or (
        tensor.dtype is torch.bfloat16 and family() == I310
    )
    why = f"{family()} has no {tensor.dtype}: it is viewed, or copied whole to and from the host"
    check(tensor.device.type != "npu" or not absent, name, why)


def _views(schema: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _each(call: Callable[[Any], Any], value: Any) -> Any:
    """Applies ``call`` to every part of an argument or a result; the dispatcher passes no nested lists or
    tuples.
    """
    return type(value)(_each(call, v) for v in value) if type(value) in (list, tuple) else call(value)


def _run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an operator on the host and moves its results to where its arguments are."""
    device = kwargs.pop("device", None)
    host: dict[int, Tensor] = {}
    copies = operator is torch.ops.aten._to_copy.default
    crosses = (
        copies
        and device is not None
        and torch.device(device).type != args[0].device.type
        and args[0].is_contiguous()
    )

    def down(value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type == "npu":
            if not crosses:
                _known(str(operator), value)
            plain = matrix(value) if copies else over(value)
            host[id(plain)] = value
            return plain
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def up(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in host:
            return host[id(value)]
        if device is not None and torch.device(device).type != "npu":
            return value
        out = place(value)
        if not crosses:
            _known(str(operator), out)
        return out

    if "pin_memory" in kwargs:
        kwargs["pin_memory"] = False
    return _each(
        up, operator(*_each(down, args), **{name: _each(down, value) for name, value in kwargs.items()})
    )


def _composed(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator that torch composes of others: run on the host; for fake tensors, which have no memory,
    composed as by torch.
    """
    if any(isinstance(value, FakeTensor) for value in (*args, *kwargs.values())):
        return operator.decompose(*args, **kwargs)
    return _run(operator, *args, **kwargs)


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """A copy does not keep the format of the source, as in torch_npu."""
    if to.device == source.device or not (to.is_contiguous() and source.is_contiguous()):
        _known("copy_", to)
        _known("copy_", source)
    (over(to) if to.device.type == "npu" else to).copy_(
        matrix(source) if source.device.type == "npu" else source
    )
    return to


def _copy_back(source: Tensor, to: Tensor) -> Tensor:
    """The function that torch_npu calls after an operator that it lacks has run on the host."""
    return _copy(to, source)


def _clone(tensor: Tensor, *, memory_format: torch.memory_format | None = None) -> Tensor:
    _known("clone", tensor)
    if layout(tensor) == NZ:
        out = torch_npu.empty_with_format(
            list(tensor.shape), dtype=tensor.dtype, device=tensor.device, acl_format=NZ
        )
        lies(out).copy_(lies(tensor))
        return out
    return place(over(tensor).clone(memory_format=memory_format or torch.preserve_format))


def install(library: torch.library.Library) -> None:
    """Registers every operator for which torch_npu has a kernel that calls CANN."""
    special = {"aten::copy_": _copy, "aten::clone": _clone, "aten::_copy_from_and_resize": _copy_back}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
            space, _, full = name.partition("::")
            base, _, overload = full.partition(".")
            packet = (
                getattr(torch.ops.aten, base, None)
                if space == "aten" and not base.startswith(_OURS)
                else None
            )
            operator = getattr(packet, overload or "default", None)
            if operator is not None and not _views(operator._schema):
                library.impl(full, special.get(name) or partial(_run, operator), "PrivateUse1")
        for name in CUSTOM:
            base, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, base), overload or "default")
            library.impl(name, partial(_composed, operator), "AutogradPrivateUse1")
