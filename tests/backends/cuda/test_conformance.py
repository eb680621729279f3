from typing import ClassVar

from quantport.testing import BackendConformance

UP_CAST = "Triton would multiply in bf16, which weight-only kernels do with less work"


class TestCuda(BackendConformance):
    kind = "cuda"
    # On the CPU these kernels quantize activations in Triton's interpreter, one program after another. Their arithmetic is checked
    # in test_vendor.py, and that of Triton's in tests/backends/triton, on fewer shapes.
    stand_in = None
    policy: ClassVar = {
        "multiples of 128": "torch's shape function counts whole blocks only; what cuBLASLt does with the others is not known",
        **{f"no {unit} matrix instruction": UP_CAST for unit in ("mxfp8", "mxfp4", "nvfp4")},
    }
