"""Keeps the saving of others away from quantized modules: it would write codes where weights are expected.

Transformers takes int8 and FP8 codes that it finds under ``weight`` for weights, and draws at random what it
does not find, with a line in the log. A quantized module does not know the models that it is a part of, or
will be, or of which a copy is; so the classes that save themselves look whether they hold one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from quantport.errors import SaveError

METHODS = ("save_pretrained", "push_to_hub")
# where each is defined: without an import of that nothing is an instance of it
_SAVERS = (
    ("transformers.modeling_utils", "PreTrainedModel"),
    ("diffusers.models.modeling_utils", "ModelMixin"),
    ("huggingface_hub.hub_mixin", "ModelHubMixin"),
)
_GUARDED: set[type] = set()


def refuse_stock_save(kind: type[nn.Module]) -> None:
    """Lets the classes of others that save themselves refuse to, where they hold a module of ``kind``.
    Adapters, which hold no weight of the model, pass.
    """
    for module, name in _SAVERS:
        saver = getattr(sys.modules.get(module), name, None)
        if saver is None or saver in _GUARDED:
            continue
        _GUARDED.add(saver)
        for method in METHODS:
            setattr(saver, method, _guarded(getattr(saver, method), method, kind))


def _guarded(save: Callable[..., Any], method: str, kind: type[nn.Module]) -> Callable[..., Any]:
    @wraps(save)
    def save_or_refuse(model: Any, *args: Any, **kwargs: Any) -> Any:
        quantized = isinstance(model, nn.Module) and any(isinstance(m, kind) for m in model.modules())
        # of an integration, which loaded the model and writes it
        writer = getattr(getattr(model, "hf_quantizer", None), "save_pretrained", None)
        if quantized and not getattr(model, "_hf_peft_config_loaded", False):
            if writer is not None:
                return (
                    writer(model, *args, **kwargs) if method == METHODS[0] else save(model, *args, **kwargs)
                )
            raise SaveError(
                f"{method} of a quantized model",
                "it writes codes as if they were weights: from_pretrained would compute something else",
                "quantport.save(model, directory), and quantport.load; adapters: PeftModel.save_pretrained",
            )
        return save(model, *args, **kwargs)

    return save_or_refuse
