"""A program: digests of what the house computes, under defaults of the process that its arguments name."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

DTYPE, DEVICE, ROOM = sys.argv[1:] if __name__ == "__main__" else ("float32", "cpu", "reference")
torch.set_default_dtype(getattr(torch, DTYPE))
if DEVICE == "context":
    torch.device("meta").__enter__()
elif DEVICE != "cpu":
    torch.set_default_device(DEVICE)

import quantport  # noqa: E402  # tables that are made on import are made under these defaults, too
import quantport_cpu.detect  # noqa: E402
from quantport import numerics  # noqa: E402
from quantport.engine import quantize_shard, update_weight  # noqa: E402
from quantport.kernels import aten  # noqa: E402
from quantport.kernels.base import WeightSpec  # noqa: E402
from quantport.kvcache import cache_dtype, decode, encode  # noqa: E402
from quantport.modules import QuantExperts, QuantLinear  # noqa: E402
from quantport.plugins.registry import default_registry  # noqa: E402
from quantport.scheme.catalog import BUILTIN  # noqa: E402

N, K, EXPERTS = 48, 200, 3
OPTIONS = (
    "nvfp4:mse",
    "nf4:double",
    "fp4:double",
    "mxfp4:floor",
    "mxfp4:hadamard",
    "mxfp8:rceil",
    "mxfp4_dualscale:mse",
)
MODELS = Path(__file__).parents[2] / "examples" / "models"
LOADED = ("int4_g32", "nf4:double")


def schemes():
    """Every scheme that quantizes, and one with each option."""
    return [s.name for s in BUILTIN.values() if s.weight.format != "bf16"] + [
        name for name in OPTIONS if name in BUILTIN
    ]


def random(*shape, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(torch.bfloat16)


def digest(tensors):
    """Names, dtypes, shapes and bits."""
    out = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        out.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        out.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return out.hexdigest()[:16]


def of_numerics(scheme):
    stored = numerics.quantize_weight(random(N, K), scheme)
    wide = numerics.dequantize_weight(stored, scheme, K)
    empty = numerics.quantize_weight(random(0, K), scheme)
    shard = quantize_shard(random(N, K), scheme, 1, reduce=lambda amax: amax, place=(0, 1))
    y = numerics.linear(random(3, K, seed=1), stored, scheme, random(N, seed=2))
    return {
        "stored": digest(stored),
        "values": digest({"": wide}),
        "empty": digest(empty),
        "shard": digest(shard),
        "linear": digest({"": y}),
    }


def of_modules(scheme):
    kernel = aten.Reference()
    up, down = WeightSpec(scheme, N, K), WeightSpec(scheme, K, N)
    linear = QuantLinear(kernel, up, nn.Parameter(random(N, seed=2), requires_grad=False))
    linear.set_weight("", numerics.quantize_weight(random(N, K), scheme))
    experts = QuantExperts(kernel, up, down, EXPERTS, "silu")
    for i, (name, spec) in enumerate(experts.specs.items()):
        experts.set_weight(name, numerics.quantize_weight(random(spec.n, spec.k, seed=i), scheme))
    index = torch.tensor([[0, 1], [1, 2], [0, 2], [1, 0]], dtype=torch.int64, device="cpu")
    y = experts(random(4, K, seed=3), index, random(4, 2, seed=4))
    out = {"forward": digest({"": linear(random(3, K, seed=1))}), "experts": digest({"": y})}
    update_weight(linear, "", random(N, K, seed=5))
    return {**out, "updated": digest(linear.state_dict())}


def of_cache(name):
    rows = encode(random(2, 2, 5, 32), cache_dtype(name))
    cache = quantport.kv_cache(host_config(), name)
    keys, values = cache.update(random(1, 2, 5, 8), random(1, 2, 5, 8, seed=1), 0)
    out = decode(rows, 32, cache_dtype(name), torch.bfloat16)
    return digest({"rows": rows, "out": out, "keys": keys, "values": values})


def host_config():
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)


def of_models(scheme):
    out = {}
    for folder in (MODELS / "tiny-llama", MODELS / "tiny-qwen3-moe"):
        model = quantport.load(folder, scheme)
        with tempfile.TemporaryDirectory() as place:
            saved = quantport.save(model, place + "/saved")
            again = quantport.load(saved)
            files = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(saved.iterdir())))
            found = {**dict(model.named_buffers()), **model.state_dict()}
            assert digest(found) == digest({**dict(again.named_buffers()), **again.state_dict()})
        out[folder.name] = digest(found)
        out[f"{folder.name} saved"] = files.hexdigest()[:16]
    plain = nn.Sequential(
        nn.Linear(K, N, dtype=torch.bfloat16, device="cpu"),
        nn.Linear(N, K, dtype=torch.bfloat16, device="cpu"),
    )
    for i, layer in enumerate(plain):
        layer.weight.data.copy_(random(*layer.weight.shape, seed=i))
        layer.bias.data.zero_()
    quantport.quantize_(plain, scheme)
    return {**out, "quantize_": digest(plain.state_dict())}


def without_room():
    """The reference quantizes, and portable kernels run."""
    quantport_cpu.detect.why_unavailable = lambda: "off"
    vars(default_registry())["_kernels"] = {**default_registry()._kernels, "cpu": aten.portable()}


if __name__ == "__main__":
    if ROOM == "reference":
        without_room()
    told = {
        f"{name}/{what}": d
        for name in schemes()
        for of in (of_numerics, of_modules)
        for what, d in of(BUILTIN[name]).items()
    }
    told |= {f"kv/{name}": of_cache(name) for name in ("fp8_e4m3", "fp8_e5m2", "int8", "int4")}
    told |= {f"{name}/{what}": d for name in LOADED for what, d in of_models(name).items()}
    sys.stdout.write(json.dumps(told))
