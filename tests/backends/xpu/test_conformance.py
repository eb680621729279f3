from quantport.testing import BackendConformance


class TestXpu(BackendConformance):
    kind = "xpu"
