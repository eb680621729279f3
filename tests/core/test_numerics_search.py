"""What searching buys, in dB of signal over squared error, on Gaussian weights and on those of the bundled
models.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from core_peers import normal
from safetensors import safe_open
from torch import Tensor

from quantport import numerics
from quantport.scheme.catalog import BUILTIN

MODELS = Path(__file__).parents[2] / "examples" / "models"
SOURCES = ("gauss", "tiny-llama", "tiny-qwen3-moe")
PARTS = (
    "2.self_attn.o_proj",
    "3.self_attn.v_proj",
    "3.mlp.down_proj",
    "4.mlp.up_proj",
    "0.mlp.experts.3.down_proj",
)


@cache
def weights(source: str) -> tuple[Tensor, ...]:
    """Some weights of a model, the two whose gains are smallest among them."""
    if source == "gauss":
        return (torch.randn(128, 1024, generator=torch.Generator().manual_seed(0)),)
    found = []
    for path in sorted((MODELS / source).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found += [
                file.get_tensor(key).float()
                for key in file.keys()  # noqa: SIM118  # a safetensors file is no dict
                if key.endswith(tuple(f"{p}.weight" for p in PARTS))
            ]
    return tuple(found)


def decibel(w: Tensor, value: Tensor) -> float:
    return (10 * torch.log10(w.double().square().sum() / (w.double() - value.double()).square().sum())).item()


def of(w: Tensor, name: str) -> float:
    scheme = BUILTIN[name]
    return decibel(w, numerics.dequantize_weight(numerics.quantize_weight(w, scheme), scheme, w.shape[1]))


def plain_min_max(w: Tensor) -> float:
    """Asymmetric int4 in groups of 64, rounded plainly; scale and smallest value in bf16, as int4_mse stores
    them: 4.5 bits.
    """
    n, k = w.shape
    x = torch.nn.functional.pad(w[None], (0, -k % 64), mode="replicate")[0].view(n, -1, 64)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, low = ((high - low) / 15).bfloat16().float(), low.bfloat16().float()
    return decibel(w, (((x - low) / scale).round().clamp(0, 15) * scale + low).view(n, -1)[:, :k])


@pytest.mark.parametrize("source", SOURCES)
def test_int4_mse_gains_over_plain_rounding_at_equal_bits(source):
    assert (
        BUILTIN["int4_mse"].bytes(64, 1024)
        == BUILTIN["int4_weight_only_g32"].bytes(64, 1024)
        == 64 * 1024 * 4.5 / 8
    )
    assert weights(source)
    for w in weights(source):
        found = of(w, "int4_mse")
        assert found - plain_min_max(w) >= 0.7
        assert found - of(w, "int4_weight_only_g32") >= 0.7
        assert found >= of(w, "int4_hqq")


@pytest.mark.parametrize("source", SOURCES)
def test_searched_nvfp4_gains_over_plain_and_over_mxfp4(source):
    for w in weights(source):
        found = of(w, "nvfp4:mse")
        assert found - of(w, "nvfp4") >= 1
        assert found - of(w, "mxfp4") >= 1


@pytest.mark.parametrize("source", SOURCES)
def test_dual_scale_is_no_worse_than_a_single_one(source):
    for w in weights(source):
        found = of(w, "mxfp4_dualscale")
        assert found >= of(w, "mxfp4")
        assert found >= of(w, "mxfp4:floor")
        assert found >= of(w, "mxfp4_dualscale:floor")


@pytest.mark.parametrize("kind", ["normal", "tails", "outlier", "equal", "bf16"])
@pytest.mark.parametrize(
    "pair",
    [
        ("mxfp4:mse", "mxfp4:floor"),
        ("mxfp4:mse", "mxfp4"),
        ("mxfp8:mse", "mxfp8"),
        ("mxfp6_e2m3:mse", "mxfp6_e2m3"),
        ("mxfp6_e3m2:mse", "mxfp6_e3m2"),
        ("nvfp4:mse", "nvfp4"),
    ],
    ids=str,
)
def test_a_searched_scale_is_never_worse_in_any_block(pair, kind):
    """The unsearched scale is among the tried ones: in each block of 32 the squared error is no larger."""
    w = {
        "normal": lambda: normal(32, 512),
        "tails": lambda: normal(32, 512) ** 3,
        "outlier": lambda: normal(32, 512) + 300 * (torch.arange(512) == 77),
        "equal": lambda: torch.full((4, 64), -0.37),
        "bf16": lambda: normal(32, 512).bfloat16(),
    }[kind]()
    errors = []
    for name in pair:
        stored = numerics.quantize_weight(w, BUILTIN[name])
        value = numerics.dequantize_weight(stored, BUILTIN[name], w.shape[1])
        errors.append((value.double() - w.double()).square().view(w.shape[0], -1, 32).sum(-1))
    assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-30).all()
