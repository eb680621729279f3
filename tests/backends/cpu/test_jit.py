import math
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from cpu_schemes import DECLINED
from torch import Tensor

from quantport import numerics
from quantport.kernels.base import Request, WeightSpec
from quantport.numerics import gguf
from quantport.numerics.scales import scale_values
from quantport.plugins.registry import default_registry
from quantport.scheme import Quant, Scheme
from quantport.scheme.catalog import BUILTIN
from quantport.scheme.scheme import GGUF_BYTES
from quantport_cpu import jit

UNAVAILABLE = jit.why_unavailable()
pytestmark = pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE or "numba is installed")

if not UNAVAILABLE:
    from quantport_cpu.jit import (
        gemv_bf16,
        gguf_batch,
        grouped_small_batch,
        int4_batch,
        parallel_for,
        quantize,
        small_batch,
    )
    from quantport_cpu.jit.grouped_small_batch import Scales
    from quantport_cpu.jit.jobs import Job

GGUF = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k")


def served() -> list[Scheme]:
    """One scheme for each different weight, with every option but the rotation, which is applied before."""
    schemes = [s for s in BUILTIN.values() if s.name not in DECLINED]
    schemes += [s.option(o) for s in schemes for o in s.options if o != "hadamard"]
    return list({s.weight: s for s in reversed(schemes)}.values())


CODED = served()
SHAPES = [(1, 1), (1, 7), (3, 129), (129, 704)]


def fp8(x: Tensor, codes: Tensor, scale: Tensor | None = None) -> Tensor:
    """All rows times one weight."""
    return grouped_small_batch.fp8(x, [Job(0, len(x), 0, 0)], codes, Scales(blocks=scale), len(codes))


def int8(x: Tensor, codes: Tensor) -> Tensor:
    """All rows times one weight."""
    return grouped_small_batch.int8(x, [Job(0, len(x), 0, 0)], codes, Scales(), len(codes))


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def finite(stored: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """Where scales are finite."""
    if "weight_blocks" in stored:
        return torch.isfinite(gguf.scales(stored["weight_blocks"], scheme.weight.element))
    if scheme.weight.scale_quant:
        return torch.isfinite(stored["weight_scale_scale"] + stored["weight_scale_offset"])
    return torch.isfinite(scale_values(stored["weight_scale"], scheme.weight.scale))


def unchecked(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """The reference, without its refusal of scales that are not finite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("quantport.numerics.linear"), "check_finite", lambda *_: None)
        return numerics.quantize_weight(weight, scheme)


def assert_same(weight: Tensor, scheme: Scheme) -> None:
    want, got = unchecked(weight, scheme), quantize.quantize_weight(weight, scheme)
    assert got is not None
    assert list(got) == list(want)
    assert torch.equal(finite(got, scheme), finite(want, scheme))
    if not finite(want, scheme).all():
        return  # codes and offsets there mean nothing
    for name, tensor in want.items():
        assert got[name].dtype is tensor.dtype
        assert got[name].shape == tensor.shape
        assert torch.equal(raw(got[name]), raw(tensor)), (
            scheme.name,
            name,
            (raw(got[name]) != raw(tensor)).sum(),
        )


def serves_fp32(scheme: Scheme) -> bool:
    """Codes that are a byte or a nibble each, under one level of scales: what conversions make most often."""
    quant = scheme.weight
    scales = {"int4": "bf16", "int8": "fp32", "e4m3fn": "fp32"}
    return quant.plain and scales.get(quant.format) == quant.scale and quant.group_size % 8 == 0


def weights(n: int, k: int) -> dict[str, Tensor]:
    torch.manual_seed(n * k)
    normal = torch.randn(n, k)
    special = torch.tensor(
        [0.0, -0.0, 2.0**-133, -(2.0**-126), 2.0**-9, 2.0**-10, -(2.0**-11), 0.5, 1.5, 2.5, 7.5, 127.5, 448.0]
    )
    mixed = special.repeat(math.ceil(n * k / len(special)))[: n * k].view(n, k)
    holes = normal.clone()
    holes[::2] = 0
    return {
        "normal": normal,
        "zero": torch.zeros(n, k),
        "huge": normal * 2.0**124,
        "tiny": normal * 2.0**-122,
        "subnormal": normal * 2.0**-130,
        "spread": normal * 2.0 ** torch.randint(-40, 40, (n, k)),
        "special": mixed,
        "holes": holes,
    }


@pytest.mark.parametrize("scheme", CODED, ids=lambda s: s.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantizers_equal_the_reference(scheme: Scheme, shape: tuple[int, int]) -> None:
    for weight in weights(*shape).values():
        assert_same(weight.bfloat16(), scheme)
        if serves_fp32(scheme):
            assert_same(weight, scheme)


@pytest.mark.parametrize("scheme", CODED, ids=lambda s: s.name)
@pytest.mark.parametrize("amax", [448.0, 1.0, 7.5, 0.0123, 2.0**-90, 3.1e38, 1e-38])
def test_every_bf16_equals_the_reference(scheme: Scheme, amax: float) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    top = torch.tensor(amax).bfloat16()
    few = every[every.abs() <= top]  # NaN is not
    if scheme.weight.group_size:  # the amax in every group, and all other values around it
        side = scheme.weight.group_size - 1
        few = torch.nn.functional.pad(few, (0, -len(few) % side)).view(-1, side)
        assert_same(torch.cat((top.expand(len(few), 1), few), 1), scheme)
    else:
        assert_same(few[None], scheme)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -math.nan])
@pytest.mark.parametrize("scheme", CODED, ids=lambda s: s.name)
def test_a_nonfinite_weight_gives_a_nonfinite_scale(scheme: Scheme, bad: float) -> None:
    weight = torch.randn(130, 200).bfloat16()
    weight[129, 199] = bad
    for x in (weight, weight.float()) if serves_fp32(scheme) else (weight,):
        got = quantize.quantize_weight(x, scheme)
        assert got is not None
        assert torch.equal(finite(got, scheme), finite(unchecked(x, scheme), scheme))
        assert not finite(got, scheme).all()


@pytest.mark.parametrize("scheme", CODED, ids=lambda s: s.name)
def test_rows_need_not_be_adjacent(scheme: Scheme) -> None:
    whole = torch.randn(40, 700).bfloat16()
    whole[7, 100] = 1e4  # an outlier
    assert_same(whole[3:30:2, 5:605], scheme)
    if serves_fp32(scheme):
        assert_same(whole.float()[3:30:2, 5:605], scheme)


@pytest.mark.parametrize("scheme", CODED, ids=lambda s: s.name)
def test_what_it_does_not_serve(scheme: Scheme) -> None:
    assert quantize.quantize_weight(torch.ones(4, 4, dtype=torch.float16), scheme) is None
    assert (quantize.quantize_weight(torch.ones(4, 4), scheme) is not None) is serves_fp32(scheme)
    assert quantize.quantize_weight(torch.ones(4, 0, dtype=torch.bfloat16), scheme) is None
    assert quantize.quantize_weight(torch.ones(4, 6, dtype=torch.bfloat16).t(), scheme) is None


@pytest.mark.parametrize("name", sorted(DECLINED))
def test_the_schemes_it_declines(name: str) -> None:
    assert quantize.quantize_weight(torch.ones(4, 512, dtype=torch.bfloat16), BUILTIN[name]) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 5), (3, 704), (300, 1024)], ids=str)
def test_activations_per_token(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    for got, want in zip(quantize.rows_int8(x), numerics.quantize(x, Quant("int8", (1, 0))), strict=True):
        assert torch.equal(raw(got), raw(want))


def close(got: Tensor, x: Tensor, weight: Tensor) -> None:
    want = x.double() @ weight.double().t()
    assert got.dtype is torch.float32
    assert got.shape == want.shape
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_every_fp8_code() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    got = fp8(torch.ones(1, 1), codes[:, None].contiguous())[0]
    assert torch.equal(got, torch.where(values.isnan(), torch.sign(127.5 - codes) * 480, values))


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(1, 7), (129, 704), (520, 1056)], ids=str)
def test_fp8(shape: tuple[int, int], m: int) -> None:
    weight, x = torch.randn(shape).bfloat16(), torch.randn(m, shape[1]).bfloat16()
    for name in ("fp8_per_channel", "fp8_per_block"):
        scheme = BUILTIN[name]
        stored = numerics.quantize_weight(weight, scheme)
        scale = stored["weight_scale"] if scheme.weight.group_size else None
        values = (
            numerics.dequantize_weight(stored, scheme, shape[1])
            if scheme.weight.group_size
            else stored["weight"].float()
        )
        close(fp8(x, stored["weight"].view(torch.uint8), scale), x, values)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 15])
@pytest.mark.parametrize("shape", [(1, 7), (129, 704), (520, 1056)], ids=str)
def test_int8(shape: tuple[int, int], m: int) -> None:
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    x = torch.randn(m, shape[1]).bfloat16()
    close(int8(x, codes), x, codes)
    close(int8(x * 1e-30, codes), x * 1e-30, codes)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 33])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (37, 704), (75, 2500)], ids=str)
def test_bf16(shape: tuple[int, int], m: int) -> None:
    weight, x = torch.randn(shape).bfloat16(), torch.randn(m, shape[1]).bfloat16()
    close(gemv_bf16.multiply(x, weight), x, weight)
    rows = weight[1:] if len(weight) > 1 else weight
    assert torch.equal(gemv_bf16.multiply(x, rows), gemv_bf16.multiply(x, weight)[:, -len(rows) :])


def int8_codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 9])
@pytest.mark.parametrize("shape", [(1, 7), (5, 64), (130, 704), (3, (1 << 16) + 5)], ids=str)
def test_int8_times_int8_is_exact(shape: tuple[int, int], m: int) -> None:
    n, q, codes = shape[0], int8_codes(m, shape[1]), int8_codes(*shape)
    token, channel = torch.rand(m, 1) + 0.1, torch.rand(n, 1) + 0.1
    sums, rows = (q.double() @ codes.double().t()).float(), grouped_small_batch.prepared_int8(q, token)
    for scales in (channel, channel[:1]):
        got = grouped_small_batch.int8_int8(rows, [Job(0, m, 0, 0)], codes, scales, n)
        assert torch.equal(got, sums * token * scales.t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 5), (3, 704), (33, 1024)], ids=str)
def test_activations_are_quantized_and_multiplied_as_the_reference_does(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype) * torch.logspace(-30, 3, shape[0])[:, None].to(dtype)
    x = torch.cat((x, torch.zeros_like(x[:1])))
    q, token = numerics.quantize(x, Quant("int8", (1, 0)))
    codes = int8_codes(17, shape[1])
    want = (q.double() @ codes.double().t()).float() * token
    rows = grouped_small_batch.quantized_int8(x)
    got = grouped_small_batch.int8_int8(rows, [Job(0, len(x), 0, 0)], codes, torch.ones(1, 1), 17)
    assert torch.equal(got, want)


@pytest.mark.parametrize("m", [1, 3, 6])
@pytest.mark.parametrize("shape", [(1, 5), (33, 704), (700, 1027)], ids=str)
def test_rows_that_each_thread_reads_are_those_that_are_prepared(
    shape: tuple[int, int], m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded results are those of fp32, rounded by torch."""
    n, k = shape
    x, codes, scales = torch.randn(m, k).bfloat16(), int8_codes(n, k), torch.rand(n, 1) + 0.1
    layout, packed = int4_batch.Layout(64, True), torch.randint(-(1 << 31), 1 << 31, (n, -(-k // 8)))
    offsets = torch.randn(2, n, -(-k // 64)).bfloat16()
    int4, jobs = int4_batch.Int4(packed.int(), *offsets), [Job(0, m, 0, 0)]
    bytes_ = codes.view(torch.uint8).bitwise_and(0x3F)

    def products(dtype: torch.dtype) -> list[Tensor]:
        int8_rows = grouped_small_batch.quantized_int8(x)
        return [
            grouped_small_batch.int8_int8(int8_rows, jobs, codes, scales, n, dtype),
            grouped_small_batch.int8(x, jobs, codes, Scales(scales), n, dtype),
            grouped_small_batch.fp8(x, jobs, bytes_, Scales(scales[:1]), n, dtype),
            int4_batch.multiply(int4_batch.quantized(x, layout), jobs, int4, n, dtype),
            int4_batch.multiply(int4_batch.split(x, layout), jobs, int4, n, dtype),
        ]

    by_each, rounded = products(torch.float32), products(torch.bfloat16)
    for module in (grouped_small_batch, int4_batch):
        monkeypatch.setattr(module, "is_read_by_each_thread", lambda *_: False)
    for want, *found in zip(products(torch.float32), by_each, rounded, strict=True):
        assert torch.equal(found[0], want)
        assert torch.equal(found[1], want.bfloat16())


ROW_SCHEMES = ("int8", "int8_weight_only", "fp8_per_block", "fp8_per_tensor", "fp8_weight_only")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", [*ROW_SCHEMES, "int4_w4a8", "int4_mse", "int4_weight_only_g32"])
@pytest.mark.parametrize("shape", [(1, 5), (33, 704), (700, 1027)], ids=str)
def test_the_function_for_a_row_is_the_kernel(name: str, shape: tuple[int, int], threads: int) -> None:
    """To the bit; what it does not take, it leaves; a weight that has moved is not read where it was."""
    (n, k), before = shape, torch.get_num_threads()
    spec, device = WeightSpec(BUILTIN[name], n, k), default_registry().device("cpu")
    kernels = (each for each in default_registry().kernels("cpu") if each.serves(spec.scheme))
    kernel = next(each for each in kernels if not each.reasons_against(Request(spec, "linear", device)))
    packed = kernel.pack(numerics.quantize_weight(torch.randn(n, k).bfloat16(), spec.scheme), spec)
    function = kernel.row_function(packed, spec)
    assert function is not None
    torch.set_num_threads(threads)
    try:
        for x in (torch.randn(1, k).bfloat16(), torch.zeros(1, k).bfloat16()):
            want = kernel.run(x, packed, None, spec)
            assert torch.equal(function(x[:, None])[:, 0], want)
            assert torch.equal(function(x[0]), want[0])
    finally:
        torch.set_num_threads(before)
    every_other = torch.randn(1, 2 * k).bfloat16()[:, ::2]
    for other in (x.float(), x.half(), x[:, 1:], x.expand(2, k), x.to("meta"), torch.nn.Parameter(x)):
        assert function(other) is None
    assert k == 1 or function(every_other) is None
    packed[0].set_(packed[0].clone())
    assert function(x) is None


def test_int8_times_int8_in_groups() -> None:
    """Rows and columns of a group, and no others."""
    q, token, weights = int8_codes(9, 100), torch.rand(9, 1), [int8_codes(40, 100) for _ in range(3)]
    channels = [torch.rand(40, 1) for _ in weights]
    jobs = [Job(0, 1, 2, 0), Job(0, 1, 1, 40), Job(1, 8, 0, 40), Job(8, 9, 1, 0)]
    rows = grouped_small_batch.prepared_int8(q, token)
    got = grouped_small_batch.int8_int8(rows, jobs, torch.stack(weights), torch.stack(channels), 80)
    for start, stop, weight, column in jobs:
        sums = (q[start:stop].double() @ weights[weight].double().t()).float()
        want = sums * token[start:stop] * channels[weight].t()
        assert torch.equal(got[start:stop, column : column + 40], want)


@pytest.mark.parametrize("weight", [-128, 127])
def test_no_sum_of_int8_overflows(weight: int) -> None:
    q = torch.full((2, 1 << 20), -128, dtype=torch.int8)
    codes = torch.full((3, 1 << 20), weight, dtype=torch.int8)
    rows = grouped_small_batch.prepared_int8(q, torch.ones(2, 1))
    got = grouped_small_batch.int8_int8(rows, [Job(0, 2, 0, 0)], codes, torch.ones(1, 1), 3)
    assert torch.equal(got, torch.full((2, 3), float(-128 * weight << 20)))


def gguf_blocks(name: str, rows: int, columns: int) -> Tensor:
    """Blocks of random bytes, with finite scales."""
    element = BUILTIN[name].weight.element
    size = GGUF_BYTES[name] * -(-columns // element.block)
    blocks = torch.randint(0, 256, (rows, size), dtype=torch.uint8)
    flat = blocks.view(-1, GGUF_BYTES[name])
    two = ("q4_1", "q5_1", "q4_k", "q5_k")
    scales = [209] if name == "q6_k" else [1, 3] if name in two else [1]
    flat[:, scales] = torch.where(flat[:, scales] & 0x7C == 0x7C, 0x2A, flat[:, scales])
    return blocks


@pytest.mark.parametrize("name", GGUF)
def test_blocks_of_gguf_decode_to_the_values_of_the_reference(name: str) -> None:
    blocks = gguf_blocks(name, 37, 1500)
    got = torch.empty(37, gguf_batch.columns_of(blocks, name))
    want = gguf.dequantize(blocks, BUILTIN[name].weight.element, got.shape[1])
    assert torch.equal(gguf_batch.decode(blocks, name, got), want)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 17])
@pytest.mark.parametrize("shape", [(1, 7), (129, 704), (520, 1024)], ids=str)
@pytest.mark.parametrize("name", GGUF)
def test_gguf(shape: tuple[int, int], name: str, m: int) -> None:
    (n, k), element = shape, BUILTIN[name].weight.element
    blocks = gguf_blocks(name, n, k)
    x = torch.randn(m, k).bfloat16()
    close(gguf_batch.multiply(x, blocks, name), x, gguf.dequantize(blocks, element, k))


@pytest.mark.parametrize("name", [*GGUF, "mxfp4", "nf4", "fp6", "mxfp8"])
def test_panels_of_bf16_are_those_of_fp32_rounded(name: str) -> None:
    n, k, scheme = 37, 512, BUILTIN[name]
    fp32, bf16 = torch.empty(n, k), torch.empty(n, k, dtype=torch.bfloat16)
    if name in GGUF:
        blocks = gguf_blocks(name, n, k)
        for panel in (fp32, bf16):
            gguf_batch.decode(blocks, name, panel)
    else:
        stored, quant = numerics.quantize_weight(torch.randn(n, k).bfloat16(), scheme), scheme.weight
        codes, scale = stored.get("weight", stored.get("weight_packed")), stored["weight_scale"]
        assert codes is not None
        weight = small_batch.Blocks(
            quant.format, quant.scale, quant.group_size, codes.view(torch.uint8), scale, None, k
        )
        for panel in (fp32, bf16):
            small_batch.decode(weight, panel)
    assert fp32.abs().max() > 0
    assert torch.equal(bf16, fp32.bfloat16())


@pytest.mark.parametrize("shape", [(1, 7), (129, 704), (300, 1056)], ids=str)
@pytest.mark.parametrize("name", ["fp8_per_channel", "fp8_per_block"])
def test_panels_of_fp8(shape: tuple[int, int], name: str) -> None:
    (n, k), stored = shape, numerics.quantize_weight(torch.randn(shape).bfloat16(), BUILTIN[name])
    codes, scale = stored["weight"], stored["weight_scale"] if name == "fp8_per_block" else None
    want = codes.float() / 256
    if scale is not None:
        want *= scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    for first in range(0, n, 60):
        panel = torch.empty(min(60, n - first), k, dtype=torch.bfloat16)
        small_batch.decode_fp8(codes.view(torch.uint8), scale, first, panel)
        assert torch.equal(panel, want[first : first + len(panel)].bfloat16())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_activations_stay_nonfinite(bad: float) -> None:
    x = torch.ones(2, 64)
    x[1, 3] = bad
    for got in (
        int8(x, torch.ones(5, 64, dtype=torch.int8)),
        fp8(x, torch.full((5, 64), 0x38, dtype=torch.uint8)),
    ):
        assert torch.equal(got[0], torch.full_like(got[0], 64.0))
        assert not torch.isfinite(got[1]).any()


def test_the_room_imports_no_numba() -> None:
    code = "import sys, quantport_cpu, quantport_cpu.jit; raise SystemExit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "kernel", ["gemv_bf16.kernel()", 'gemv_blocks.kernel("nf4", gemv_blocks.F32_SCALE, 64)']
)
def test_a_process_that_finds_its_only_kernel_in_the_cache(tmp_path, kernel: str) -> None:
    code = f"from quantport_cpu.jit import {kernel.partition('.')[0]}; print({kernel}.code.address)"
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"QUANTPORT_CACHE_DIR": str(tmp_path)}, check=True
        )
    assert list(tmp_path.iterdir())


def test_threads_of_a_pool_and_of_openmp_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codes = torch.randn(1, 512), torch.randint(0, 120, (1024, 512), dtype=torch.uint8)
    want = fp8(x, codes)
    monkeypatch.setattr(parallel_for, "_openmp_parallel", lambda: None)
    assert torch.equal(fp8(x, codes), want)
