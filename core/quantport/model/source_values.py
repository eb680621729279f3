"""What an expression of a source may be: modules, and the lists and dictionaries that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

Values = tuple[Any, ...]
"""What an expression may be, as far as the source says; empty where it does not."""


class Items(tuple[Values, ...]):
    """A list that the source makes: what each of its items may be."""

    __slots__ = ()


def unique(values: Iterable[Any]) -> Values:
    """Each object once."""
    return tuple({id(value): value for value in values}.values())


def flat(values: Iterable[Values]) -> Values:
    """All of several."""
    return unique(value for some in values for value in some)


def items_of_all(values: Values) -> list[Values]:
    """What going over something gives, whichever of these it is."""
    return [item for value in values for item in items_of(value)]


def items_of(value: Any) -> list[Values]:
    """What going over something gives."""
    if isinstance(value, Items):
        return list(value)
    if isinstance(value, nn.ModuleList | nn.Sequential):
        return [(child,) for child in value.children()]
    if isinstance(value, nn.ModuleDict | dict | list | tuple | str):
        return [(item,) for item in (value.keys() if isinstance(value, nn.ModuleDict) else value)]
    return []


def pairs(value: Any) -> list[tuple[Values, Values]]:
    """Keys and values of a container."""
    if isinstance(value, nn.Module):
        return [((name,), (child,)) for name, child in value.named_children()]
    if isinstance(value, dict):
        return [((key,), (item,)) for key, item in value.items()]
    return [((), item) for item in items_of(value)]


def at(value: Any, keys: Values) -> Iterator[Any]:
    """Items of a container: those at known keys, or all."""
    is_named = isinstance(value, nn.ModuleDict | dict)
    key = keys[0] if len(keys) == 1 else None
    if is_named and isinstance(key, str):
        yield from (item for name, found in pairs(value) if name == (key,) for item in found)
    elif not is_named and isinstance(key, int):
        items = items_of(value)
        yield from items[key] if -len(items) <= key < len(items) else ()
    else:
        yield from (item for _, found in pairs(value) for item in found)


def of_container(values: Values, method: str, args: Sequence[Values]) -> Values | None:
    """What a method of modules or containers gives; None of any other."""
    if method in ("values", "children"):
        return (Items(item for value in values for _, item in pairs(value)),)
    if method in ("items", "named_children"):
        return (Items((Items(pair),) for value in values for pair in pairs(value)),)
    if method == "get_submodule" and args:
        inner = (both for value in values if isinstance(value, nn.Module) for both in value.named_modules())
        return unique(module for path, module in inner if path in args[0])
    return None


def has_modules(values: Values) -> bool:
    """Whether there is a module among them, or in a list among them."""
    return any(isinstance(v, nn.Module) or (isinstance(v, Items) and has_modules(flat(v))) for v in values)
