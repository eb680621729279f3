"""Both example models on the device, end to end; then what serving wants of a forward: one graph of torch.compile for every batch
size, a CUDA graph that replays to the same bits, and no wait for the device."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from gpu_decode import maker
from gpu_llama import TINY, Glue, Llama
from gpu_place import ROOT, Place, capture, one_line
from torch import nn

MODELS = ("tiny-llama", "tiny-qwen3-moe")
SCHEMES = (
    "fp8_per_channel",
    "int8",
    "int4_weight_only",
    "fp8_per_block",
    "nf4",
    "mxfp4_weight_only",
    "nvfp4",
)
PROMPT = "The following exceptions are"
TOKENS = 24
KL = 2e-2  # nats: BF16 arithmetic alone differs by about a thousandth between devices
BATCHES = (2, 3, 8, 17, 64)


def reference(model: nn.Module, like: nn.Module) -> nn.Module:
    """A loaded model with the exact emulation in place of every kernel; weight-only where ``like`` runs it so."""
    from quantport.backend import aten
    from quantport.modules import QuantModule

    there = {name: m for name, m in like.named_modules() if isinstance(m, QuantModule)}
    for name, module in model.named_modules():
        if not isinstance(module, QuantModule) or module.scheme == "bf16":
            continue
        kernel = aten.Reference() if there[name].kernel.quantizes_activations else aten.Dequantize()
        module.repack(kernel)
    return model


def example(place: Place, name: str, scheme: str) -> dict[str, Any]:
    """Logits of a text and a greedy continuation, beside the reference scheme on the CPU."""
    import quantport

    transformers: Any = __import__("transformers")
    transformers.utils.logging.disable_progress_bar()
    path = ROOT / "examples" / "models" / name
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = quantport.load(path, scheme, device="cpu" if place.smoke else place.device)
    base = reference(quantport.load(path, scheme, device="cpu"), model)
    device = next(model.parameters()).device
    text = (path.parent / "eval.txt").read_text(encoding="utf-8")
    window = torch.tensor([tokenizer(text, verbose=False).input_ids[: 64 if place.smoke else 256]])
    logits, base_logits = (
        m(window.to(d)).logits[0].float().cpu().log_softmax(-1) for m, d in ((model, device), (base, "cpu"))
    )
    kl = (
        torch.nn.functional.kl_div(logits, base_logits, log_target=True, reduction="none")
        .sum(-1)
        .mean()
        .item()
    )
    settings = {"max_new_tokens": 4 if place.smoke else TOKENS, "do_sample": False, "num_beams": 1}
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    generated, expected = (
        m.generate(input_ids=ids.to(d), attention_mask=torch.ones_like(ids).to(d), **settings)[0].cpu()
        for m, d in ((model, device), (base, "cpu"))
    )
    length = min(len(generated), len(expected))
    same = int((generated[:length] != expected[:length]).int().cumsum(0).eq(0).sum()) - ids.shape[1]
    kernels = sorted({m.kernel.name for m in model.modules() if hasattr(m, "kernel")})
    summary = (
        f"KL {kl:.1e}; first {same} of {length - ids.shape[1]} greedy tokens equal; by {', '.join(kernels)}"
    )
    return {
        "found": summary,
        "kl": kl,
        "same": same,
        "text": tokenizer.decode(generated),
        "state": "ok" if kl <= KL else "too far",
    }


def block(place: Place, scheme: str) -> nn.Module:
    """Two quantized linear layers with a gate between them."""
    make = maker(place, scheme, place.dtypes[0], [])
    return nn.Sequential(make(512, 256), nn.SiLU(), make(256, 512))


def compiled(place: Place, scheme: str) -> dict[str, Any]:
    """``torch.compile(fullgraph=True, dynamic=True)``: batch sizes from 2 on share one graph (torch makes another for 1).

    Inductor for one scheme, since it takes seconds: whether there is one graph depends on what comes before it.
    """
    plain = block(place, scheme)
    run = torch.compile(
        plain, fullgraph=True, dynamic=True, backend="inductor" if scheme == SCHEMES[0] else "aot_eager"
    )
    torch._dynamo.config.error_on_recompile = True
    try:
        worst = 0.0
        for m in BATCHES[: 2 if place.smoke else None]:
            x = torch.randn(m, 256, device=place.torch).to(place.dtypes[0])
            y, want = run(x), plain(x)
            worst = max(worst, ((y - want).abs().max() / want.abs().max()).item())
    finally:
        torch._dynamo.config.error_on_recompile = False
        torch._dynamo.reset()
    return {
        "found": f"one graph for batches {BATCHES}; {worst:.1e} off eager",
        "state": "ok" if worst <= 2**-6 else "too far",
    }


def replayed(place: Place, scheme: str) -> dict[str, Any]:
    """A captured step of decoding replays to the bits of an eager one, for tokens and positions that it was not captured with."""
    if place.smoke:
        return {"missing": "needs a GPU"}
    dtype = place.dtypes[0]
    model = Llama(TINY, maker(place, scheme, dtype, []), place.torch, dtype, Glue())
    other = copy.deepcopy(model)
    token, at = (torch.tensor([i], device=place.torch) for i in (5, 0))
    out: list[torch.Tensor] = []
    model(token, at)
    graph = capture(lambda: out.append(model(token, at)))
    if graph is None:
        return {"state": "a step cannot be captured"}
    other(token, at)
    for i in range(1, 9):
        token.fill_(7 * i)
        at.fill_(i)
        graph.replay()
        if not torch.equal(out[-1], other(token, at)):
            return {"state": f"step {i} differs from eager"}
    return {"found": "8 steps equal to eager, bit by bit", "state": "ok"}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, whatever waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def asynchronous(place: Place, scheme: str) -> dict[str, Any]:
    """A forward never waits for the device, at few rows and at many."""
    if place.smoke:
        return {"missing": "needs a GPU"}
    plain = block(place, scheme)
    inputs = [torch.randn(m, 256, device=place.torch).to(place.dtypes[0]) for m in (1, 16, 512)]
    for x in inputs:
        plain(x)
    torch.cuda.synchronize()
    with no_waiting():
        for x in inputs:
            plain(x)
    return {"found": "no host synchronization at 1, 16 and 512 rows", "state": "ok"}


def run(place: Place, previous: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """The models first, which compile what the checks of graphs and waiting then need less time for."""
    schemes = SCHEMES[2:3] if place.smoke else SCHEMES
    checks = (("compile", compiled), ("CUDA graph", replayed), ("no waiting", asynchronous))
    todo: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for scheme in schemes:
        todo += [
            (f"{m}, {scheme}", partial(example, place, m, scheme)) for m in MODELS[: 1 if place.smoke else 2]
        ]
    for scheme in schemes:
        todo += [(f"{what}, {scheme}", partial(f, place, scheme)) for what, f in checks]
    rows: list[dict[str, Any]] = []
    warnings.filterwarnings("ignore", category=UserWarning)
    with torch.no_grad():
        for name, check in todo:
            row: dict[str, Any] = {"name": name}
            try:
                row |= {"missing": "out of time"} if place.over(0 if place.smoke else 2) else check()
            except ImportError as error:
                row["missing"] = one_line(error)
            except Exception as error:  # a check that fails is a row that says so, and the others run
                row["state"] = one_line(error)
            rows.append(row)
            keep({"rows": rows, "failed": sum(r.get("state", "ok") != "ok" for r in rows)})
