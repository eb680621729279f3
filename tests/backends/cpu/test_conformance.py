from quantport.testing import BackendConformance


class TestCpu(BackendConformance):
    kind = "cpu"
    every_kernel = True  # the shared kernels of torch operators are those of this room
