"""Follows the source of a module's methods as far as names say which modules they speak of."""

from __future__ import annotations

import ast
import inspect
import operator
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import nn

from quantport.model.source_values import (
    Items,
    Values,
    at,
    flat,
    has_modules,
    items_of,
    items_of_all,
    of_container,
    unique,
)

_DEPTH = 3  # calls that are followed into one another
_HARMLESS = {"shape", "dtype", "device"}  # what a quantized layer answers
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_LISTS = {"list", "tuple", "set", "reversed", "sorted", "iter"}


class Bound(NamedTuple):
    """A method, and what it is called on; None for one that is called on nothing."""

    function: FunctionType
    on: Any


class Sources:
    """Parsed functions."""

    def __init__(self) -> None:
        self._trees: dict[Any, ast.FunctionDef | None] = {}

    def tree(self, function: FunctionType) -> ast.FunctionDef | None:
        """The definition of a function; None without source, or of a lambda amid a statement."""
        code = function.__code__
        if code not in self._trees:
            self._trees[code] = None
            with suppress(OSError, SyntaxError, TypeError):
                found = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
                self._trees[code] = found if isinstance(found, ast.FunctionDef) else None
        return self._trees[code]


def unbound(value: Any) -> FunctionType | None:
    """The function of a method, or of a wrapper around one."""
    if isinstance(value, partial):
        value = value.func
    if not callable(value):  # a classmethod is not
        value = getattr(value, "__func__", value)
    value = inspect.unwrap(value) if callable(value) else None
    value = value.__func__ if isinstance(value, MethodType | staticmethod | classmethod) else value
    return value if isinstance(value, FunctionType) else None


class Reading:
    """What the methods of one module take the weight of.

    Attributes:
        found: Those modules, without the module itself.
    """

    def __init__(self, module: nn.Module, sources: Sources, setup: re.Pattern[str]) -> None:
        self.module, self.sources, self.setup = module, sources, setup
        self.found: dict[nn.Module, None] = {}
        self._called: dict[tuple[Any, ...], tuple[Any, Any, Values]] = {}

    def call(
        self,
        function: FunctionType,
        on: Any,
        args: Sequence[Values] = (),
        named: Mapping[str, Values] | None = None,
        depth: int = 0,
    ) -> Values:
        """Reads a function, called with these arguments; returns what it may return."""
        tree, named = self.sources.tree(function), named or {}
        if tree is None or depth > _DEPTH or (depth and self.setup.match(tree.name)):
            return ()
        given = [*([(on,)] if on is not None else []), *args]
        key = (function.__code__, *(tuple(map(id, values)) for values in (*given, *named.values())), *named)
        if key not in self._called:
            self._called[key] = (given, named, ())  # where it calls itself; what an id is of stays
            names = [argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args)]
            local = dict(named) | dict(zip(names, given, strict=False))
            if tree.args.vararg:
                local[tree.args.vararg.arg] = (Items(given[len(names) :]),)
            frame = _Frame(self, function.__globals__, local, depth)
            for statement in tree.body:
                frame.visit(statement)
            self._called[key] = (given, named, unique(frame.returned))
        return self._called[key][2]


class _Frame(ast.NodeVisitor):
    """One call of a function.

    Branches that the attributes of the module rule out are left out, as those for tensor parallelism; whether
    it trains is not known.
    """

    def __init__(
        self, reading: Reading, names: Mapping[str, Any], local: dict[str, Values], depth: int
    ) -> None:
        self.reading, self.globals, self.local, self.depth = reading, names, local, depth
        self.returned: list[Any] = []

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _HARMLESS and self._weights_of(node.value):
            return
        self._note(node)
        self._evaluate(node)  # a property may read
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self._note(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        asks = isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr")
        self._note(node)
        for child in (node.func, *node.args, *(keyword.value for keyword in node.keywords)):
            if not (asks and self._weights_of(child)):
                self.visit(child)
        self._evaluate(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not (self._weights_of(node.left) and isinstance(node.ops[0], ast.Is | ast.IsNot)):
            self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self._branch(node.test, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._branch(node.test, [node.body], [node.orelse])

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._name(target, self._evaluate(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)
            self._name(node.target, self._evaluate(node.value))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self._name(node.target, self._evaluate(node.value))

    def visit_Return(self, node: ast.Return) -> None:
        if node.value:
            self.visit(node.value)
            self.returned += self._evaluate(node.value)

    def visit_For(self, node: ast.For) -> None:
        self._name(node.target, flat(items_of_all(self._evaluate(node.iter))))
        self.generic_visit(node)

    def visit_ListComp(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp) -> None:
        for loop in node.generators:
            self._name(loop.target, flat(items_of_all(self._evaluate(loop.iter))))
        self.generic_visit(node)

    visit_GeneratorExp = visit_SetComp = visit_DictComp = visit_ListComp  # noqa: N815  # named by ast

    def _note(self, node: ast.expr) -> None:
        self.reading.found.update(dict.fromkeys(self._weights_of(node)))

    def _branch(self, test: ast.expr, body: Iterable[ast.AST], orelse: Iterable[ast.AST]) -> None:
        self.visit(test)
        truth, before, ends = self._truth(test), self.local, list[dict[str, Values]]()
        for taken, nodes in ((truth is not False, body), (truth is not True, orelse)):
            if taken:
                self.local = dict(before)
                for node in nodes:
                    self.visit(node)
                ends.append(self.local)
        self.local = {
            name: unique(v for end in ends for v in end.get(name, ())) for end in ends for name in end
        }

    def _weights_of(self, node: ast.AST) -> list[nn.Module]:
        """The modules whose weight this is; none for anything else, and for the own weight."""
        of: ast.expr | None = None
        if isinstance(node, ast.Attribute) and node.attr == "weight":
            of = node.value
        elif isinstance(node, ast.Call) and _is_getattr(node) and "weight" in self._evaluate(node.args[1]):
            of = node.args[0]
        elif isinstance(node, ast.Subscript) and "weight" in self._evaluate(node.slice):
            held = node.value.func if isinstance(node.value, ast.Call) else node.value
            if isinstance(held, ast.Attribute) and held.attr in ("_parameters", "state_dict"):
                of = held.value
        values = self._evaluate(of) if of is not None else ()
        return [v for v in values if isinstance(v, nn.Module) and v is not self.reading.module]

    def _name(self, target: ast.expr, values: Values) -> None:
        if isinstance(target, ast.Name):
            self.local[target.id] = unique(values)
        elif isinstance(target, ast.Tuple | ast.List):
            whole = [items for items in map(items_of, values) if len(items) == len(target.elts)]
            for i, inner in enumerate(target.elts):
                self._name(inner, flat(items[i] for items in whole))

    def _evaluate(self, node: ast.AST) -> Values:
        evaluate = _EVALUATE.get(type(node))
        return evaluate(self, node) if evaluate else ()

    def _constant(self, node: ast.Constant) -> Values:
        return (node.value,) if isinstance(node.value, bool | int | float | str) else ()

    def _named(self, node: ast.Name) -> Values:
        return self.local.get(node.id, ())

    def _walrus(self, node: ast.NamedExpr) -> Values:
        return self._evaluate(node.value)

    def _either(self, node: ast.IfExp) -> Values:
        return unique((*self._evaluate(node.body), *self._evaluate(node.orelse)))

    def _any_of(self, node: ast.BoolOp) -> Values:
        return unique(v for value in node.values for v in self._evaluate(value))

    def _listed(self, node: ast.Tuple | ast.List | ast.Set) -> Values:
        return (Items(self._evaluate(item) for item in node.elts),)

    def _mapped(self, node: ast.Dict) -> Values:
        return (Items(map(self._evaluate, node.values)),)

    def _repeated(self, node: ast.ListComp | ast.GeneratorExp) -> Values:
        return (Items([self._evaluate(node.elt)]),)

    def _text(self, node: ast.JoinedStr) -> Values:
        """The pattern of the names that a text with blanks may be."""
        parts = (re.escape(str(p.value)) if isinstance(p, ast.Constant) else r"\w*" for p in node.values)
        return (re.compile("".join(parts)),)

    def _attributes(self, node: ast.Attribute) -> Values:
        return unique(v for of in self._evaluate(node.value) for v in self._attribute(of, node.attr))

    def _item(self, node: ast.Subscript) -> Values:
        values = self._evaluate(node.value)
        if isinstance(node.slice, ast.Slice):
            return tuple(self._slice(items_of(value), node.slice) for value in values)
        keys = self._evaluate(node.slice)
        return unique(v for value in values for v in at(value, keys))

    def _slice(self, items: list[Values], of: ast.Slice) -> Items:
        """Some items; each may be any of them where it is not known which."""
        ends = [self._evaluate(end) if end else (None,) for end in (of.lower, of.upper, of.step)]
        if all(len(end) == 1 and isinstance(end[0], int | None) for end in ends):
            return Items(items[slice(*(end[0] for end in ends))])
        return Items([flat(items)] * len(items))

    def _result(self, node: ast.Call) -> Values:
        args = [self._evaluate(argument) for argument in node.args]
        function = node.func
        if _is_getattr(node):
            return unique(v for of in args[0] for name in args[1] for v in self._attribute(of, name))
        if isinstance(function, ast.Name) and function.id in ("enumerate", "zip", *_LISTS) and args:
            lists = [items_of_all(values) for values in args]
            if function.id in _LISTS:
                return (Items(lists[0]),)
            lists = [[()] * len(lists[0]), *lists] if function.id == "enumerate" else lists
            return (Items((Items(pair),) for pair in zip(*lists, strict=False)),)
        held = None
        if isinstance(function, ast.Attribute):
            held = of_container(self._evaluate(function.value), function.attr, args)
        return self._followed(node, args) if held is None else held

    def _followed(self, node: ast.Call, args: Sequence[Values]) -> Values:
        """Follows a call that gets modules; what has none is read by itself."""
        named = {keyword.arg: self._evaluate(keyword.value) for keyword in node.keywords if keyword.arg}
        if not any(map(has_modules, (*args, *named.values()))):
            return ()
        callees: list[Any] = [*self._evaluate(node.func)]
        if not callees and isinstance(node.func, ast.Name):
            callees = [self.globals.get(node.func.id)]
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            library = self.globals.get(node.func.value.id)
            callees += [vars(library).get(node.func.attr)] if inspect.ismodule(library) else []
        out: list[Any] = []
        for callee in callees:
            on, function = callee if isinstance(callee, nn.Module) else None, unbound(callee)
            if isinstance(callee, Bound):
                function, on = callee
            elif on is not None:
                function = unbound(type(on).forward)
            if function is not None and not function.__module__.startswith("torch."):
                out += self.reading.call(function, on, args, named, self.depth + 1)
        return unique(out)

    def _attribute(self, of: Any, name: Any) -> Values:
        """An attribute, found without running code of a module; by a pattern, all modules of such names."""
        if not isinstance(of, nn.Module):
            if not isinstance(name, str) or isinstance(of, Items | Bound):
                return ()
            with suppress(Exception):  # of a configuration, whose code may do anything
                return (getattr(of, name),)
            return ()
        if isinstance(name, re.Pattern):
            return tuple(m for key, m in of._modules.items() if m is not None and name.fullmatch(key))
        for place in (of._modules, vars(of)) if isinstance(name, str) else ():
            if place.get(name) is not None:
                return (place[name],)
        value = inspect.getattr_static(type(of), name, None) if isinstance(name, str) else None
        if isinstance(value, property | cached_property):
            getter = value.fget if isinstance(value, property) else value.func
            return (
                self.reading.call(getter, of, depth=self.depth + 1)
                if isinstance(getter, FunctionType)
                else ()
            )
        if function := unbound(value):
            return (Bound(function, None if isinstance(value, staticmethod) else of),)
        return (value,) if isinstance(value, bool | int | float | str) else ()

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
            left, right = self._number(test.left), self._number(test.comparators[0])
            return compare(left, right) if compare and None not in (left, right) else None
        value = self._number(test)
        return None if value is None else bool(value)

    def _number(self, node: ast.expr) -> bool | float | None:
        """A number or a flag among the attributes of the module (``self.config.rescale_every``), or None."""
        is_training = isinstance(node, ast.Attribute) and node.attr == "training"
        is_known = isinstance(node, ast.Constant | ast.Attribute) and not is_training
        values = self._evaluate(node) if is_known else ()
        return values[0] if len(values) == 1 and isinstance(values[0], bool | int | float) else None


_EVALUATE: dict[type[ast.AST], Callable[[_Frame, Any], Values]] = {
    ast.Constant: _Frame._constant,
    ast.Name: _Frame._named,
    ast.NamedExpr: _Frame._walrus,
    ast.IfExp: _Frame._either,
    ast.BoolOp: _Frame._any_of,
    **dict.fromkeys((ast.Tuple, ast.List, ast.Set), _Frame._listed),
    ast.Dict: _Frame._mapped,
    **dict.fromkeys((ast.ListComp, ast.GeneratorExp), _Frame._repeated),
    ast.JoinedStr: _Frame._text,
    ast.Attribute: _Frame._attributes,
    ast.Subscript: _Frame._item,
    ast.Call: _Frame._result,
}


def _is_getattr(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1
