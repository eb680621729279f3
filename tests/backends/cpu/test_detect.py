"""Detection of the host processor: every architecture class, old and new torch."""

from types import SimpleNamespace

import pytest

from quantport_cpu import detect, features
from quantport_cpu.capabilities import ARCHS

VNNI = {"avx2", "avx512_f", "avx512_vnni"}


@pytest.mark.parametrize(
    ("present", "machine", "name"),
    [
        (set(), "x86_64", "generic"),
        ({"avx2"}, "x86_64", "x86_avx2"),
        ({"avx2", "avx512_f"}, "x86_64", "x86_avx512"),
        (VNNI, "AMD64", "x86_vnni"),
        ({"avx2", "avx_vnni"}, "x86_64", "x86_vnni"),
        (VNNI | {"avx512_bf16"}, "x86_64", "x86_bf16"),
        (VNNI | {"avx512_bf16", "amx_int8", "amx_bf16"}, "x86_64", "x86_amx"),
        ({"neon"}, "aarch64", "arm"),
        ({"neon", "i8mm", "bf16"}, "arm64", "arm_i8mm"),
    ],
)
def test_every_architecture(present, machine, name):
    assert detect.arch_of(frozenset(present), machine) is ARCHS[name]


def test_every_architecture_is_reachable():
    assert set(ARCHS) == {
        "generic",
        "x86_avx2",
        "x86_avx512",
        "x86_vnni",
        "x86_bf16",
        "x86_amx",
        "arm",
        "arm_i8mm",
    }


def test_features_of_a_new_torch():
    cpu = SimpleNamespace(get_capabilities=lambda: {"avx2": True, "amx_tile": False, "cpu_name": "x"})
    assert features.features(cpu) == {"avx2"}


def test_features_of_an_old_torch():
    cpu = SimpleNamespace(
        _is_avx2_supported=lambda: True, _is_vnni_supported=lambda: False, _is_amx_tile_supported=lambda: True
    )
    assert features.features(cpu) == {"avx2", "amx_tile", "amx_int8", "amx_bf16"}


def test_features_of_a_torch_without_any_probe():
    assert features.features(SimpleNamespace()) == frozenset()


AMX = frozenset(
    VNNI
    | {
        "avx",
        "avx512_bw",
        "avx512_dq",
        "avx512_vl",
        "avx512_bf16",
        "avx_vnni",
        "amx_tile",
        "amx_int8",
        "amx_bf16",
    }
)


@pytest.mark.parametrize(
    ("capability", "environment", "name"),
    [
        ("AVX512", {}, "x86_amx"),
        ("AVX512", {"ONEDNN_MAX_CPU_ISA": "ALL"}, "x86_amx"),
        ("AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "x86_bf16"),
        ("AVX512", {"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, "x86_vnni"),
        ("AVX512", {"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, "x86_avx512"),
        ("AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}, "x86_vnni"),
        ("AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "x86_avx2"),
        ("AVX512", {"ONEDNN_MAX_CPU_ISA": "SSE41"}, "generic"),
        ("DEFAULT", {}, "generic"),
    ],
)
def test_what_torch_and_onednn_may_not_use_is_not_there(capability, environment, name):
    assert detect.arch_of(features.restricted(AMX, capability, environment), "x86_64").name == name


def test_avx2_of_torch_alone_leaves_its_vnni():
    assert features.restricted(AMX, "AVX2", {}) == {"avx", "avx2", "avx_vnni"}


def test_advice_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(detect, "why_unavailable", lambda: "the compiled kernels need AVX2")
    backend = detect.CpuBackend()
    assert "pip install" not in backend.advice()[0]
    monkeypatch.setattr(detect, "is_installed", lambda: False)
    assert "pip install 'quantport[jit]'" in backend.advice()[0]
    assert backend.quantize_weight(None, None) is None
    monkeypatch.setattr(detect, "why_unavailable", lambda: "")
    assert backend.advice() == ()
