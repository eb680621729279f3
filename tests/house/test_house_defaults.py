"""No tensor without dtype and device, and no change to the defaults of the process."""

from __future__ import annotations

import house_defaults as defaults
import house_source as house
import pytest

NAMED = {
    "core/quantport/loading/build_context.py": "gives the thread that builds a model "
    "a default dtype of its own",
    "core/quantport/loading/threads.py": "sets the number of one thread, and puts that of the process back",
    "core/quantport/testing/suite.py": "checks of small tensors run on one thread",
}


def name(path):
    return str(path.relative_to(house.ROOT))


@pytest.mark.parametrize("path", house.files(*house.SHIPPED), ids=name)
def test_nothing_depends_on_the_defaults_of_the_process(path):
    found = [f"{house.where(path, line)} {what}" for line, what in defaults.findings(path)]
    if name(path) not in NAMED:
        assert not found


def test_exceptions_are_still_needed():
    for place in NAMED:
        assert list(defaults.findings(house.ROOT / place)), place


@pytest.mark.parametrize(
    "code",
    [
        "torch.zeros(3)",
        "torch.zeros(3, dtype=torch.float32)",
        "torch.tensor(data, device=x.device)",
        "torch.arange(n, dtype=torch.int32)",
        "torch.fft.fftfreq(8)",
        "torch.empty(3, **like)",
        "nn.Linear(2, 3, dtype=torch.float16)",
        "nn.Parameter(torch.empty(3))",
        "torch.nn.Embedding(2, 3, device='cpu')",
        "torch.Tensor(3)",
        "Tensor([1.0])",
        "torch.FloatTensor(3)",
        "torch.where(c, 2.0**m, 0.0)",
        "torch.where(c, -1.0, 1)",
        "torch.finfo()",
        "torch.set_default_dtype(torch.float16)",
        "torch.get_default_dtype()",
        "torch.set_num_threads(1)",
        "pool(initializer=torch.set_num_threads)",
        "from torch import Tensor, zeros",
        "from torch import set_num_threads",
    ],
)
def test_the_rule_can_fail(tmp_path, code):
    bad = tmp_path / "bad.py"
    bad.write_text(f"x = 1\n{code}\n", encoding="utf-8")
    assert [line for line, _ in defaults.findings(bad)] == [2]


@pytest.mark.parametrize(
    "code",
    [
        "torch.zeros(3, dtype=torch.float32, device=x.device)",
        "x.new_zeros(3)",
        "torch.zeros_like(x)",
        "np.zeros(3)",
        "nn.Linear(2, 3, dtype=x.dtype, device=x.device)",
        "nn.Parameter(x)",
        "torch.where(c, 0.0, x)",
        "torch.where(c, 1, 0)",
        "torch.where(c, 0.0, 1 / x)",
        "torch.finfo(x.dtype)",
        "torch.get_num_threads()",
        "torch.nonzero(c)",
        "torch.where(c)",
        "def f(x: torch.Tensor) -> Tensor: ...",
        "from torch import Tensor",
    ],
)
def test_the_rule_lets_the_rest_through(tmp_path, code):
    good = tmp_path / "good.py"
    good.write_text(f"{code}\n", encoding="utf-8")
    assert not list(defaults.findings(good))
