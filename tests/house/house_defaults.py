"""Finds code whose result depends on the defaults of the process: dtype, device, number of threads.

Transformers sets the default dtype of the whole process while it builds a model, and users set a default
device.
"""

from __future__ import annotations

import ast

import house_source as house

FACTORIES = {
    "arange",
    "as_tensor",
    "asarray",
    "bartlett_window",
    "blackman_window",
    "empty",
    "empty_permuted",
    "empty_strided",
    "eye",
    "fftfreq",
    "full",
    "hamming_window",
    "hann_window",
    "kaiser_window",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "range",
    "rfftfreq",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
}
MODULES = {
    "BatchNorm1d",
    "BatchNorm2d",
    "Bilinear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
}
_KINDS = ("", "Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
CONSTRUCTORS = {f"{kind}Tensor" for kind in _KINDS}
DEFAULTS = {
    "get_default_device",
    "get_default_dtype",
    "set_default_device",
    "set_default_dtype",
    "set_default_tensor_type",
}
THREADS = {"set_num_interop_threads", "set_num_threads"}


def _name(node):
    """``torch.nn.Linear`` of an attribute, or of a name that stands alone; '' of anything else."""
    if isinstance(node, ast.Attribute):
        base = _name(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def _literal(node):
    """A number as written: ``-1``, ``2.0**m``."""
    if isinstance(node, ast.UnaryOp):
        return _literal(node.operand)
    if isinstance(node, ast.BinOp):
        return _literal(node.left) and (isinstance(node.op, ast.Pow) or _literal(node.right))
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _fractional(nodes):
    return any(
        isinstance(part, ast.Constant) and isinstance(part.value, float)
        for node in nodes
        for part in ast.walk(node)
    )


def _called(node):
    """What is wrong with a call; '' of most."""
    owner, _, name = _name(node.func).rpartition(".")
    given = {keyword.arg for keyword in node.keywords}
    of_torch, of_nn = owner.split(".")[0] == "torch", owner in ("nn", "torch.nn")
    if (of_torch and name in FACTORIES) or (of_nn and name in MODULES):
        return (
            f"{name} without " + " and ".join(sorted({"dtype", "device"} - given))
            if {"dtype", "device"} - given
            else ""
        )
    if name in CONSTRUCTORS and owner in ("", "torch", "torch.cuda"):
        return f"{name}(...) takes the default dtype or device: torch.tensor with both"
    if (
        of_torch
        and name == "where"
        and node.args[1:]
        and all(map(_literal, node.args[1:]))
        and _fractional(node.args[1:])
    ):
        return "where of two numbers takes the default dtype"
    return (
        "finfo of the default dtype" if of_torch and name == "finfo" and not node.args and not given else ""
    )


def findings(path):
    """(line, what is wrong) of every use of a default of the process."""
    for node in ast.walk(house.tree(path)):
        if isinstance(node, ast.Call) and (wrong := _called(node)):
            yield node.lineno, wrong
        elif (
            isinstance(node, ast.Attribute)
            and _name(node).startswith("torch.")
            and node.attr in DEFAULTS | THREADS
        ):
            yield node.lineno, f"{node.attr}, of the whole process"
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.fft"):
            names = {alias.name for alias in node.names} & (FACTORIES | DEFAULTS | THREADS)
            yield from ((node.lineno, f"{name} by its bare name: torch.{name}") for name in sorted(names))
