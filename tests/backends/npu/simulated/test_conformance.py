"""The suite of every room, on a simulated NPU: what is accepted runs and is right, and what is refused fails."""

from simulator.need import simulated

simulated()

from quantport.testing import BackendConformance  # noqa: E402


class TestSimulatedNpu(BackendConformance):
    kind = "npu"
