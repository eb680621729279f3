from quantport.testing import BackendConformance


class TestCuda(BackendConformance):
    kind = "cuda"
    every_kernel = True
    # On the CPU these kernels quantize activations in Triton's interpreter, one program after another. Their
    # arithmetic is checked
    # in test_vendor.py, and that of Triton's in tests/backends/triton, on fewer shapes.
    stand_in = None
