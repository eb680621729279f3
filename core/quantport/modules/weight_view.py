"""The stand-ins for the ``weight`` and the parameters of a module that holds codes and scales instead of a
16-bit weight.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from quantport.errors import NoTensorError

_OPERATORS = (
    *("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "rtruediv", "itruediv"),
    *("floordiv", "rfloordiv", "ifloordiv", "mod", "rmod", "imod", "pow", "rpow", "ipow"),
    *("matmul", "rmatmul", "imatmul", "and", "rand", "or", "ror", "xor", "rxor", "lshift", "rshift"),
    *("neg", "pos", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge", "bool", "int", "float", "index"),
    *("len", "iter", "contains", "getitem", "setitem", "array"),
)


class WeightView:
    """What code may ask of the weight of a layer that holds no 16-bit weight.

    Args:
        shape: ``[out_features, in_features]``.
        dtype: That of the activations.
        device: Where the layer is.

    Raises:
        NoTensorError: anything else of a tensor is asked for: an attribute, an operator, a function of torch.
    """

    __slots__ = ("device", "dtype", "shape")
    _is_hf_initialized = True  # for Transformers, which draws parameters that a checkpoint has not

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def __getattr__(self, name: str) -> Any:
        raise _no_tensor(name)

    def __repr__(self) -> str:
        return f"WeightView(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _no_tensor(getattr(func, "__name__", str(func)))


# Functions of which an empty parameter makes numbers that look like those of a weight: 0, NaN, nothing.
_READS = frozenset(
    (
        *("sum", "mean", "std", "var", "norm", "linalg_vector_norm", "vector_norm", "abs", "min", "max"),
        *("amin", "amax", "aminmax", "allclose", "equal", "isclose", "item", "tolist", "numpy", "unbind"),
        *("linear", "embedding", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "einsum"),
        *("add", "sub", "mul", "div", "true_divide", "__rsub__", "__rdiv__", "__getitem__", "__setitem__"),
        *("t", "transpose", "permute", "reshape", "flatten", "T", "mT", "H", "mH"),
    )
)


class EmptyParameter(nn.Parameter):
    """The parameter of a module that has none: empty, of the dtype of the activations, on its device. It is
    asked for these; it moves, is cast and is copied as others are.

    Raises:
        NoTensorError: values are read or computed with, or torch refuses what it is asked of no elements.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # of an attribute, which the descriptor names
            name = func.__self__.__name__
        if name in _READS:
            raise _no_tensor(name)
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})
        except (IndexError, RuntimeError) as error:
            raise _no_tensor(name) from error


def _no_tensor(name: str) -> NoTensorError:
    suggestion = (
        "leave the layer in 16 bits with ignore=, or keep adapters beside it; to merge them, take the 16-bit "
        "model and quantize that"
    )
    return NoTensorError(
        f"weight.{name} of a quantized layer", "its weight is stored as codes and scales", suggestion
    )


def _refused(name: str) -> Any:
    def operator(self: WeightView, *args: Any) -> NoReturn:
        raise _no_tensor(name)

    return operator


for _name in _OPERATORS:
    setattr(WeightView, f"__{_name}__", _refused(f"__{_name}__"))
