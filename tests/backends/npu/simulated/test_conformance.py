"""The suite of every room, on a simulated NPU: what is accepted runs and is right, and what is refused fails."""

from simulator.need import simulated

simulated()

import pytest  # noqa: E402

from quantport.testing import BackendConformance  # noqa: E402

TILES = ("npu.quant_matmul", "npu.dual_level_quant_matmul")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch_npu's own, when it pickles
class TestSimulatedNpu(BackendConformance):
    kind = "npu"

    def test_special_weights(self, subject, kernel, scheme, dtype):
        if kernel.deviation:
            pytest.skip("another scale changes single codes: test_deviations.py holds it to what it declares, to the bit")
        super().test_special_weights(subject, kernel, scheme, dtype)

    def test_opcheck(self, subject, kernel, scheme, layer, traced):
        if kernel.name in TILES:
            pytest.skip("opcheck compares arguments element by element, which weights in tiles have not")
        super().test_opcheck(subject, kernel, scheme, layer, traced)

    def test_inductor(self, subject):
        pytest.skip("inductor makes Triton code for NPUs, which needs triton-ascend and CANN's compiler")
