from quantport.testing import BackendConformance


class TestRocm(BackendConformance):
    kind = "rocm"
    every_kernel = True
