"""Keeps the saving of others away from quantized models: it would write codes where weights are expected.

Transformers takes int8 and FP8 codes that it finds under ``weight`` for weights, and draws at random what it
does not find, with a line in the log.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from quantport.checkpoint.quantport_format import MARK
from quantport.errors import SaveError
from quantport.modules import QuantModule

METHODS = ("save_pretrained", "push_to_hub")


class RefusedSave:
    """What a quantized model has instead of a method that saves: adapters pass, everything else is refused.

    Args:
        model: The model.
        method: Name of the method.
    """

    def __init__(self, model: nn.Module | None, method: str) -> None:
        # a cycle would keep the memory of a model that nobody holds any more
        self.model: Callable[[], nn.Module | None] = (lambda: None) if model is None else weakref.ref(model)
        self.method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Saves the adapter of Transformers' own integration of PEFT, which holds no weight of the model.

        Raises:
            SaveError: there is none.
        """
        model = self.model()
        if getattr(model, "_hf_peft_config_loaded", False):
            return getattr(type(model), self.method)(model, *args, **kwargs)
        raise SaveError(
            f"{self.method} of a quantized model",
            "it writes codes as if they were weights: from_pretrained would compute something else",
            "quantport.save(model, directory), and quantport.load; adapters: PeftModel.save_pretrained",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> RefusedSave:  # of the copy of the model
        return RefusedSave(memo.get(id(self.model())), self.method)

    def __reduce__(self) -> tuple[type[RefusedSave], tuple[None, str]]:
        return RefusedSave, (None, self.method)


def refuse_stock_save(model: nn.Module) -> None:
    """Replaces what saves a model, and each of its parts that holds quantized layers; and marks their
    configurations, which a model around it may write.
    """
    for module in model.modules():
        saves = [method for method in METHODS if callable(getattr(module, method, None))]
        adapters_only = hasattr(module, "get_base_model")  # PeftModel
        if adapters_only or not saves or not any(isinstance(m, QuantModule) for m in module.modules()):
            continue
        for method in saves:
            setattr(module, method, RefusedSave(module, method))
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            config.quantization_config = dict(MARK)
