"""Which layers a model's own code does not only call, but takes the weight of: ``self.dt_proj.weight @ x``.

Codes and scales are no such tensor, so these layers stay in 16 bits. They are found in the source of the
classes, whatever path the inputs and the device take at run time. A class without source says nothing; there
the stand-in for the weight raises at the first forward.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

Path = tuple[str, ...]  # names of modules from the one whose code is read on; ``*`` is any item of a list

_HARMLESS = {"shape", "dtype", "device"}  # what a quantized layer answers
# no part of a forward; one that the caller asks for, such as fusing projections, raises at the stand-in
_SETUP = re.compile(r"__init__|__repr__|extra_repr|_?(init|reset|tie|resize|set|fuse|unfuse)(_|$)")
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def find_weight_reads(model: nn.Module) -> dict[nn.Module, str]:
    """Every module whose ``weight`` the code of another one takes -> the class of that other one."""
    functions: dict[type, list[ast.FunctionDef]] = {}
    out: dict[nn.Module, str] = {}
    for module in model.modules():
        cls = type(module)
        if cls not in functions:
            functions[cls] = list(_functions(cls))
        for function in functions[cls]:
            reads = _Reads(module, function)
            for path in reads.paths:
                out.update(dict.fromkeys(_at(module, path), cls.__name__))
    return out


def _functions(cls: type) -> Iterator[ast.FunctionDef]:
    """The methods of a class and its bases that speak of the ``weight`` of others, but for those that only
    set up.
    """
    for base in cls.__mro__:
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            if not isinstance(function, FunctionType) or _SETUP.match(name):
                continue
            if not _mentions_weight(function.__code__):
                continue
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            except (OSError, SyntaxError):  # no source, or a lambda amid a statement
                continue
            method = tree.body[0]
            if isinstance(method, ast.FunctionDef) and method.args.args and _reads_others(method):
                yield method


def _mentions_weight(code: CodeType) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return "weight" in code.co_names or any(map(_mentions_weight, inner))


def _reads_others(method: ast.FunctionDef) -> bool:
    own = method.args.args[0].arg
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == "weight"
        and not (isinstance(node.value, ast.Name) and node.value.id == own)
        for node in ast.walk(method)
    )


def _at(module: nn.Module, path: Path) -> Iterable[nn.Module]:
    """The modules at a path."""
    reached = [module]
    for name in path:
        reached = [
            child
            for parent in reached
            for child in (parent.children() if name == "*" else [parent._modules.get(name)])
            if child is not None
        ]
    return reached


class _Reads(ast.NodeVisitor):
    """Finds the paths of the modules whose weight a method takes.

    Branches that the attributes of the module rule out are left out, as those for tensor parallelism; whether
    it trains is not known.
    """

    def __init__(self, module: nn.Module, function: ast.FunctionDef) -> None:
        self.module, self.own_name = module, function.args.args[0].arg
        self.local: dict[str, Path] = {self.own_name: ()}
        self.paths: set[Path] = set()
        self.visit(function)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _HARMLESS and self._weight_of(node.value):
            return
        if path := self._weight_of(node):
            self.paths.add(path)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        asks = isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr")
        for child in (node.func, *node.args, *(keyword.value for keyword in node.keywords)):
            if not (asks and self._weight_of(child)):
                self.visit(child)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not (self._weight_of(node.left) and isinstance(node.ops[0], ast.Is | ast.IsNot)):
            self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self._branch(node.test, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._branch(node.test, [node.body], [node.orelse])

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._name(target, self._path(node.value))

    def visit_For(self, node: ast.For) -> None:
        self._name_items(node.target, node.iter)
        self.generic_visit(node)

    def visit_ListComp(self, node: ast.ListComp | ast.GeneratorExp) -> None:
        for loop in node.generators:
            self._name_items(loop.target, loop.iter)
        self.generic_visit(node)

    visit_GeneratorExp = visit_ListComp  # noqa: N815  # named by ast

    def _branch(self, test: ast.expr, body: Iterable[ast.AST], orelse: Iterable[ast.AST]) -> None:
        self.visit(test)
        truth = self._truth(test)
        for node in (*(body if truth is not False else ()), *(orelse if truth is not True else ())):
            self.visit(node)

    def _weight_of(self, node: ast.AST) -> Path | None:
        """The path of the module whose weight this is; None for anything else, and for the own weight."""
        if isinstance(node, ast.Attribute) and node.attr == "weight":
            return self._path(node.value) or None
        return None

    def _path(self, node: ast.AST) -> Path | None:
        """The path of the module that this is, as far as names say."""
        if isinstance(node, ast.Name):
            return self.local.get(node.id)
        if isinstance(node, ast.Attribute | ast.Subscript):
            inner = self._path(node.value)
            if inner is None or (isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice)):
                return inner
            return (*inner, node.attr if isinstance(node, ast.Attribute) else "*")
        return None

    def _name_items(self, target: ast.expr, items: ast.expr) -> None:
        """Names what a loop goes over: a list of modules, or ``enumerate`` of one."""
        if isinstance(items, ast.Call) and isinstance(items.func, ast.Name) and items.func.id == "enumerate":
            if isinstance(target, ast.Tuple) and items.args:
                self._name_items(target.elts[-1], items.args[0])
        elif (path := self._path(items)) is not None:
            self._name(target, (*path, "*"))

    def _name(self, target: ast.expr, path: Path | None) -> None:
        if isinstance(target, ast.Name):
            self.local.pop(target.id, None)
            if path is not None:
                self.local[target.id] = path

    def _truth(self, test: ast.expr) -> bool | None:
        """Whether a condition holds, as far as plain attributes of the module say; None where they do not."""
        if isinstance(test, ast.BoolOp):
            parts = [self._truth(value) for value in test.values]
            decisive = isinstance(test.op, ast.Or)
            if decisive in parts:
                return decisive
            return None if None in parts else not decisive
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._truth(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            compare = _COMPARISONS.get(type(test.ops[0]))
            left, right = self._value(test.left), self._value(test.comparators[0])
            return compare(left, right) if compare and None not in (left, right) else None
        value = self._value(test)
        return None if value is None else bool(value)

    def _value(self, node: ast.expr) -> bool | float | None:
        """A number or a flag among the attributes of the module (``self.config.rescale_every``), or None."""
        value: Any = None
        if isinstance(node, ast.Constant):
            value = node.value
        elif isinstance(node, ast.Attribute) and (path := self._path(node)) and "training" not in path:
            value = self.module
            for name in path:
                value = getattr(value, name, None)
        return value if isinstance(value, bool | int | float) else None
