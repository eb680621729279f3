"""Pipelines: a scheme for each component that is a model, and none for the others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.quantizers import PipelineQuantizationConfig
from torch import nn

from quantport.engine import METHOD, ConfigError, Plan
from quantport_diffusers.config import QuantportConfig

DENOISERS = ("transformer", "transformer_2", "unet")
Asked = str | Mapping[str, Any] | QuantportConfig | None


class PipelineConfig(PipelineQuantizationConfig):  # type: ignore[misc]  # diffusers is not typed here
    """Schemes by component, for ``DiffusionPipeline.from_pretrained(path, quantization_config=...)``.

    Args:
        components: Name of a component -> a scheme, the keys of `QuantportConfig`, or None to leave it. The
            scheme may be called ``method``, as vLLM-Omni does: ``{"transformer": {"method": "fp8"}, "vae":
            None}``. Models of Transformers need ``quantport_transformers``, which must be imported too.

    Raises:
        ConfigError: an unknown key, scheme or value; nothing to quantize.
    """

    def __init__(self, components: Mapping[str, Asked]) -> None:
        mapping = {name: _config(name, asked) for name, asked in components.items() if asked is not None}
        if not mapping:
            raise ConfigError(
                "quantize a pipeline", "no component with a scheme", "such as {'transformer': 'fp8'}"
            )
        super().__init__(quant_mapping=mapping)

    def _resolve_quant_config(self, is_diffusers: bool = True, module_name: str | None = None) -> Any:
        config = super()._resolve_quant_config(is_diffusers, module_name)
        return config if config is None or is_diffusers else _of_transformers(str(module_name), config)


def load_pipeline(
    path: str | os.PathLike[str], components: Asked | Mapping[str, Asked], **options: Any
) -> Any:
    """Loads a pipeline whose models are quantized while they are read.

    Args:
        path: Directory with ``model_index.json``, or a model id of the hub.
        components: As of `PipelineConfig`; a scheme by itself is for what denoises (`DENOISERS`).
        options: As of ``DiffusionPipeline.from_pretrained``, such as ``dtype``.

    Returns:
        The pipeline; `plans` says what each component has become.

    Raises:
        ConfigError: the pipeline has no such component, or it is no model.
        QuantportError: as ``quantport.load``.
    """
    known = {
        name: kind
        for name, kind in DiffusionPipeline.load_config(str(path)).items()
        if isinstance(kind, list | tuple) and len(kind) == 2
    }
    if components is None or isinstance(components, str | QuantportConfig):
        components = {name: components for name in DENOISERS if known.get(name, (None,))[0]}
    for name in components:
        if not known.get(name, (None,))[0]:
            models = ", ".join(sorted(known)) or "none"
            raise ConfigError(f"quantize the component {name!r} of {path}", "it has none", f"one of {models}")
    pipe = DiffusionPipeline.from_pretrained(
        str(path), quantization_config=PipelineConfig(components), **options
    )
    for name, asked in components.items():
        if asked is not None and not isinstance(getattr(pipe, name), nn.Module):
            found = f"it is a {type(getattr(pipe, name)).__name__}, no model"
            raise ConfigError(f"quantize the component {name!r} of {path}", found, "a component with weights")
    return pipe


def plans(pipe: Any) -> dict[str, Plan]:
    """The plan of each component that is quantized, by its name."""
    decided = {name: getattr(part, "quantport_plan", None) for name, part in pipe.components.items()}
    return {name: plan for name, plan in decided.items() if isinstance(plan, Plan)}


def _config(name: str, asked: Asked) -> QuantportConfig:
    if isinstance(asked, QuantportConfig):
        return asked
    if isinstance(asked, str):
        return QuantportConfig(asked)
    if not isinstance(asked, Mapping):
        found = f"a {type(asked).__name__}"
        raise ConfigError(
            f"quantize the component {name!r}", found, "a scheme, keys of QuantportConfig, or None"
        )
    keys = {"scheme" if key == "method" else key: value for key, value in asked.items()}
    if len(keys) < len(asked):
        found = "both method and scheme"
        raise ConfigError(f"quantize the component {name!r}", found, "one of them: they mean the same")
    return QuantportConfig(**keys)


def _of_transformers(name: str, config: QuantportConfig) -> Any:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING  # only where a pipeline has one

    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(METHOD)
    if kind is None:
        raise ConfigError(
            f"quantize the component {name!r}",
            "a model of Transformers, which does not know quantport yet",
            "import quantport_transformers",
        )
    return kind(**config.to_dict())
