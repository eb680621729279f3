"""Where an operator's arithmetic is not the scheme's, it is exactly what the kernel declares: tried on every special weight."""

from simulator.need import simulated

simulated()

from dataclasses import replace  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from quantport import numerics  # noqa: E402
from quantport.backend import Accepted, Request, WeightSpec  # noqa: E402
from quantport.host import host  # noqa: E402
from quantport.testing import cases  # noqa: E402

N, K = 48, 200
CLOSE = 2.0**-7  # of one rounding to 16 bits, of another order of sums


def int8(x, canonical, scheme):
    """Tokens scaled by amax / 127."""
    values = x.float()
    scale = values.abs().amax(1, keepdim=True) / 127
    codes = (values / torch.where(scale == 0, 1, scale)).round()
    weight = canonical["weight"].double() * canonical["weight_scale"].double()
    return ((codes.double() * scale.double()) @ weight.t()).to(x.dtype)


def floor(x, canonical, scheme):
    """Activations scaled by the rule of OCP."""
    return numerics.linear(x, canonical, replace(scheme, activation=replace(scheme.activation, rule="floor")))


def rounded(x, canonical, scheme):
    """Weights with scales of the dtype of the activations."""
    scale = canonical["weight_scale"].to(x.dtype).float()
    return numerics.linear(x, {**canonical, "weight_scale": scale}, scheme.weight_only)


def divided(x, canonical, scheme):
    """Offsets in steps of their scales, of the dtype of the activations, added to the codes."""
    zero = canonical["weight_zero"]
    offset = (zero.float() / canonical["weight_scale"].float()).to(x.dtype).float()
    codes = numerics.unpack_int4(canonical["weight_packed"], K).double()
    wide = (t.double().repeat_interleave(scheme.weight.cols, 1)[:, :K] for t in (offset, canonical["weight_scale"]))
    return (x.double() @ ((codes + next(wide)) * next(wide)).t()).to(x.dtype)


DECLARED = {
    "npu.quant_matmul": int8,
    "npu.weight_quant_int8": rounded,
    "npu.weight_quant_fp8": rounded,
    "npu.weight_quant_int4_offset": divided,
    "npu.quant_matmul_mxfp8": floor,
    "npu.quant_matmul_mxfp4_w4a8": floor,
}
KERNELS = {kernel.name: kernel for kernel in host().kernels("npu")}
CASES = [(name, scheme) for name in DECLARED for scheme in host().schemes.values() if KERNELS[name].serves(scheme)]


def test_every_deviation_is_here():
    assert {name for name, kernel in KERNELS.items() if kernel.deviation} == set(DECLARED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("name", "scheme"), CASES, ids=[f"{name}-{scheme.name}" for name, scheme in CASES])
def test_it_is_what_is_declared(name, scheme, dtype):
    kernel, device, spec = KERNELS[name], host().device("npu"), WeightSpec(scheme, N, K)
    if not isinstance(kernel.verdict(Request(spec, "linear", device, dtype)), Accepted):
        pytest.skip(f"{name} does not run on {device}")
    x = cases.activations(5, K, dtype)
    for label, make in cases.specials(scheme):
        canonical = numerics.quantize_weight(make(N, K), scheme)
        packed = kernel.pack({key: t.to("npu") for key, t in canonical.items()}, spec)
        y, expected = kernel.run(x.to("npu"), packed, None, spec).cpu(), DECLARED[name](x, canonical, scheme)
        if torch.isfinite(expected).all():
            assert cases.relative_error(y, expected) <= CLOSE, label
