"""float8 on NPUs that do not compute with it, and bf16 on the 310P: weights load, run, move and are saved
with the bytes of the CPU.
"""

from simulator.need import simulated

simulated()

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from simulator import register
from simulator.memory import MisuseError

import quantport
from quantport import numerics
from quantport.backend import WeightSpec
from quantport.kernels import aten
from quantport.kernels.embedding import look_up, why_not_rows
from quantport.kvcache import rows
from quantport.plugins.registry import default_registry
from quantport.testing import cases
from quantport.testing.check_runs import check_reference
from quantport.testing.subject import Subject

MODEL = Path(__file__).parents[4] / "examples" / "models" / "tiny-llama"
N, K = 48, 200
# of bf16 scales
LOADED = [
    "fp8",
    "nvfp4_weight_only",
    *(["int4_weight_only"] if register.family() == "310P" else []),
]
PACKED = ("_packed", "_scale", "_zero")
E4M3 = torch.float8_e4m3fn
SCHEMES = [s for s in default_registry().schemes.values() if "e4m3fn" in (s.weight.format, s.weight.scale)]
BF16_SCALES = [s for s in default_registry().schemes.values() if s.weight.scale == "bf16"]
REFUSED = {
    "a cast from float8": lambda x: x.float(),
    "a cast to float8": lambda x: x.view(torch.uint8).half().to(E4M3),
    "a copy on the device": lambda x: x.clone(),
    "a copy of columns": lambda x: x[:, ::2].cpu(),
    "zeros": lambda x: torch.zeros(4, dtype=E4M3, device="npu"),
    "rows looked up": lambda x: x.index_select(0, torch.zeros(1, dtype=torch.int32, device="npu")),
}


def parametrized(scheme):
    return pytest.mark.parametrize("scheme", scheme, ids=lambda scheme: scheme.name)


@pytest.mark.parametrize("mistake", REFUSED)
def test_only_bytes_move_where_there_is_no_float8(mistake):
    if register.family() == "950":
        pytest.skip("the 950 converts float8")
    x = torch.ones(4, 8, dtype=E4M3)
    there = x.to("npu")
    assert torch.equal(there.cpu().float(), x.float())
    with pytest.raises(MisuseError):
        REFUSED[mistake](there)


@parametrized(SCHEMES)
def test_the_reference_quantizes_to_the_same_bytes(scheme):
    if register.family() == "310P":
        pytest.skip("no bf16 on the 310P: weights are quantized on the host there")
    check_reference(Subject.installed("npu"), scheme)


@parametrized([*SCHEMES, *BF16_SCALES])
@pytest.mark.parametrize("kernel", [aten.Dequantize(), aten.Reference()], ids=lambda kernel: kernel.name)
def test_weights_run(scheme, kernel):
    spec, x = WeightSpec(scheme, N, K), cases.activations(5, K, torch.float16)
    stored_weight = numerics.quantize_weight(cases.plain(N, K), scheme)
    packed = kernel.pack({key: t.to("npu") for key, t in stored_weight.items()}, spec)
    y = kernel.apply(x.to("npu"), packed, None, spec).cpu()
    expected = numerics.linear(
        x, stored_weight, scheme if kernel.quantizes_activations else scheme.weight_only
    )
    assert cases.relative_error(y, expected) <= kernel.tolerance
    if not why_not_rows(scheme, K):
        ids = torch.tensor([3, 0, 47])
        looked = look_up(kernel, ids.to("npu"), packed, spec, torch.float16).cpu()
        assert torch.equal(looked, numerics.dequantize_weight(stored_weight, scheme, K, torch.float16)[ids])


@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2"])
def test_the_kv_cache_has_the_same_bytes(name):
    if register.family() == "310P":
        pytest.skip("no bf16 on the 310P, and the scales of a cache are of bf16")
    kind, x = rows.cache_dtype(name), cases.activations(5, 64, torch.float16)
    there, here = rows.encode(x.to("npu"), kind), rows.encode(x, kind)
    assert torch.equal(there.cpu(), here)
    assert torch.equal(
        rows.decode(there, 64, kind, torch.float16).cpu(), rows.decode(here, 64, kind, torch.float16)
    )


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch_npu's own way to deepcopy
@pytest.mark.parametrize("scheme", LOADED)
def test_a_model_loads_is_copied_saved_and_loaded_again(scheme, tmp_path):
    expected = {
        key: t
        for key, t in quantport.load(MODEL, scheme, device="cpu").state_dict().items()
        if key.endswith(PACKED)
    }
    assert expected
    here = quantport.load(MODEL, scheme, device="npu")
    quantport.save(here, tmp_path / "saved")
    again = quantport.load(tmp_path / "saved", device="npu")
    again.load_state_dict(here.state_dict())
    for model in (here, deepcopy(again), again.to("cpu")):
        state = model.state_dict()
        assert all(cases.same_bits(state[name], t) for name, t in expected.items())
