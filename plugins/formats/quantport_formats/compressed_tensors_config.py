"""What ``quantization_config`` of compressed-tensors says of each layer.

Source: compressed-tensors 0.20: ``quantization/quant_config.py``, ``quant_scheme.py``, ``quant_args.py``, and
``utils/match.py`` for the order in which targets are taken: names, expressions, classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantport.errors import CheckpointError, ConfigError
from quantport.model.patterns import compile_pattern

FORMATS = (
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group", "token", "attn_head")
_MANY = 1000  # groups, or targets of one


@dataclass(frozen=True)
class Args:
    """How one operand is quantized (``QuantizationArgs``).

    Attributes:
        bits: Bits of a code.
        kind: ``int`` or ``float``.
        strategy: What shares a scale.
        group: Columns that share one; 0 where the strategy has no groups.
        block: Rows and columns that share one; ``(0, 0)`` where the strategy has no blocks.
        symmetric: Whether there are no zero points.
        static: Whether scales of activations are stored.
        exponents: Whether scales are stored as exponents.
    """

    bits: int
    kind: str
    strategy: str
    group: int
    block: tuple[int, int]
    symmetric: bool
    static: bool
    exponents: bool


@dataclass(frozen=True)
class Group:
    """Layers that are quantized alike (``QuantizationScheme``).

    Attributes:
        name: Key of ``config_groups``.
        targets: Names, expressions after ``re:``, or classes.
        weights: How weights are quantized.
        inputs: How their inputs are; None where they stay.
        outputs: Whether their outputs are.
    """

    name: str
    targets: tuple[str, ...]
    weights: Args
    inputs: Args | None
    outputs: bool


class Groups:
    """The groups of a checkpoint.

    Args:
        entry: ``quantization_config``.
        asked: What is being done, for errors.

    Raises:
        CheckpointError: it is malformed, or asks for what is not read here.
    """

    def __init__(self, entry: Mapping[str, Any], asked: str) -> None:
        self._asked = asked
        self._check(entry)
        groups = entry.get("config_groups")
        if not isinstance(groups, Mapping) or not 0 < len(groups) <= _MANY:
            raise self.wrong(f"config_groups {_short(groups)}", "config_groups as the library writes them")
        read = [self._group(str(name), group, entry) for name, group in groups.items()]
        self.groups = [group for group in read if group is not None]
        self.cache = self._args(entry.get("kv_cache_scheme"), "kv_cache_scheme")
        self._by_target: dict[str, Group] = {}
        for group in self.groups:
            for target in group.targets:
                self._by_target.setdefault(target, group)
        self._expressions = sorted(target for target in self._by_target if target.startswith("re:"))

    def of(self, module: str, embedding: bool) -> Group:
        """The group of a module whose weight is stored as codes; called within `bounded`.

        Raises:
            CheckpointError: no group, or several that differ, may be meant.
        """
        try:
            found = [e for e in self._expressions if compile_pattern(e).match(module)]
        except ConfigError as error:
            raise self.wrong(f"{error.asked}: {error.found}", f"targets with {error.suggestion}") from None
        for target in (module, *found, "Embedding" if embedding else "Linear"):
            if target in self._by_target:
                return self._by_target[target]
        # names differ where a model was saved as a part of another, and classes where it was fused
        if len({(group.weights, group.inputs) for group in self.groups}) == 1:
            return self.groups[0]
        raise self.wrong(
            f"{module} is stored as codes, and none of {len(self.groups)} groups has it as a target",
            "config_groups that name every quantized layer",
        )

    def wrong(self, found: str, suggestion: str) -> CheckpointError:
        """The error of a configuration."""
        return CheckpointError(self._asked, found, suggestion)

    def _check(self, entry: Mapping[str, Any]) -> None:
        sparse, transforms = entry.get("sparsity_config"), entry.get("transform_config")
        pruned = sparse.get("format") if isinstance(sparse, Mapping) else sparse
        if pruned not in (None, "dense"):
            raise self.wrong(f"sparsity_config of format {_short(pruned)}", "a checkpoint that is not sparse")
        moved = transforms.get("config_groups") if isinstance(transforms, Mapping) else transforms
        if moved:
            raise self.wrong(
                "transform_config: its layers rotate what they multiply", "a checkpoint without transforms"
            )
        self._format(entry.get("format"))

    def _format(self, name: Any) -> None:
        if name is not None and name not in FORMATS:
            raise self.wrong(f"format {_short(name)}", f"one of {', '.join(FORMATS)}")

    def _group(self, name: str, entry: Any, whole: Mapping[str, Any]) -> Group | None:
        if not isinstance(entry, Mapping):
            raise self.wrong(f"config_groups.{name} {_short(entry)}", "an object with targets and weights")
        self._format(entry.get("format"))
        targets = entry.get("targets")
        if not (isinstance(targets, list) and 0 < len(targets) <= _MANY and all(map(_is_text, targets))):
            raise self.wrong(f"config_groups.{name}.targets {_short(targets)}", "a list of names")
        weights = self._args(entry.get("weights"), f"config_groups.{name}.weights")
        inputs = self._args(entry.get("input_activations"), f"config_groups.{name}.input_activations")
        if weights is None:  # of attention, say
            return None
        return Group(name, tuple(targets), weights, inputs, bool(entry.get("output_activations")))

    def _args(self, entry: Any, name: str) -> Args | None:
        if entry is None:
            return None
        if not isinstance(entry, Mapping):
            raise self.wrong(f"{name} {_short(entry)}", "an object, or null")
        bits, kind, group = entry.get("num_bits", 8), entry.get("type", "int"), entry.get("group_size")
        size = 0 if group in (None, -1) else group
        blocks = _blocks(entry.get("block_structure"))
        named = entry.get("strategy")
        named = named.lower() if isinstance(named, str) else named
        strategy = named or ("group" if size else "channel" if group == -1 else "tensor")
        known = kind in ("int", "float") and strategy in _STRATEGIES
        if not (known and _whole(bits, 1, 16) and _whole(size, 0, 9999)):
            raise self.wrong(
                f"{name}: num_bits {_short(bits)}, type {_short(kind)}, strategy {_short(strategy)}, "
                f"group_size {_short(group)}",
                f"int or float, strategy {', '.join(_STRATEGIES)}, groups of 1 to 9999",
            )
        if (strategy in ("group", "tensor_group")) != (size > 0) or (strategy == "block") != (blocks[0] > 0):
            structure = _short(entry.get("block_structure"))
            raise self.wrong(
                f"{name}: strategy {strategy} with group_size {size}, block_structure {structure}",
                "a size for groups, a structure for blocks, and neither for others",
            )
        exponents = "uint8" in str(entry.get("scale_dtype")) or "e8m0" in str(entry.get("scale_dtype"))
        symmetric, dynamic = entry.get("symmetric", True), entry.get("dynamic", False)
        return Args(bits, kind, strategy, size, blocks, bool(symmetric), dynamic is not True, exponents)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _blocks(structure: Any) -> tuple[int, int]:
    """Rows and columns, as a list or as ``128x128``; none where it is malformed."""
    if isinstance(structure, str):
        structure = [int(size) if size.isdecimal() and len(size) < 5 else 0 for size in structure.split("x")]
    if isinstance(structure, list) and len(structure) == 2 and all(_whole(s, 1, 9999) for s in structure):
        return structure[0], structure[1]
    return 0, 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."
