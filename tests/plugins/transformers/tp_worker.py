"""One rank of a test: loads what ``cases.json`` says, and writes what came of each.

Args (of the command line): folder, rank, number of ranks.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from quantport.engine import QuantModule
from quantport_transformers import QuantportConfig

IDS = torch.arange(3, 15).view(1, 12)


def load(case: dict[str, Any], rank: int) -> Any:
    """The model of a case."""
    options: dict[str, Any] = {"dtype": getattr(torch, case.get("dtype", "float32"))}
    if case["config"] is not None:
        options["quantization_config"] = QuantportConfig(**case["config"])
    asked = DistributedConfig(**case["parallel"])
    path = case["paths"][rank % len(case["paths"])]
    return transformers.AutoModelForCausalLM.from_pretrained(path, distributed_config=asked, **options)


def what_came(case: dict[str, Any], rank: int) -> dict[str, Any]:
    """What is compared: stored weights, logits and tokens, the bytes that are held; or an error."""
    try:
        model = load(case, rank)
        if case.get("fully_shard"):
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for block in (*model.model.layers, model):
                fully_shard(block, mesh=mesh)
        if case.get("save"):
            model.save_pretrained(case["save"])
        with torch.no_grad():
            logits = model(IDS).logits
            tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
        model.train()(IDS, labels=IDS).loss.backward()
    except Exception as error:  # told to the test
        return {"error": type(error).__name__, "said": str(error)}
    gradient = model.model.layers[0].post_attention_layernorm.weight.grad
    modules = {path: m for path, m in model.named_modules() if isinstance(m, QuantModule)}
    return {
        "stored": {path: {name: m.stored_weight(name) for name in m.specs} for path, m in modules.items()},
        "logits": logits.float(),
        "tokens": tokens,
        "notes": {step.layer.name: step.note for step in model.quantport_plan.quantized},
        "sharded": [
            isinstance(p, DTensor) for n, p in model.named_parameters() if not n.endswith("empty_weight")
        ],
        "gradient": gradient.full_tensor() if isinstance(gradient, DTensor) else gradient,
        "bytes": sum(t.nbytes for m in modules.values() for _, t in m.stored_tensors()),
        "plan": str(model.quantport_plan),
    }


def main() -> None:
    """Runs every case; a rank that has failed waits until the others have too, or ends at once."""
    folder, rank, count = Path(sys.argv[1]), *map(int, sys.argv[2:4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=count)
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        if case.get("wait"):
            _set_pg_timeout(timedelta(seconds=case["wait"]))
        came = what_came(case, rank)
        torch.save(came, folder / f"{name}.{rank}.part")
        (folder / f"{name}.{rank}.part").rename(folder / f"{name}.{rank}.pt")
        if case.get("ends") == rank:
            return
        while not all((folder / f"{name}.{other}.pt").exists() for other in range(count)):
            time.sleep(0.02)


main()
