"""Every kernel of the Intel room that calls an operator, with the schemes, devices and shapes ``(n, k)`` that
are tested.
"""

from __future__ import annotations

from dataclasses import replace

from quantport.backend import Kernel
from quantport.device import Device
from quantport_xpu import vendor
from quantport_xpu.capabilities import ARCHS
from quantport_xpu.kernels.mx import XpuMxfp4, XpuMxfp4Marlin, XpuMxfp8
from quantport_xpu.kernels.scaled import XpuFp8Emulated, XpuIntMM, XpuScaledMM
from quantport_xpu.kernels.vendor import XpuFp8Gemm, XpuFp8W8A16, XpuInt4W4A8, XpuInt4W4A16
from quantport_xpu.kernels.weight_only import XpuInt4Pack, XpuInt8Pack

BMG = Device(ARCHS["bmg"], torch_type="xpu", simulated=True, features=frozenset(vendor.SCHEMAS))
XE3P = replace(BMG, arch=ARCHS["xe3p"])
PVC = replace(BMG, arch=ARCHS["pvc"])
RUNS: list[tuple[Kernel, str, Device, tuple[tuple[int, int], ...]]] = [
    (XpuIntMM(), "int8", BMG, ((64, 256), (33, 97), (1, 704), (5, 2))),
    (XpuScaledMM(), "fp8_per_tensor", XE3P, ((64, 256), (48, 208))),
    (XpuScaledMM(), "fp8_per_channel", XE3P, ((64, 256), (48, 208))),
    (XpuFp8Emulated(), "fp8_per_channel", BMG, ((64, 256), (48, 208))),
    (XpuInt8Pack(), "int8_weight_only", BMG, ((64, 256), (33, 97), (48, 1))),
    (XpuInt8Pack(), "int8", BMG, ((64, 256),)),
    (XpuInt4Pack(), "int4_weight_only", BMG, ((64, 256), (7, 128))),
    (XpuInt4Pack(), "int4_weight_only_g32", BMG, ((64, 256), (33, 96), (1, 32))),
    (XpuInt4Pack(), "int4_w4a8", BMG, ((64, 256),)),
    (XpuInt4W4A16(), "int4_weight_only", BMG, ((64, 256), (7, 128))),
    (XpuInt4W4A16(), "int4_weight_only_g32", BMG, ((33, 96),)),
    (XpuFp8W8A16(), "fp8_weight_only", BMG, ((64, 256), (33, 97), (1, 704), (256, 1))),
    (XpuFp8W8A16(), "fp8_per_tensor", BMG, ((64, 256), (33, 97))),
    (XpuFp8W8A16(), "fp8_per_block", BMG, ((128, 256), (384, 640))),
    (XpuFp8Gemm(), "fp8_per_tensor", XE3P, ((64, 256), (33, 97))),
    (XpuFp8Gemm(), "fp8_per_channel", XE3P, ((64, 256), (1, 704))),
    (XpuFp8Gemm(), "fp8_per_block", XE3P, ((128, 256), (384, 640))),
    (XpuInt4W4A8(), "int4_w4a8", BMG, ((64, 256), (8, 128), (40, 1024))),
    (XpuMxfp8(), "mxfp8", BMG, ((64, 256), (33, 96), (1, 704), (5, 32))),
    (XpuMxfp4(), "mxfp4", BMG, ((64, 256), (33, 96), (1, 704), (5, 32))),
    (XpuMxfp4(), "mxfp4:rceil", PVC, ((64, 256),)),
    (XpuMxfp4Marlin(), "mxfp4_weight_only", PVC, ((128, 256), (384, 128))),
    (XpuMxfp4Marlin(), "mxfp4", PVC, ((128, 256),)),
    (XpuMxfp4Marlin(), "mxfp4_w4a8", PVC, ((128, 256),)),
]
