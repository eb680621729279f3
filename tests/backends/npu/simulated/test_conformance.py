"""The suite of every room, all of it, on a simulated NPU: what is accepted runs and is right, and what is refused fails.

A kernel that declares a deviation is judged by the scheme's reference with just that in it (``declared.py``).
"""

from simulator.need import simulated

simulated()

import declared  # noqa: E402
import pytest  # noqa: E402

from quantport import numerics  # noqa: E402
from quantport.testing import BackendConformance, check_runs  # noqa: E402

# torch_npu copies and pickles tensors by way of the old storages, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")

TILED = ("npu.quant_matmul", "npu.dual_level_quant_matmul")


@pytest.fixture
def by_declaration(kernel, monkeypatch):
    """Exchanges the reference for that of the kernel."""
    linear = declared.DECLARED.get(kernel.name)
    if linear is None:
        yield
        return

    def make_job(spec, weight, x, bias, quantizes):
        canonical = numerics.quantize_weight(weight, spec.scheme)
        scheme = spec.scheme if quantizes else spec.scheme.weight_only
        return check_runs.Job(spec, canonical, x, bias, linear(x, canonical, scheme, bias, x.dtype))

    monkeypatch.setattr(check_runs, "make_job", make_job)
    check_runs._plain.cache_clear()
    yield
    check_runs._plain.cache_clear()


class TestSimulatedNpu(BackendConformance):
    kind = "npu"

    @pytest.mark.usefixtures("by_declaration")
    def test_accepted_runs(self, subject, kernel, scheme, dtype):
        super().test_accepted_runs(subject, kernel, scheme, dtype)

    @pytest.mark.usefixtures("by_declaration")
    def test_special_weights(self, subject, kernel, scheme, dtype):
        super().test_special_weights(subject, kernel, scheme, dtype)

    def test_opcheck(self, subject, kernel, scheme, layer, traced):
        if kernel.name in TILED:
            pytest.skip("opcheck compares elements one by one, and here they lie in tiles (FRACTAL_NZ); test_compile runs it")
        super().test_opcheck(subject, kernel, scheme, layer, traced)

    def test_inductor(self, subject):
        pytest.skip("torch_npu's Inductor generates code with triton-ascend, whose compiler is part of CANN; aot_eager is tried")
