"""Normalization of CANN on the host, which diffusers calls where torch_npu is installed.

From Ascend/op-plugin docs/zh/custom_APIs/torch_npu (beta, npu_rms_norm) and hicann/ops-nn
norm/rms_norm/docs/aclnnRmsNorm.md.
"""

from __future__ import annotations

import numpy as np
import torch
from simulator.memory import check, over, place
from simulator.quantize import numbers
from simulator.register import A2, A3, A5, I310, operator
from torch import Tensor


@operator(I310, A2, A3, A5)
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:  # noqa: A002  # the schema's name
    name = "npu_rms_norm"
    check(
        2 <= input.dim() <= 8 and gamma.shape == input.shape[-1:],
        name,
        f"{list(input.shape)} by {list(gamma.shape)}",
    )
    check(
        gamma.dtype in (input.dtype, torch.float32), name, f"gamma of {gamma.dtype}, input of {input.dtype}"
    )
    x = numbers(input)
    inverse = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(epsilon))
    y = torch.from_numpy(x * inverse * over(gamma).float().numpy()).to(input.dtype)
    return place(y.contiguous()), place(torch.from_numpy(inverse))
