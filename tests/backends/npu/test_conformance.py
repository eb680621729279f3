from quantport.testing import BackendConformance


class TestNpu(BackendConformance):
    kind = "npu"
    every_kernel = True
