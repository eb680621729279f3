from quantport.testing import BackendConformance


class TestCpu(BackendConformance):
    kind = "cpu"
