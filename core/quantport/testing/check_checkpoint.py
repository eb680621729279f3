"""Checks of the way through a file: load, save, and load again, bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from quantport import numerics
from quantport.checkpoint import save_tensors
from quantport.loading import load, save
from quantport.modules import QuantModule
from quantport.scheme import Scheme
from quantport.testing import cases
from quantport.testing.subject import NotHere, Subject


class Tiny(nn.Module):
    """Two linear layers and a norm: one odd shape, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(128, 200, bias=False, dtype=torch.bfloat16, device="cpu")
        self.norm = nn.LayerNorm(200, dtype=torch.bfloat16, device="cpu")
        self.second = nn.Linear(200, 48, dtype=torch.bfloat16, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 128]`` to ``[..., 48]``."""
        y: Tensor = self.second(self.norm(self.first(x)))
        return y


def check_checkpoint(subject: Subject, scheme: Scheme, directory: Path) -> None:
    """A checkpoint of 16-bit weights loads quantized, saves, and loads again to the same bits and results.

    Raises:
        AssertionError: a bit differs from the reference, or is lost on the way.
        NotHere: there is no device, or it only stores the dtype of the weights.
    """
    if not subject.here:
        raise NotHere(f"no device of kind {subject.kind} here")
    device = subject.here[0]
    if scheme.weight.element.storage in device.arch.storage_only_dtypes:
        raise NotHere(f"{device} only stores {scheme.weight.format}")
    torch.manual_seed(0)
    source = Tiny().state_dict()
    save_tensors(directory / "source", iter(source.items()), max_shard_bytes=20_000, files={})
    first = load(directory / "source", scheme.name, model=Tiny, device=device, dtype=device.arch.compute)
    save(first, directory / "saved")
    second = load(directory / "saved", model=Tiny, device=device, dtype=device.arch.compute)
    findings = [
        f"{name} is a {type(m).__name__}"
        for name in ("first", "second")
        if not isinstance(m := first.get_submodule(name), QuantModule)
    ]
    one, two = first.state_dict(), second.state_dict()
    findings += [] if set(one) == set(two) else [f"keys differ: {sorted(set(one) ^ set(two))}"]
    findings += [
        f"{name} differs after save and load"
        for name in one
        if name in two and not cases.same_bits(one[name], two[name])
    ]
    for name in ("first", "second"):
        expected = numerics.quantize_weight(source[f"{name}.weight"], scheme)
        findings += [
            f"{name}.{k} differs from the reference"
            for k, t in expected.items()
            if not cases.same_bits(t, one[f"{name}.{k}"])
        ]
    x = cases.random(5, 128).to(device.torch_device, device.arch.compute)
    findings += [] if cases.same_bits(first(x), second(x)) else ["the saved model computes another result"]
    subject.conclude(f"load and save of {scheme.name} on {device}", len(one), findings)
