"""Names that others use, and what is nearest to them here. Errors read this; nothing is quantized by it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from quantport.errors import ConfigError, did_you_mean

_CALIBRATED = "which finds its codes with calibration data, in a checkpoint made before"
_LIBRARY = "a library, whose configuration names the numbers elsewhere"

EXPLAINED: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "awq": (f"a method {_CALIBRATED}", ("int4_mse", "int4_weight_only")),
        "gptq": (f"a method {_CALIBRATED}", ("int4_mse", "int4_weight_only")),
        "auto-round": (f"a method {_CALIBRATED}", ("int4_mse", "mxfp4", "nvfp4")),
        "inc": (f"a tool for methods {_CALIBRATED}", ("int4_mse", "mxfp4", "nvfp4")),
        "aqlm": (f"a method {_CALIBRATED}", ("nf4", "int4_mse")),
        "quip": (f"a method {_CALIBRATED}", ("int4_weight_only:hadamard", "nf4")),
        "svdquant": (f"a method {_CALIBRATED}", ("nvfp4", "int4_w4a8")),
        "gguf": ("a file format with several schemes in it", ("q4_k", "q5_k", "q6_k", "q8_0", "q4_0")),
        "bitsandbytes": (
            f"{_LIBRARY}: load_in_4bit is nf4 or fp4, load_in_8bit is near int8",
            ("nf4", "nf4:double", "fp4", "int8"),
        ),
        "modelopt": (f"{_LIBRARY} (quant_algo)", ("fp8_per_tensor", "nvfp4", "mxfp8", "int4_weight_only")),
        "quark": (f"{_LIBRARY} (global_quant_config)", ("fp8_per_tensor", "mxfp4", "int8")),
        "torchao": (f"{_LIBRARY} (quant_type)", ("int8", "int8_weight_only", "fp8_per_channel", "int4_hqq")),
        "compressed-tensors": (
            f"{_LIBRARY} (config_groups)",
            ("fp8_per_channel", "int8", "int4_weight_only", "nvfp4"),
        ),
        "quanto": (f"{_LIBRARY} (weights)", ("int8_weight_only", "int4_mse", "fp8_weight_only")),
        "fbgemm_fp8": ("FP8 weights per output channel, activations per token", ("fp8_per_channel",)),
        "eetq": ("INT8 weights, 16-bit activations", ("int8_weight_only",)),
        "bitnet": ("a model that was trained with ternary weights", ("int4_weight_only",)),
    }
)
"""Name of a method or library, in lower case -> what it is, and the schemes to use now, the nearest first."""

_FAMILIES = {
    "awq_marlin": "awq",
    "gptq_marlin": "gptq",
    "auto_awq": "awq",
    "autoawq": "awq",
    "auto_gptq": "gptq",
    "autoround": "auto-round",
    "auto_round": "auto-round",
    "intel-neural-compressor": "inc",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "bnb": "bitsandbytes",
    "modelopt_fp4": "modelopt",
    "modelopt_fp8": "modelopt",
    "modelopt_mxfp8": "modelopt",
    "compressed_tensors": "compressed-tensors",
    "llm-compressor": "compressed-tensors",
}

MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "fp8_e4m3",
                "fp8_e4m3fn",
                "float8",
                "float8_e4m3",
                "float8_e4m3fn",
                "e4m3",
                "e4m3fn",
                "w8a8_fp8",
            ),
            "fp8",
        ),
        **dict.fromkeys(("fp8_e5m2", "float8_e5m2", "e5m2", "fp8_e4m3fnuz"), "fp8"),
        **dict.fromkeys(("fp8_w8a16", "w8a16_fp8", "fp8_marlin", "fp8wo", "float8_weight_only"), "fp8_wo"),
        **dict.fromkeys(
            ("fine_grained_fp8", "blockwise_fp8", "fp8_blockwise", "deepseek_fp8"), "fp8_per_block"
        ),
        **dict.fromkeys(("8bit", "8-bit", "int8_dynamic_activation_int8_weight", "smoothquant"), "int8"),
        **dict.fromkeys(("llm.int8", "llm_int8", "load_in_8bit", "w8a8_int8"), "int8"),
        **dict.fromkeys(("experts_int8", "int8wo", "w8"), "int8_wo"),
        **dict.fromkeys(("4bit", "4-bit", "int4wo", "uint4", "w4", "marlin"), "int4"),
        **dict.fromkeys(("load_in_4bit", "bnb_4bit", "normalfloat4", "qlora"), "nf4"),
        **dict.fromkeys(("w4a4", "fp4_e2m1", "e2m1", "float4", "w4a4_nvfp4", "nvfp4_w4a4"), "nvfp4"),
        **dict.fromkeys(("mxfp4_w4a16", "mxfp4a16", "gpt_oss_mxfp4"), "mxfp4_wo"),
        **dict.fromkeys(("mx_fp8", "mx-fp8"), "mxfp8"),
        **dict.fromkeys(("mx_fp4", "mx-fp4", "ocp_mx"), "mxfp4"),
        **dict.fromkeys(("q4_k_m", "q4_k_l", "iq4_xs", "iq4_nl"), "q4_k"),
        "q5_k_m": "q5_k",
        **dict.fromkeys(("q3_k_m", "q3_k_l"), "q3_k"),
        **dict.fromkeys(("fp16", "float16", "half", "unquantized"), "bf16"),
    }
)
"""Other spellings, in lower case -> the name that is nearest in meaning."""


def is_explained(name: object) -> bool:
    """Whether a name is that of a method or a library of others."""
    return isinstance(name, str) and _FAMILIES.get(name.lower(), name.lower()) in EXPLAINED


def unknown_scheme(name: object, known: Iterable[str], aliases: Iterable[str]) -> ConfigError:
    """What to tell of a name that no scheme has: what it is elsewhere, and what to use here.

    Args:
        name: As it was asked for, options included.
        known: The canonical names.
        aliases: Every name that a scheme has.
    """
    base = str(name).split(":")[0].strip().lower()
    asked = f"scheme {str(name)[:100]!r}" if isinstance(name, str) else f"scheme {name!r}"[:100]
    explained = EXPLAINED.get(_FAMILIES.get(base, base))
    if explained is not None:
        meaning, nearest = explained
        return ConfigError(
            asked,
            f"no scheme, but {meaning}",
            f"{', '.join(map(repr, nearest))} of the 16-bit model; or load what it made with that library",
        )
    names = list(aliases)
    numbers = re.split("[_-]", base, maxsplit=1)[0]  # ``int8`` of ``int8_per_channel``
    alike = [alias for alias in names if alias.split("_")[0] == numbers]
    meant = MEANINGS.get(base, numbers if numbers in alike else "")
    suggestion = "" if base in MEANINGS else did_you_mean(base[:100], alike or names)
    if meant and not suggestion:
        suggestion = f"{meant!r}, which is nearest in meaning; "
    return ConfigError(asked, "no scheme has this name", f"{suggestion}known: {', '.join(known)}")
