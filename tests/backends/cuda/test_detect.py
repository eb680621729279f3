"""Detection of NVIDIA GPUs, against fakes of the torch module."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from quantport_cuda.capabilities import ARCHS
from quantport_cuda.detect import CudaBackend, devices

GIB = 1 << 30
ARCH_LIST = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


def fake_torch(
    *capabilities, cuda="13.0", hip=None, available=True, arch_list=ARCH_LIST, config="USE_CUDA=ON"
):
    boxes = [
        SimpleNamespace(name=f"NVIDIA fake {i}", total_memory=(i + 1) * GIB) for i in range(len(capabilities))
    ]
    return SimpleNamespace(
        __version__="2.13.0+fake",
        __config__=SimpleNamespace(show=lambda: config),
        version=SimpleNamespace(cuda=cuda, hip=hip),
        cuda=SimpleNamespace(
            is_available=lambda: available,
            device_count=lambda: len(capabilities),
            get_device_capability=lambda i: capabilities[i],
            get_device_properties=lambda i: boxes[i],
            get_arch_list=lambda: list(arch_list),
        ),
    )


@pytest.mark.parametrize("name", ARCHS)
def test_every_architecture_is_found(name):
    (found,) = devices(fake_torch(divmod(int(name.removeprefix("sm_")), 10)))
    assert found.arch is ARCHS[name]
    assert (found.torch_type, found.memory, found.name, found.simulated) == (
        "cuda",
        GIB,
        "NVIDIA fake 0",
        False,
    )
    assert found.torch_device == torch.device("cuda", 0)


def test_several_gpus_keep_their_index():
    first, second = devices(fake_torch((8, 0), (9, 0)))
    assert [str(first), str(second)] == ["cuda:0 (sm_80)", "cuda:1 (sm_90)"]
    assert second.memory == 2 * GIB


def test_jetson_orin_has_the_facts_of_sm_86_under_its_own_name():
    (found,) = devices(fake_torch((8, 7)))
    assert (found.arch.name, found.arch.family, found.arch.native) == (
        "sm_87",
        "Ampere",
        ARCHS["sm_86"].native,
    )


@pytest.mark.parametrize("capability", [(11, 0), (10, 1)])
def test_thor_has_one_name_and_only_safe_formats(capability):
    (found,) = devices(fake_torch(capability))
    assert (found.arch.name, found.arch.title, found.arch.native) == (
        "sm_110",
        "NVIDIA Thor",
        {"fp16", "bf16"},
    )


@pytest.mark.parametrize(
    ("capability", "native"),
    [((13, 0), {"fp16", "bf16"}), ((12, 9), {"fp16", "bf16"}), ((7, 2), {"fp16"}), ((6, 1), {"fp16"})],
)
def test_an_unknown_capability_is_a_device_with_safe_facts(capability, native):
    (found,) = devices(fake_torch(capability))
    assert found.arch.name == "sm_{}{}".format(*capability)
    assert (found.arch.title, found.arch.native) == ("unknown NVIDIA architecture", native)
    assert "assumed" in found.arch.source


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("12.6", set()),
        ("12.8", {"cuda>=12.8"}),
        *((v, {"cuda>=12.8", "cuda>=12.9"}) for v in ("12.9", "13.0")),
    ],
)
def test_the_build_of_torch_is_a_feature(version, expected):
    assert devices(fake_torch((9, 0), cuda=version))[0].features == expected


def test_a_build_with_mslk_is_a_feature():
    shown = "PyTorch built with: ... USE_MKL=ON, USE_MSLK=1, USE_NCCL=1"
    assert "mslk" in devices(fake_torch((10, 0), config=shown))[0].features


def test_torch_without_cuda_finds_nothing_and_asks_no_driver():
    assert devices(SimpleNamespace(version=SimpleNamespace(cuda=None))) == ()
    assert devices(fake_torch((9, 0), cuda=None, hip="7.2.1")) == ()
    assert devices(fake_torch((9, 0), available=False)) == ()


def test_a_broken_driver_raises():
    lib = fake_torch((9, 0))

    def broken(i):
        raise RuntimeError("CUDA error: unknown error")

    lib.cuda.get_device_properties = broken
    with pytest.raises(RuntimeError, match="unknown error"):
        devices(lib)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_the_backend_on_this_machine_finds_nothing():
    assert tuple(CudaBackend().detect()) == ()
