"""The kernels with and without compiled code, above and below each row threshold; and the speeds that the
plan reads.
"""

import pytest
import torch

from quantport import numerics
from quantport.kernels import tuned
from quantport.kernels.base import Request, WeightSpec
from quantport.kernels.verdict import Evidence, Measurement
from quantport.plugins.registry import default_registry
from quantport.scheme import Quant, Scheme
from quantport_cpu.detect import CpuBackend
from quantport_cpu.kernels import fp8, int8, kernels

SCHEMES = [s for s in default_registry().schemes if s != "bf16"]


@pytest.fixture(params=["compiled", "torch only"])
def routes(request, monkeypatch):
    if request.param == "torch only":
        for module in (fp8, int8):
            monkeypatch.setattr(module, "why_unavailable", lambda: "off")
    return request.param


def check_every_route(scheme, shape, rows):
    """Every kernel of the room that serves a scheme meets the reference."""
    (n, k), device = shape, default_registry().device("cpu")
    spec = WeightSpec(scheme, n, k)
    stored = numerics.quantize_weight(torch.randn(n, k).bfloat16(), scheme)
    x, bias = torch.randn(rows, k).bfloat16(), torch.randn(n).bfloat16()
    request = Request(spec, "linear", device)
    for kernel in kernels():
        if not kernel.name.startswith("cpu.") or not kernel.verdict(request).kernel:
            continue
        if not kernel.serves(scheme) or kernel.reasons_against(request):
            continue
        packed = kernel.pack(stored, spec)
        assert all(torch.equal(bits(stored[k]), bits(v)) for k, v in kernel.unpack(packed, spec).items())
        wanted = scheme if kernel.quantizes_activations else scheme.weight_only
        expected = numerics.linear(x, stored, wanted, bias).float()
        error = (kernel.run(x, packed, bias, spec).float() - expected).abs().max() / expected.abs().max()
        assert error <= kernel.tolerance, kernel.name


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("rows", [1, 3, 9, 17, 70])
def test_every_route_meets_the_reference(routes, name, rows):
    check_every_route(default_registry().schemes[name], (192, 320), rows)


@pytest.mark.parametrize("name", [*SCHEMES, "bf16", "q4_0:a8", "q4_k:a8"])
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_a_last_tile_that_is_not_full_over_many_columns(name, rows):
    check_every_route(default_registry().schemes[name], (75, 2592), rows)


TOKEN = Quant("int8", (1, 0))
# Schemes that a plugin could add, similar to those that the kernels are for.
STRANGE = [
    Scheme(f"strange{i}", weight, activation, "", ())
    for i, (weight, activation) in enumerate(
        [
            (Quant("int8", (1, 64)), None),
            (Quant("int8", (0, 0)), TOKEN),
            (Quant("int8", (128, 128)), TOKEN),
            (Quant("int8", (1, 0), "bf16"), None),
            (Quant("int4", (1, 128)), None),
            (Quant("e4m3fn", (1, 128), "bf16"), None),
            (Quant("int8", (1, 0)), Quant("int8", (0, 0))),
            (Quant("e4m3fn", (1, 64)), None),
            (Quant("e4m3fn", (64, 64)), None),
            (Quant("e4m3fn", (1, 0), "bf16"), None),
            (Quant("e4m3fn", (1, 16), "e8m0"), None),
            (Quant("int4", (1, 16), "bf16"), None),
            (Quant("int4", (1, 0), "bf16"), None),
            (Quant("int4", (32, 32), "bf16"), TOKEN),
            (Quant("e2m1", (1, 32), "fp32"), None),
            (Quant("e2m1", (1, 16), "e8m0"), None),
            (Quant("e2m1", (1, 64), "e4m3fn"), None),
            (Quant("e2m1", (1, 16), "fp32"), None),
            (Quant("nf4", (1, 16)), None),
            (Quant("nf4", (1, 128)), None),
            (Quant("e2m3", (1, 96), "fp32"), None),
            (Quant("e3m2", (1, 64), "e8m0"), None),
            (Quant("e2m1", (1, 32), "e8m0", outer_block=(1, 256)), None),
        ]
    )
]


@pytest.mark.parametrize(
    "scheme", STRANGE, ids=lambda s: f"{s.weight}, {s.weight.scale} scales, {s.activation}"
)
def test_a_scheme_that_nobody_has_is_left_alone_or_right(routes, scheme):
    spec, weight = WeightSpec(scheme, 192, 384), torch.randn(192, 384).bfloat16()
    stored = numerics.quantize_weight(weight, scheme)
    fast = CpuBackend().quantize_weight(weight, scheme)
    assert fast is None or all(torch.equal(bits(fast[k]), bits(v)) for k, v in stored.items())
    for kernel in (k for k in kernels() if k.serves(scheme)):
        if kernel.reasons_against(Request(spec, "linear", default_registry().device("cpu"))):
            continue
        for rows in (1, 9, 70):
            x = torch.randn(rows, 384).bfloat16()
            expected = numerics.linear(
                x, stored, scheme if kernel.quantizes_activations else scheme.weight_only
            ).float()
            y = kernel.run(x, kernel.pack(dict(stored), spec), None, spec).float()
            assert (y - expected).abs().max() <= kernel.tolerance * expected.abs().max(), kernel.name


def bits(tensor):
    return tensor.view(torch.uint8)


def test_speed_and_claim_come_from_the_measurements(monkeypatch):
    table = {
        "run": {"device": "d", "date": "2026-01-01", "commit": "c"},
        "kernels": {"cpu.int8": {"int8": {"error": 1e-3, "speeds": {"1": 2.0, "128": 9.0}}}},
    }
    monkeypatch.setattr(tuned, "tuned_table", lambda package, arch: table if arch == "x86_vnni" else {})
    kernel, scheme = int8.CpuInt8(), default_registry().schemes["int8"]
    device = default_registry().device("cpu:x86_vnni")
    requests = [Request(WeightSpec(scheme, 64, 64), "linear", device, num_tokens=rows) for rows in (1, 4, 64)]
    assert [kernel.speed(r) for r in requests] == [2.0, 2.0, 9.0]
    claim = kernel.claim(requests[0])
    assert claim.evidence is Evidence.MEASURED
    assert claim.source == (
        "benchmarks/results/linear-x86_vnni.md (d, 2026-01-01, commit c, relative error 1.0e-03)"
    )
    assert claim.proof == Measurement("quantport_cpu/tuned/x86_vnni.json", "d", "2026-01-01", "c")
    other = Request(WeightSpec(scheme, 64, 64), "linear", default_registry().device("cpu:x86_amx"))
    assert kernel.speed(other) is None
    assert kernel.claim(other).evidence is Evidence.DECLARED


def test_one_column_takes_another_route():
    codes, x = (
        torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)[:, None],
        torch.full((20, 1), -128, dtype=torch.int8),
    )
    assert torch.equal(int8.matmul(x, codes), x.float() @ codes.float().t())


def test_sums_of_very_many_columns_do_not_overflow():
    x, weight = (torch.full((n, 1 << 18), -128, dtype=torch.int8) for n in (40, 8))
    expected = torch.full((40, 8), 2.0**32)
    assert torch.equal(int8.matmul(x, weight), expected)
    spec = WeightSpec(default_registry().schemes["int8_weight_only"], 8, 1 << 18)
    product = int8.CpuInt8WeightOnly().run(x.float(), (weight, torch.ones(1, 1)), None, spec)
    assert torch.allclose(product, expected, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("rows", [1, 3, 8, 40])
@pytest.mark.parametrize("pair", [(127, 127), (127, -128), (-128, -128), (-128, 127)])
def test_the_largest_bytes_do_not_saturate(pair, rows):
    """oneDNN's int8 matmul saturates in pairs where the processor has no VNNI."""
    x, weight = (
        torch.full((n, 704), value, dtype=torch.int8) for n, value in zip((rows, 48), pair, strict=True)
    )
    expected = torch.full((rows, 48), float(704 * pair[0] * pair[1]))
    assert torch.equal(int8.matmul(x, weight), expected)
    spec = WeightSpec(default_registry().schemes["int8_weight_only"], 48, 704)
    product = int8.CpuInt8WeightOnly().run(x.float(), (weight, torch.ones(1, 1)), None, spec)
    assert torch.allclose(product, expected, rtol=2.0**-22, atol=0), "a row is scaled, and scaled back"
