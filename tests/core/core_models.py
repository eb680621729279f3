"""Small models and their checkpoints: made in memory, written as safetensors, built again by a factory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

MODELS = Path(__file__).parents[2] / "examples" / "models"
DENSE, MOE = MODELS / "tiny-llama", MODELS / "tiny-qwen3-moe"
SCHEMES = (
    "fp8_per_tensor",
    "fp8_per_channel",
    "fp8_per_block",
    "int8",
    "fp8_weight_only",
    "int8_weight_only",
    "int4_weight_only",
    "int4_weight_only_g32",
)
ids = torch.arange(24).view(2, 12) * 7 % 512


class Expert(nn.Module):
    def __init__(self, hidden: int = 32, inner: int = 48, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Moe(nn.Module):
    """Experts as separate modules, as in Mixtral of old."""

    def __init__(self, hidden: int = 32, experts: int = 3, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, bias=bias) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


class Tiny(nn.Module):
    """Everything at once: biases, odd shapes, one column, normalization, a buffer, experts, a head."""

    def __init__(self, hidden: int = 32, bias: bool = True) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, hidden)
        self.up = nn.Linear(hidden, 129, bias=bias)
        self.norm = nn.LayerNorm(129)
        self.down = nn.Linear(129, hidden, bias=False)
        self.narrow = nn.Linear(1, 7)
        self.moe = Moe(hidden)
        self.register_buffer("offset", torch.full((hidden,), 0.5))
        self.lm_head = nn.Linear(hidden, 20, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        x = x + self.down(self.norm(self.up(x))) + self.moe(x) + self.offset
        return self.lm_head(x) + self.narrow(x[..., :1]).sum(-1, keepdim=True)


def made(
    factory: Callable[[], nn.Module] = Tiny, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> nn.Module:
    torch.manual_seed(seed)
    return factory().to(dtype).eval().requires_grad_(False)


def write(folder: Path, tensors: Mapping[str, Tensor] | nn.Module, **files: str) -> Path:
    """Writes model.safetensors, and other files by name (``config__json``)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    save_file(
        {n: t.contiguous().clone() for n, t in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def same_state(found: nn.Module, expected: nn.Module) -> None:
    """The same tensors under the same names, every bit equal."""
    left, right = found.state_dict(), expected.state_dict()
    assert list(left) == list(right) or set(left) == set(right), set(left) ^ set(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert same_bits(tensor, right[name]), name


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8)
    )


def snapshot(model: nn.Module) -> dict[str, object]:
    """Identity of every module and bits of every tensor, to prove that nothing was touched."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"modules": dict(model.named_modules()), "state": state, "notes": sorted(vars(model))}


def untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = dict(model.named_modules())
    assert list(after) == list(before["modules"])
    assert all(after[name] is module for name, module in before["modules"].items())
    assert sorted(vars(model)) == before["notes"]
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, before["state"][name]), name
