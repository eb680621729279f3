"""A model whose layers run any weights under any scheme, by the exact reference, and its answers to a text.

For speed, weights are dequantized once, and activations that several layers share are quantized once. Everything that is not
quantized is computed in fp32, so that a divergence of 1e-5 comes from the scheme and not from BF16 arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantport
from quantport import numerics
from quantport.kernels.aten import Reference
from quantport.kernels.base import Packed, WeightSpec
from quantport.modules import QuantExperts, QuantLinear, QuantModule
from quantport.scheme import Quant, Scheme
from quantport.scheme.catalog import BUILTIN

WINDOW = 256


class Values(Reference):
    """``numerics.linear`` on a dequantized weight, which is still rotated where the scheme rotates."""

    name = "quality.values"

    def __init__(self) -> None:
        self._last: tuple[Tensor, Quant | None, Tensor] | None = None

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        values = self._values(x, spec.scheme.activation).float()
        return torch.nn.functional.linear(values, packed[0], None if bias is None else bias.float()).to(
            x.dtype
        )

    def _values(self, x: Tensor, quant: Quant | None) -> Tensor:
        last = self._last  # holds x, so that no other tensor gets its memory
        if last and last[1] == quant and last[0].data_ptr() == x.data_ptr() and last[0].shape == x.shape:
            return last[2]
        self._last = (x, quant, numerics.quantized_values(x, quant))
        return self._last[2]


def values(weight: Tensor, scheme: Scheme) -> Tensor:
    """The values of a weight ``[n, k]`` after quantization: fp32, still rotated where the scheme rotates."""
    stored = numerics.quantize_weight(weight, scheme)
    return numerics.dequantize_weight(stored, replace(scheme, rotation=0), weight.shape[1])


def install(model: torch.nn.Module, weights: Mapping[tuple[str, str], Tensor], scheme: Scheme) -> None:
    """Replaces the weights of every quantized module of a model, given by (module, weight) in fp32, under a scheme."""
    kernel = Values()
    for path, old in [(p, m) for p, m in model.named_modules() if isinstance(m, QuantModule)]:
        new = _like(old, kernel, scheme)
        for name in old.specs:
            new._install(name, (weights[path, name],))
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, new)


def _like(old: QuantModule, kernel: Values, scheme: Scheme) -> QuantModule:
    if isinstance(old, QuantExperts):
        gate_up, down = replace(old.gate_up, scheme=scheme), replace(old.down, scheme=scheme)
        return QuantExperts(kernel, gate_up, down, old.num_experts, old.form, old.dtype)
    assert isinstance(old, QuantLinear)
    return QuantLinear(kernel, replace(old.spec, scheme=scheme), old.bias, old.dtype)


@dataclass(frozen=True)
class Answers:
    """What a model says about the held-out text, one number for each token: shape ``[windows, WINDOW - 1]``.

    Attributes:
        nll: Negative log-likelihood of the next token, nats.
        kl: Divergence of its next-token distribution from the baseline's, nats.
        same: Whether the most likely token is the baseline's.
    """

    nll: Tensor
    kl: Tensor
    same: Tensor


class Bench:
    """One example model: its BF16 weights, the windows of text, and the baseline's distributions."""

    def __init__(self, path: Path, windows: int) -> None:
        text = (path.parent / "eval.txt").read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(path)(text, verbose=False).input_ids
        step = len(ids) // windows  # spread over the whole text
        self.windows = torch.stack([torch.tensor(ids[i * step : i * step + WINDOW]) for i in range(windows)])
        self.path = path
        self.model: Any = quantport.load(path, "bf16", dtype=torch.float32)
        modules = [(p, m) for p, m in self.model.named_modules() if isinstance(m, QuantModule)]
        self.weights = {(p, name): m.stored_weight(name)["weight"] for p, m in modules for name in m.specs}
        install(self.model, {key: w.float() for key, w in self.weights.items()}, BUILTIN["bf16"])
        self.base = self._log_probs(self.model)
        self.top = self.base.argmax(-1)
        self.base_nll = self._nll(self.base)

    @torch.no_grad()
    def _log_probs(self, model: Any) -> Tensor:
        return torch.cat(
            [model(w, use_cache=False).logits[:, :-1].float().log_softmax(-1) for w in self.windows.split(8)]
        )

    def run(self, weights: Mapping[tuple[str, str], Tensor], scheme: Scheme) -> Answers:
        """Answers with other weights, activations quantized as the scheme says."""
        install(self.model, weights, scheme)
        return self._compare(self._log_probs(self.model))

    def bf16(self) -> Answers:
        """Answers of the model as Transformers runs it, in BF16 arithmetic: how much that alone changes."""
        return self._compare(
            self._log_probs(AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.bfloat16).eval())
        )

    def _compare(self, log_probs: Tensor) -> Answers:
        kl = torch.stack([(b.exp() * (b - f)).sum(-1) for f, b in zip(log_probs, self.base, strict=True)])
        return Answers(self._nll(log_probs), kl.double(), log_probs.argmax(-1) == self.top)

    def _nll(self, log_probs: Tensor) -> Tensor:
        return -log_probs.gather(-1, self.windows[:, 1:, None])[..., 0].double()
