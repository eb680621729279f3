"""Which layers a model's own code does not only call, but takes the weight of: ``self.dt_proj.weight @ x``.

Codes and scales are no such tensor, so these layers stay in 16 bits. They are found in the source of the
classes, whatever path the inputs and the device take at run time. A class without source says nothing; there
the stand-in for the weight raises at the first forward.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cached_property, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from quantport.model.source_reader import Reading, Sources, unbound

# no part of a forward; one that the caller asks for, such as fusing projections, raises at the stand-in
_SETUP = re.compile(r"__init__|__repr__|extra_repr|_?(init|reset|tie|resize|set|fuse|unfuse)(_|$)")


def find_weight_reads(model: nn.Module) -> dict[nn.Module, str]:
    """Every module whose ``weight`` the code of another one takes -> the class of that other one."""
    classes, out = _Classes(), dict[nn.Module, str]()
    for module in model.modules():
        cls = type(module)
        functions = [*classes.reading(cls, module), *classes.replaced(module)]
        if functions:
            reading = Reading(module, classes.sources, _SETUP)
            for function in functions:
                reading.call(function, module)
            out.update(dict.fromkeys(reading.found, cls.__name__))
    return out


class _Classes:
    """The functions of classes that may take the weight of others; sources are parsed once."""

    def __init__(self) -> None:
        self.sources = Sources()
        self._reading: dict[type, list[FunctionType]] = {}
        self._takes: dict[type, bool] = {}

    def reading(self, cls: type, module: nn.Module) -> list[FunctionType]:
        """The methods of a class and its bases that may take the weight of others, but for those that only
        set up. All of them where a module of this one takes that of what it is called with.
        """
        if any(self._takes_arguments(type(child)) for child in module.children()):
            return [function for _, function in _methods(cls)]
        if cls not in self._reading:
            self._reading[cls] = list(self._functions(cls))
        return self._reading[cls]

    def replaced(self, module: nn.Module) -> Iterator[FunctionType]:
        """Those that one module has in the place of methods of its class."""
        for value in vars(module).values():
            if isinstance(value, MethodType):
                of_this = value.__self__ is module
            else:
                of_this = isinstance(value, partial) and value.args[:1] == (module,)
            if of_this and (function := unbound(value)) and self._reads(function):
                yield function

    def _functions(self, cls: type) -> Iterator[FunctionType]:
        methods = list(_methods(cls))
        properties = (
            name for base in cls.__mro__ for name, function in _properties(base) if self._reads(function)
        )
        reading = {name for name, function in methods if self._reads(function)} | set(properties)
        for name, function in methods:
            names = _names(function.__code__)
            others = (function.__globals__.get(other) for other in names)
            if (
                self._reads(function)
                or not reading.isdisjoint(names - {name})
                or any(isinstance(other, FunctionType) and self._reads(other) for other in others)
            ):
                yield function

    def _takes_arguments(self, cls: type) -> bool:
        if cls not in self._takes:
            forward = unbound(getattr(cls, "forward", None))
            self._takes[cls] = bool(forward and self._reads(forward) and self._reads_arguments(forward))
        return self._takes[cls]

    def _reads(self, function: FunctionType) -> bool:
        """Whether a function speaks of the ``weight`` of anything but its first argument."""
        if "weight" not in _names(function.__code__):
            return False
        tree = self.sources.tree(function)
        return tree is not None and any(
            node.value == "weight" if isinstance(node, ast.Constant) else not _is_first(node, tree)
            for node in _weights(tree)
        )

    def _reads_arguments(self, function: FunctionType) -> bool:
        tree = self.sources.tree(function)
        names = {argument.arg for argument in tree.args.args[1:]} if tree else set[str]()
        return tree is not None and any(
            isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
            for node in _weights(tree)
        )


def _methods(cls: type) -> Iterator[tuple[str, FunctionType]]:
    for base in cls.__mro__:
        for name, value in vars(base).items() if base is not nn.Module else ():  # which knows no layer
            if not _SETUP.match(name) and (function := unbound(value)):
                yield name, function


def _properties(cls: type) -> Iterator[tuple[str, FunctionType]]:
    for name, value in vars(cls).items():
        getter = value.fget if isinstance(value, property) else getattr(value, "func", None)
        if isinstance(value, property | cached_property) and isinstance(getter, FunctionType):
            yield name, getter


def _names(code: CodeType) -> set[str]:
    """The names that code uses, and the texts that may be names."""
    out = {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            out |= _names(constant)
    return out


def _weights(tree: ast.AST) -> Iterator[Any]:
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
        if isinstance(node, ast.Attribute | ast.Constant) and name == "weight":
            yield node


def _is_first(node: ast.Attribute, tree: ast.FunctionDef) -> bool:
    first = tree.args.args[0].arg if tree.args.args else ""
    return isinstance(node.value, ast.Name) and node.value.id == first
