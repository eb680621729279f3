"""The configuration: our schema, which also reads the spellings of vLLM, vLLM-Omni and Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from quantport.config.vllm_keys import (
    OTHER_KEYS,
    explain,
    fp8_of_transformers,
    is_component_map,
    of_transformers,
    scheme_of,
    schemes_in,
)
from quantport.errors import ConfigError
from quantport.kvcache import cache_dtype
from quantport.model.patterns import compile_pattern
from quantport.scheme.catalog import BUILTIN, Schemes
from quantport.scheme.other_names import is_explained, unknown_scheme

# said once for all components
_WHOLE = {
    "fallback",
    "on_unmatched",
    "nonfinite",
    "cast",
    "kv_cache_dtype",
    "kv_cache_skip_layers",
}


class QuantConfig(BaseModel):
    """What to quantize, and how.

    Patterns (in ``ignore`` and ``targets``) are exact module names, globs (``*.mlp.*``), or ``re:`` and a
    regular expression that is matched from the start of the name, as in vLLM. For fused layers (``qkv_proj``,
    ``gate_up_proj``) a pattern may match the fused name or the unfused names; the unfused names must then
    agree. For experts it may match the layer, one expert (``*.experts.3``) or one projection
    (``*.experts.3.down_proj``).

    Attributes:
        scheme: Scheme of every layer; None lets the device choose.
        linear: Scheme of linear layers instead; an explicit null leaves them in 16 bits.
        moe: Scheme of MoE experts instead; an explicit null leaves them in 16 bits.
        ignore: Patterns of layers left in 16 bits. Also ``ignored_layers``.
        targets: Pattern -> scheme (or null) for single layers; they win over ``linear``, ``moe`` and
            ``scheme``.
        components: Component prefix -> configuration (or null), for models of several parts.
        fallback: What to do where the device cannot run a scheme: ``weight_only`` keeps the weights and runs
            the activations in 16 bits, ``reference`` emulates the scheme exactly, ``error`` refuses.
        on_unmatched: A pattern that matches nothing is an ``error``, or a ``warn``-ing.
        nonfinite: A weight with NaN or Inf is an ``error``, or they are read as ``zero``.
        cast: Patterns of what is held in the dtype of the model even where its values collapse in it (some
            become Inf, or all become one value), which is an error otherwise.
        activation_scheme: ``dynamic``; there is no calibration, so ``static`` is refused.
        weight_block_size: [128, 128] with ``fp8_per_block``; anything else is refused.
        group_size: 128 or 32 with ``int4_weight_only``, which ``int4`` means where a size is given.
        num_bf16_fallback_layers: This many first blocks (``blocks.0``, ``layers.0`` and so on) stay in 16
            bits. By default 5 for ``mxfp4_dualscale`` in models whose blocks are called ``blocks`` (diffusion
            transformers), as in vLLM-Omni; else 0.
        kv_cache_dtype: ``fp8`` (``fp8_e4m3``), ``fp8_e5m2``, ``int8`` or ``int4``; null or ``auto`` is 16
            bits.
        kv_cache_skip_layers: Layers whose KV cache stays in 16 bits; negative ones count from the last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: str | None = None
    linear: str | None = None
    moe: str | None = None
    ignore: tuple[str, ...] = ()
    targets: dict[str, str | None] = {}
    components: dict[str, QuantConfig | None] = {}
    fallback: Literal["weight_only", "error", "reference"] = "weight_only"
    on_unmatched: Literal["error", "warn"] = "error"
    nonfinite: Literal["error", "zero"] = "error"
    cast: tuple[str, ...] = ()
    activation_scheme: Literal["dynamic"] = "dynamic"
    weight_block_size: tuple[int, int] | None = None
    group_size: Literal[32, 128] | None = None
    num_bf16_fallback_layers: int | None = Field(None, ge=0, strict=True)
    kv_cache_dtype: str | None = None
    kv_cache_skip_layers: tuple[int, ...] = ()

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise explain(error, type(self).model_fields) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # components are validated without it

    @model_validator(mode="before")
    @classmethod
    def _spellings(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, Mapping):
            return data
        out: dict[str, Any] = {}
        for key, value in data.items():
            name = OTHER_KEYS.get(str(key), str(key))
            if name in out:
                raise ValueError(f"{key!r} and another spelling of {name!r} are both given")
            if name in ("linear", "moe"):
                out[name] = scheme_of(value, info.context or BUILTIN)
            else:
                out[name] = of_transformers(str(key), value)
        return fp8_of_transformers(out)

    @field_validator("components", mode="before")
    @classmethod
    def _component_values(cls, value: Any) -> Any:
        return (
            {k: {"scheme": v} if isinstance(v, str) else v for k, v in value.items()}
            if isinstance(value, Mapping)
            else value
        )

    @field_validator("ignore", "targets", "cast")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        for pattern in value:
            compile_pattern(pattern)
        return value

    @field_validator("kv_cache_dtype")
    @classmethod
    def _kv_cache(cls, value: str | None) -> str | None:
        return value and cache_dtype(value).name

    @model_validator(mode="after")
    def _consistent(self) -> QuantConfig:
        beside = [k for k in ("linear", "moe") if k in self.model_fields_set] + [
            k for k in ("ignore", "targets", "num_bf16_fallback_layers") if getattr(self, k)
        ]
        if self.components and beside:
            raise ValueError(f"{', '.join(beside)} beside components: put it into each component")
        inner = {k for c in self.components.values() if c for k in c.model_fields_set & _WHOLE}
        if inner:
            raise ValueError(
                f"{', '.join(sorted(inner))} inside a component: it holds for the whole model, put "
                "it beside components"
            )
        if self.kv_cache_skip_layers and cache_dtype(self.kv_cache_dtype).quant is None:
            raise ValueError(
                "kv_cache_skip_layers without a kv_cache_dtype: every layer stays in 16 bits already"
            )
        both = set(self.ignore) & set(self.targets)
        if both:
            raise ValueError(f"{sorted(both)[0]!r} is in ignore and in targets: keep one")
        if self.weight_block_size not in (None, (128, 128)):
            raise ValueError(
                f"weight_block_size {list(self.weight_block_size or ())}: only [128, 128], with fp8_per_block"
            )
        return self

    @classmethod
    def parse(cls, value: Any, schemes: Schemes) -> QuantConfig:
        """Reads a configuration.

        Args:
            value: None, a scheme name, a mapping (ours, vLLM's, or per component as vLLM-Omni's), or a
                QuantConfig.
            schemes: Known schemes.

        Raises:
            ConfigError: unknown key, scheme or value; conflicting values; a bad regular expression.
        """
        if value is None or isinstance(value, str):
            value = {"scheme": value}
        if isinstance(value, Mapping) and is_component_map(value, cls.model_fields):
            value = {"components": dict(value)}
        try:
            config = value if isinstance(value, QuantConfig) else cls.model_validate(value, context=schemes)
        except ValidationError as error:
            # a method of others has keys of its own: what it is here says more than the first of them
            named = (name for name in schemes_in(value) if name not in schemes and is_explained(name))
            other = next(named, None)
            if other is not None:
                raise unknown_scheme(other, schemes, ()) from None
            raise explain(error, cls.model_fields) from None
        return config._checked(schemes)

    def _checked(self, schemes: Schemes) -> QuantConfig:
        """Resolves aliases and group sizes to canonical scheme names."""

        def name(value: str | None) -> str | None:
            if value in (None, "none"):
                return None
            base, *options = str(value).split(":")
            if self.group_size and base.lower() == "int4":  # symmetric, as others mean it who give a size
                value = ":".join(("int4_weight_only", *options))
            scheme = schemes[str(value)]
            if (
                not self.group_size
                or scheme.weight.group_size == self.group_size
                or scheme.weight.format != "int4"
            ):
                return scheme.name
            if scheme.name.split(":")[0] == "int4_weight_only":
                return scheme.name.replace("int4_weight_only", "int4_weight_only_g32", 1)
            what = f"this scheme has groups of {scheme.weight.group_size}"
            raise ConfigError(
                f"{value!r} with group_size={self.group_size}",
                what,
                "scheme='int4_weight_only', or no group_size",
            )

        updates: dict[str, Any] = {
            f: name(getattr(self, f)) for f in ("scheme", "linear", "moe") if f in self.model_fields_set
        }
        updates["targets"] = {p: name(s) for p, s in self.targets.items()}
        updates["components"] = {
            c: None if v is None else v._checked(schemes) for c, v in self.components.items()
        }
        used = {
            s
            for s in (
                updates.get("scheme"),
                updates.get("linear"),
                updates.get("moe"),
                *updates["targets"].values(),
            )
            if s
        }
        named = ", ".join(sorted(used)) or "no scheme"
        if self.weight_block_size and "fp8_per_block" not in used:
            raise ConfigError(
                f"weight_block_size with {named}", "only fp8_per_block has blocks", "scheme='fp8_per_block'"
            )
        if self.group_size and not any(s.startswith("int4") for s in used):
            raise ConfigError(f"group_size with {named}", "only int4 has groups", "scheme='int4_weight_only'")
        return self.model_copy(update=updates)

    def patterns(self) -> tuple[str, ...]:
        """Every pattern, those of the components included."""
        own = (*self.ignore, *self.targets, *self.cast)
        return own + tuple(p for c in self.components.values() if c for p in c.patterns())


QuantConfig.model_rebuild()
