from quantport.testing import BackendConformance


class TestXpu(BackendConformance):
    kind = "xpu"
    # ATen's operators for Intel GPUs either do not exist on the CPU or have other limits there: test_vendor.py runs the kernels
    # against those that agree, and against emulations. Triton's run in its interpreter, in tests/backends/triton.
    stand_in = None
    policy = {  # noqa: RUF012
        "converts e4m3fn": "the operator runs, and only loses time",
        "multiplies e4m3fn natively": "the native kernel runs the same operator",
        "in the dtype of the scales": "oneDNN may take it; PyTorch and its tests do not",
        "with scales in the dtype of the activations": "as above, by the vendor's tests",
        "one column": "seen on the CPU, whose oneDNN misreads it",
        "no e4m3fn matrix instruction": "the emulation runs there, for who asks for it",
    }
