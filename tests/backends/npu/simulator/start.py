"""Starts the simulated NPU in this process, which must have been started with the driver on
``LD_LIBRARY_PATH``.
"""

from __future__ import annotations

import ctypes

import torch
import torch_npu
from simulator import aten, grouped, multiply, normalize, quantize, register

DRIVER = ctypes.CDLL("libascendcl.so")
DRIVER.simulated_peak.restype = DRIVER.simulated_used.restype = ctypes.c_size_t
BODIES = (quantize, multiply, grouped, normalize)  # importing them registers their operators
# kept: they end when they are freed
LIBRARIES = (
    torch.library.Library("aten", "IMPL"),
    torch.library.Library("npu", "IMPL"),
)

torch.npu.init()
torch_npu.npu.set_compile_mode(jit_compile=False)
aten.install(LIBRARIES[0])
register.install(LIBRARIES[1])
