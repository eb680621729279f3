"""Writes ``docs/architectures.md``: what of each architecture is quantized, and what stays.

Each class of the installed Transformers that the sweep loads (``tests/core/test_model_classes.py``) is built on
meta with the sizes of its default configuration, mostly those of a published model, and planned. Needs
``PYTHONPATH=tests/core``, as ``ci/docs`` sets it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from core_tiny import tiny_config
from test_model_classes import CLASSES, REFUSED

import quantport
from quantport.engine import Plan
from quantport.loading.build_context import building

ROOT = Path(__file__).resolve().parents[1]
SMALL = 0.005  # of the elements: less is not worth a word
# whose default configurations cannot be built: their parts do not fit together, or not without memory
TINY = {"DbrxForCausalLM", "DeepseekV3ForCausalLM", "HunYuanMoEV1ForCausalLM", "NemotronForCausalLM"}
HEAD = f"""\
# Architectures

What is quantized of each architecture where nobody names layers, as a share of the elements of all parameters, and what stays in 16 bits
and why, where that is more than {SMALL:.1%}. Written by `docs/architectures_page.py` from the plan of each class of Transformers
{transformers.__version__}, built without weights in the sizes of its default configuration, or tiny where that cannot be built. The same classes are loaded in tiny sizes:
`load` and `quantize_` give the same bits, and the forward is that of the weights that the codes stand for
([test](../tests/core/test_model_classes.py)); so does [`from_pretrained`](../tests/plugins/transformers/test_architectures.py).

| class | parameters | quantized | linear layers | experts | stays, and why |
|---|---|---|---|---|---|
"""


def row(name: str, own: dict[str, Any]) -> str:
    """The row of a class."""
    kind = getattr(transformers, name)
    config = tiny_config(kind.config_class, own) if name in TINY else kind.config_class()
    with building():
        model = kind._from_config(config)
    decided = quantport.plan(model, "int8", device="cpu:generic")
    steps = [s for s in decided.steps if s.layer.loaded]
    total = sum(s.layer.elements for s in steps)
    done = [s for s in steps if s.requested_scheme]
    experts = sum(s.layer.elements for s in done if s.layer.experts)
    linear = sum(s.layer.elements for s in done) - experts
    sizes = "tiny" if name in TINY else size(total)
    cells = (name, sizes, share(linear + experts, total), share(linear, total), share(experts, total))
    return "| " + " | ".join((f"`{cells[0]}`", *cells[1:], "; ".join(kept(decided, total)) or "-")) + " |"


def kept(decided: Plan, total: int) -> Iterable[str]:
    """What stays, by its reason, the largest first."""
    sizes: dict[str, int] = {}
    for step in decided.steps:
        if step.layer.loaded and not step.requested_scheme:
            reason = str(step.skip_reason or step.note)
            sizes[reason] = sizes.get(reason, 0) + step.layer.elements
    for reason, elements in sorted(sizes.items(), key=lambda item: -item[1]):
        if elements > SMALL * total:
            yield f"{share(elements, total)} {reason}"


def size(elements: int) -> str:
    """Billions or millions of elements."""
    return f"{elements / 1e9:.1f} B" if elements >= 1e9 else f"{elements / 1e6:.0f} M"


def share(elements: int, total: int) -> str:
    """Percent."""
    return f"{100 * elements / total:.0f}%" if elements else "-"


def page() -> str:
    """The page."""
    warnings.simplefilter("ignore")
    refused = ", ".join(f"`{name}` ({word})" for name, (_, word) in sorted(REFUSED.items()))
    rows = "\n".join(row(name, own) for name, own in CLASSES.items())
    return f"{HEAD}{rows}\n\nRefused, by the name of what cannot be quantized or loaded: {refused}.\n"


if __name__ == "__main__":
    (ROOT / "docs" / "architectures.md").write_text(page(), encoding="utf-8")
