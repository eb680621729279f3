"""Checks of groups of rows by weights of their own: no, few and many rows, one weight or two for the same
rows.
"""

from __future__ import annotations

import torch

from quantport import numerics
from quantport.kernels.base import Kernel, WeightSpec
from quantport.modules.ops import run_grouped
from quantport.scheme import Scheme
from quantport.testing import builders, cases, weights
from quantport.testing.subject import Subject

COUNTS = (1, 0, 2, 5, 8, 0, 19)


def check_grouped(subject: Subject, kernel: Kernel, scheme: Scheme) -> None:
    """Every group of rows meets the reference of its own weights; rows of no group are zero.

    Raises:
        AssertionError: they do not.
        NotHere: there is no device, or the kernel refuses.
    """
    device, spec = (
        builders.device_for(subject, kernel, scheme, "moe"),
        WeightSpec(scheme, builders.INTERMEDIATE, builders.HIDDEN),
    )
    where, dtype = device.torch_device, device.arch.compute
    effective = scheme if kernel.quantizes_activations else scheme.weight_only
    starts = [sum(COUNTS[:g]) for g in range(len(COUNTS) + 1)]
    findings, compared = [], 0
    for shared, past in ((1, 0), (2, 3)):
        x = cases.activations(starts[-1] + past, spec.k, dtype)
        stored = [weights.normal(spec, i, 0.02, 0.02) for i in range(shared * len(COUNTS))]
        packed = [kernel.pack({name: t.to(where, copy=True) for name, t in w.items()}, spec) for w in stored]
        bias = cases.bias(len(COUNTS) * shared * spec.n, dtype).view(len(COUNTS), -1) if past else None
        own_bias = None if bias is None else bias.to(where)
        y = run_grouped(
            kernel,
            x.to(where),
            torch.tensor(starts, dtype=torch.int64, device=where),
            packed,
            own_bias,
            spec,
            shared,
        ).cpu()
        if tuple(y.shape) != (x.shape[0], shared * spec.n) or y[starts[-1] :].any():
            findings.append(f"{shared} weights: returned {list(y.shape)}, or rows of no group are not zero")
            continue
        for i, weight in enumerate(stored):
            (g, j), columns = divmod(i, shared), slice(i % shared * spec.n, (i % shared + 1) * spec.n)
            rows = slice(starts[g], starts[g + 1])
            if COUNTS[g]:
                expected = numerics.linear(
                    x[rows], weight, effective, None if bias is None else bias[g, columns]
                )
                compared += 1
                error = cases.relative_error(y[rows, columns], expected)
                bad = f"weight {j} of group {g} of {COUNTS[g]} rows: relative error {error:.2e}"
                findings += [bad] if error > kernel.tolerance else []
    subject.conclude(f"run_grouped of {kernel.name} with {scheme.name}", compared, findings)
