"""Registers functions as the vendor's operators, under the schemas of the wheel, and checks them against its
shape functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
import torch_npu
from simulator.memory import check
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

INT4, HIF8, E5M2, E4M3, E8M0, E2M1, E1M2 = 285, 290, 291, 292, 293, 296, 297  # 256 + aclDataType
ELEMENTS = {
    None: "int8",
    1: "int8",
    16: "int4",
    23: "e5m2",
    24: "e4m3",
    E5M2: "e5m2",
    E4M3: "e4m3",
    E2M1: "e2m1",
}
OUTPUTS = {5: torch.float16, 15: torch.bfloat16}
A2, A3, A5, I310 = "A2", "A3", "950", "310P"
CALLS: list[str] = []  # names of the operators that ran, in order: what a test may ask for
BODIES: dict[str, Callable[..., Any]] = {}


def family() -> str:
    """The family of the simulated SoC (Ascend/pytorch ``NpuVariables.h``)."""
    soc = torch_npu._C._npu_get_soc_version()
    return A5 if soc >= 260 else A3 if soc >= 250 else A2 if soc >= 220 else I310


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def _agrees(name: str, args: Any, kwargs: Any, out: Any) -> None:
    """Checks that the vendor's shape function accepts the same call and predicts shape and dtype of the
    results.
    """
    operator = getattr(torch.ops.npu, name).default
    if not torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "Meta"):
        return
    told, _ = tree_flatten(operator(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs)))
    came, _ = tree_flatten(out)
    says, gave = ([(tuple(t.shape), t.dtype) for t in tensors] for tensors in (told, came))
    check(says == gave, name, f"the shape function of torch_npu says {says}, and the body made {gave}")


def operator(*families: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the operator of its name, on the SoCs whose documentation lists it."""

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        name = body.__name__

        @wraps(body)
        def run(*args: Any, **kwargs: Any) -> Any:
            check(family() in families, name, f"not on {family()}, only on {', '.join(families)}")
            tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
            check(all(t.device.type == "npu" for t in tensors), name, "every tensor must be on the NPU")
            with np.errstate(all="ignore"):  # overflow is a result
                out = body(*args, **kwargs)
            _agrees(name, args, kwargs, out)
            CALLS.append(name)
            return out

        BODIES[name] = run
        return run

    return register


def install(library: torch.library.Library) -> None:
    """Registers every operator."""
    for name, body in BODIES.items():
        library.impl(name, body, "PrivateUse1", allow_override=True)


def allowed(name: str, what: str, value: object, values: Sequence[object]) -> None:
    """Refuses a value that the documentation does not list."""
    check(value in values, name, f"{what} may be {', '.join(map(str, values))}, not {value}")
