"""How large a checkpoint may claim to be: far above every model there is, and small enough that reading the
claim takes bounded time and memory. Applied where names, shapes and JSON come in, before anything is made of
them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from quantport.errors import CheckpointError
from quantport.model.layers import TensorLike

MAX_TENSORS = 500_000
MAX_EXPERTS = 16_384  # of one layer
MAX_LAYERS = 10_000
MAX_LABELS = 1_000_000  # of a classifier: Transformers makes a name for each
MAX_POSITIONS = 2**26  # tokens of context: models make tables with a row for each
MAX_FILES = 20_000  # that an index names
MAX_DIGITS = 9  # of a number in the name of a tensor
MAX_NAME = 1000  # characters of the name of a tensor
MAX_NUMBER = 2**64  # a whole number of config.json
MAX_JSON_BYTES = 48_000_000  # config.json, the index, quantport.json
MAX_CONFIG_VALUES = 250_000  # of config.json, which Transformers walks through several times
MAX_HEADER_BYTES = 100_000_000  # as the safetensors library
MAX_JSON_DEPTH = 64
MAX_JSON_VALUES = 8 * MAX_TENSORS
_CONTAINERS = 3 * MAX_TENSORS + 1000  # a tensor in a header is an object and two lists
_LONG_NUMBER = re.compile(rf"\d{{{MAX_DIGITS + 1},}}")
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)(?=\.|$)")
_FUSED_EXPERTS = re.compile(r"(?:^|\.)experts(?=\.|$)")
# counts of modules; of lists, each number: ``depths`` of Swin, ``attention_types`` of GPT-Neo
_LAYERS = re.compile(
    r"(?:^|_)(?:layers?|blocks?|depths?|stages?|repeats?|hidden_groups|group_num|attention_types)$"
)

_POSITIONS = re.compile(r"(?:^|_)(?:n_ctx|positions?|position_embeddings|seq_len|(?:seq|sequence)_length)$")


def within(asked: str, what: str, value: float, limit: int) -> None:
    """Refuses what is beyond a limit.

    Raises:
        CheckpointError: names the value and the limit.
    """
    if value > limit:
        count = f"{value:,}" if isinstance(value, int) and value < 10**18 else f"more than {limit:,}"
        raise CheckpointError(asked, f"{count} {what}", f"at most {limit:,} {what}")


def check_tensors(tensors: Mapping[str, TensorLike], asked: str) -> None:
    """Checks the names and shapes of a checkpoint before layers are made of them.

    Raises:
        CheckpointError: too many tensors or experts, or a number without end in a name.
    """
    within(asked, "tensors", len(tensors), MAX_TENSORS)
    stacked = 0
    for name, tensor in tensors.items():
        if len(name) > MAX_NAME:
            within(asked, f"characters in the name {name[:60]!r}...", len(name), MAX_NAME)
        for number in _LONG_NUMBER.findall(name):
            if f".{number}." in f".{name}.":  # a module's number, no hash
                within(asked, f"digits in a number of the name {name[:60]!r}", len(number), MAX_DIGITS)
        if "experts" not in name:
            continue
        expert = _EXPERT.search(name)
        if expert is not None:
            within(asked, f"experts in a layer (tensor {name!r})", int(expert[1]) + 1, MAX_EXPERTS)
        elif len(tensor.shape) == 3 and _FUSED_EXPERTS.search(name):
            within(asked, f"experts in a layer (tensor {name!r})", tensor.shape[0], MAX_EXPERTS)
            stacked += tensor.shape[0]
    within(asked, "experts", stacked, MAX_TENSORS)


def check_config(config: Mapping[str, Any], asked: str) -> None:
    """Checks the numbers in a ``config.json`` and its parts, closely those that modules are made by.

    Raises:
        CheckpointError: names the key.
    """
    for key, value in _items(config):
        if not isinstance(value, int | float):
            continue
        if isinstance(value, int):
            within(asked, f"as {key[:60]}", abs(value), MAX_NUMBER)
        if "experts" in key:
            within(asked, f"as {key}", value, MAX_EXPERTS)
        elif _LAYERS.search(key):
            within(asked, f"as {key}", value, MAX_LAYERS)
        elif key == "num_labels":
            within(asked, f"as {key}", value, MAX_LABELS)
        elif _POSITIONS.search(key):
            within(asked, f"as {key}", value, MAX_POSITIONS)


def check_json_text(raw: bytes, asked: str, values: int = MAX_JSON_VALUES) -> None:
    """Checks, before it is parsed, how many values JSON can hold.

    Raises:
        CheckpointError: too many.
    """
    within(asked, "objects and lists in JSON", raw.count(b"{") + raw.count(b"["), _CONTAINERS)
    within(asked, "values in JSON", raw.count(b","), values)


def check_json_depth(value: object, asked: str) -> None:
    """Checks how deep parsed JSON is nested.

    Raises:
        CheckpointError: too deep.
    """
    level, depth = [value], 0
    while level:
        within(asked, "levels of JSON", depth, MAX_JSON_DEPTH)
        inner = (x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list))
        level, depth = [x for values in inner for x in values if type(x) in (dict, list)], depth + 1


def _items(value: object, under: str = "") -> Iterator[tuple[str, Any]]:
    """Every key and value of nested objects, what is in a list under the key of that; the nesting is bounded
    by `check_json_depth`.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _items(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _items(inner, under)
    else:
        yield under, value
