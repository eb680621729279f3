"""Runs routed experts: only the tokens that were routed to an expert are multiplied by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from quantport.kernel import Kernel, Packed, WeightSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def run_experts(
    kernel: Kernel,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    tables: Sequence[Packed],
    specs: tuple[WeightSpec, WeightSpec],
    activation: str,
) -> Tensor:
    """Computes ``sum_j weights[t, j] * down(act(gate(x[t])) * up(x[t]))`` over the experts ``index[t, j]``.

    Args:
        kernel: Kernel of all weights.
        x: ``[T, hidden]``.
        index: int ``[T, top_k]``; an entry outside ``[0, experts)`` is a token that goes nowhere.
        weights: ``[T, top_k]``.
        tables: Packed gate, up and down of expert 0, then of expert 1, and so on.
        specs: Specs of (gate and up, down).
        activation: A name in ``ACTIVATIONS``.

    Returns:
        ``[T, hidden]`` in the dtype of ``x``.
    """
    out = torch.zeros_like(x)
    act = ACTIVATIONS[activation]
    experts = len(tables) // 3
    flat = index.reshape(-1)
    flat = torch.where((flat < 0) | (flat > experts), experts, flat)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts + 1).tolist()
    start = 0
    for e, count in enumerate(counts[:experts]):
        if count:
            slots = order[start : start + count]
            tokens = slots // index.shape[1]
            rows = x[tokens]
            gate, up, down = tables[3 * e : 3 * e + 3]
            hidden = act(kernel.apply(rows, gate, None, specs[0])) * kernel.apply(rows, up, None, specs[0])
            y = kernel.apply(hidden, down, None, specs[1]) * weights.reshape(-1)[slots, None]
            out.index_add_(0, tokens, y.to(out.dtype))
        start += count
    return out
