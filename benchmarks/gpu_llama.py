"""A Llama in plain torch to measure: fused qkv and gate_up, a short KV cache of fixed size, one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Make = Callable[[int, int], nn.Module]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Llama."""

    layers: int = 32
    hidden: int = 4096
    middle: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    context: int = 128

    @property
    def head(self) -> int:
        """Elements of a head."""
        return self.hidden // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor names and shapes of a checkpoint, as Transformers names them."""
        kv = self.kv_heads * self.head
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for i in range(self.layers):
            p = f"model.layers.{i}."
            out |= {f"{p}self_attn.{x}_proj.weight": (self.hidden, self.hidden) for x in "qo"}
            out |= {f"{p}self_attn.{x}_proj.weight": (kv, self.hidden) for x in "kv"}
            out |= {f"{p}mlp.{x}_proj.weight": (self.middle, self.hidden) for x in ("gate", "up")}
            out |= {f"{p}mlp.down_proj.weight": (self.hidden, self.middle)}
            out |= {f"{p}{x}_layernorm.weight": (self.hidden,) for x in ("input", "post_attention")}
        return out | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}


TINY = Sizes(2, 128, 256, 4, 2, 256, 16)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The new residual, and its norm."""
    total = x + residual
    return total, F.rms_norm(total, (total.shape[-1],), weight, 1e-5)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary position embedding; ``rotary`` ``[2, head / 2]`` holds cosines and sines."""
    a, b = x.float().chunk(2, -1)
    cos, sin = rotary.unbind(0)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def gated(x: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@dataclass
class Glue:
    """The functions between linear layers, compiled once for all models or eager."""

    add_norm: Callable[..., Any] = add_norm
    rotate: Callable[..., Any] = rotate
    gated: Callable[..., Any] = gated

    @classmethod
    def compiled(cls) -> Glue:
        """Fused by Inductor, for the 16-bit and the quantized models alike."""
        return cls(*(torch.compile(f, dynamic=False) for f in (add_norm, rotate, gated)))


class Layer(nn.Module):
    """Attention and MLP."""

    def __init__(self, s: Sizes, make: Make, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.s = s
        self.qkv = make((s.heads + 2 * s.kv_heads) * s.head, s.hidden)
        self.o, self.gate_up, self.down = (
            make(s.hidden, s.hidden),
            make(2 * s.middle, s.hidden),
            make(s.hidden, s.middle),
        )
        self.norms = nn.ParameterList([torch.ones(s.hidden, device=device, dtype=dtype) for _ in range(2)])
        self.register_buffer(
            "cache",
            torch.zeros(2, 1, s.kv_heads, s.context, s.head, device=device, dtype=dtype),
            persistent=False,
        )

    def forward(
        self, x: Tensor, residual: Tensor, position: Tensor, rotary: Tensor, glue: Glue
    ) -> tuple[Tensor, Tensor]:
        """One token: ``x`` and ``residual`` are ``[1, hidden]``, ``position`` is ``[1]``."""
        s = self.s
        residual, x = glue.add_norm(x, residual, self.norms[0])
        q, kv = self.qkv(x).view(1, -1, 1, s.head).split([s.heads, 2 * s.kv_heads], 1)
        k, v = kv.chunk(2, 1)
        self.cache[0].index_copy_(2, position, glue.rotate(k, rotary))
        self.cache[1].index_copy_(2, position, v)
        y = F.scaled_dot_product_attention(
            glue.rotate(q, rotary), self.cache[0], self.cache[1], enable_gqa=True
        )
        residual, x = glue.add_norm(self.o(y.reshape(1, -1)), residual, self.norms[1])
        return self.down(glue.gated(self.gate_up(x))), residual


class Llama(nn.Module):
    """One step of decoding. Attention reads the whole cache, so that every step costs the same."""

    def __init__(self, s: Sizes, make: Make, device: torch.device, dtype: torch.dtype, glue: Glue) -> None:
        super().__init__()
        self.glue = glue
        self.layers = nn.ModuleList(Layer(s, make, device, dtype) for _ in range(s.layers))
        self.norm = nn.Parameter(torch.ones(s.hidden, device=device, dtype=dtype), requires_grad=False)
        table = torch.randn(s.vocabulary, s.hidden, device=device, dtype=dtype) * 0.02
        self.embedding = nn.Parameter(table, requires_grad=False)
        self.head = nn.Parameter(table.clone(), requires_grad=False)
        angle = 5e5 ** -(torch.arange(s.head // 2, device=device) / (s.head // 2)) * 7
        self.register_buffer("rotary", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits ``[1, vocabulary]`` of a token ``[1]`` at a position ``[1]``."""
        x = self.embedding[token]
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x, residual = layer(x, residual, position, self.rotary, self.glue)
        return F.linear(self.glue.add_norm(x, residual, self.norm)[1], self.head)


def tree(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """A module tree with tensors of these names, to load a checkpoint into where only its weights matter."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, last, _ = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        with torch.device("meta"):
            if "embed" in last:
                leaf: nn.Module = nn.Embedding(*shape)
            else:
                leaf = nn.Linear(shape[1], shape[0], bias=False) if len(shape) == 2 else nn.RMSNorm(shape)
        module.add_module(last, leaf)
    return root
