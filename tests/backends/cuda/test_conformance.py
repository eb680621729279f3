from quantport.testing import BackendConformance


class TestCuda(BackendConformance):
    kind = "cuda"
