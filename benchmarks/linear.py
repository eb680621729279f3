"""Times linear layers of 4096x4096, weights cold in cache: the kernel of every scheme, BF16, prepacked BF16, peers and the limit.

Writes ``benchmarks/results/linear-<arch>.md`` and, as evidence for the matrix and the plan, the room's ``tuned/<arch>.json``.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from typing import Any

import torch
from common import ROOT, describe, interleaved, markdown, write
from torch.nn import functional as F

from quantport import numerics
from quantport.kernels.base import Request, WeightSpec
from quantport.modules import QuantLinear
from quantport.planning.select_kernel import select_kernel
from quantport.plugins.registry import default_registry
from quantport_cpu.jit import why_unavailable

N = K = 4096
COLD = 320 << 20
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TARGETS = {
    "int8": {1: 3.0, 16: 2.2, 128: 1.8},
    "int4_weight_only": {1: 5.0, 16: 1.5, 128: 0.9},
    "fp8_weight_only": dict.fromkeys(ROWS, 0.9),
}
STORED = (  # of GPTQ and AWQ
    "int4_weight_only:g128:fp16",
    "int4_weight_only:g128:fp32:asym",
    "int8_weight_only:g128:fp16",
    "int8_weight_only:g128:fp32:asym",
)
Call = Callable[[int], object]


def ours(name: str, dense: list[torch.Tensor]) -> tuple[str, list[QuantLinear], float]:
    """Kernel name, cold copies, and the largest relative error of the kernel against the reference."""
    scheme, device = default_registry().schemes[name], default_registry().device("cpu")
    spec = WeightSpec(scheme, N, K)
    chosen = select_kernel(Request(spec, "linear", device), default_registry().kernels("cpu"))
    kernel = default_registry().kernel(chosen.kernel)
    layers = [QuantLinear(kernel, spec) for _ in range(max(2, COLD // scheme.bytes(N, K)))]
    for i, layer in enumerate(layers):
        layer.set_weight("", numerics.quantize_weight(dense[i % len(dense)], scheme))
    error = 0.0
    effective = scheme if kernel.quantizes_activations else scheme.weight_only
    for m in (1, 16, 128):
        x = torch.randn(m, K).bfloat16()
        expected = numerics.linear(x, layers[0].stored_weight(), effective).float()
        error = max(error, ((layers[0](x).float() - expected).abs().max() / expected.abs().max()).item())
    return kernel.name, layers, error


def peers(dense: list[torch.Tensor]) -> dict[str, tuple[list[Any], str]]:
    """Peer modules that import and run here, each with cold copies; the others with the reason."""
    out: dict[str, tuple[list[Any], str]] = {}
    for label, make in (
        ("torchao int8 dyn (compiled)", torchao_int8),
        ("torchao fp8 wo (compiled)", torchao_fp8),
        ("quanto qint8", lambda w: quanto(w, "qint8")),
        ("quanto qint4", lambda w: quanto(w, "qint4")),
        ("quanto qfloat8", lambda w: quanto(w, "qfloat8")),
        ("bnb int8", bnb_int8),
        ("bnb NF4", lambda w: bnb4(w, "nf4")),
        ("OpenVINO int8", lambda w: openvino(w, 8)),
        ("OpenVINO int4 g128", lambda w: openvino(w, 4)),
    ):
        out[label] = copies(label, make, dense)
    return out


def copies(
    label: str, make: Callable[[torch.Tensor], Any], dense: list[torch.Tensor]
) -> tuple[list[Any], str]:
    """Cold copies of one peer's layer, or none and the reason."""
    try:
        first = make(dense[0])
        first(torch.randn(1, K).bfloat16())
        count = max(2, COLD // (N * K // (2 if "4" in label else 1)))
        count = min(count, 8) if "compiled" in label or "OpenVINO" in label else count
        return [first] + [make(dense[i % len(dense)]) for i in range(1, count)], ""
    except Exception as error:  # a peer that does not run here is a row that says so
        return [], f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def linear_of(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def torchao_int8(weight: torch.Tensor) -> Any:
    q = importlib.import_module("torchao.quantization")
    model = torch.nn.Sequential(linear_of(weight))
    q.quantize_(model, q.Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model)


def torchao_fp8(weight: torch.Tensor) -> Any:
    q = importlib.import_module("torchao.quantization")
    model = torch.nn.Sequential(linear_of(weight))
    q.quantize_(model, q.Float8WeightOnlyConfig())
    return torch.compile(model)


def quanto(weight: torch.Tensor, kind: str) -> Any:
    q = importlib.import_module("optimum.quanto")
    model = torch.nn.Sequential(linear_of(weight))
    q.quantize(model, weights=getattr(q, kind))
    q.freeze(model)
    return model


def bnb_int8(weight: torch.Tensor) -> Any:
    bnb = importlib.import_module("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict({"weight": weight.clone()})
    return layer.to("cpu")


def bnb4(weight: torch.Tensor, kind: str) -> Any:
    bnb = importlib.import_module("bitsandbytes")
    layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type=kind)
    layer.load_state_dict({"weight": weight.clone()})
    return layer.to("cpu")


def openvino(weight: torch.Tensor, bits: int) -> Any:
    ov = importlib.import_module("openvino")
    ops = importlib.import_module("openvino.opset13")
    x = ops.parameter([-1, K], ov.Type.f32)
    if bits == 8:
        stored = numerics.quantize_weight(weight, default_registry().schemes["int8_weight_only"])
        w = ops.convert(ops.constant(stored["weight"].numpy()), "f32")
        w = ops.multiply(w, ops.constant(stored["weight_scale"].numpy()))
    else:
        stored = numerics.quantize_weight(weight, default_registry().schemes["int4_weight_only"])
        codes = numerics.unpack_int4(stored["weight_packed"], K).view(N, K // 128, 128)
        packed = ov.Tensor(ov.Type.i4, [N, K // 128, 128])
        nibbles = (codes.view(-1)[0::2] & 15) | ((codes.view(-1)[1::2] & 15) << 4)
        packed.data[:] = nibbles.to(torch.uint8).numpy().reshape(packed.data.shape)
        w = ops.convert(ops.constant(packed), "f16")
        w = ops.multiply(w, ops.constant(stored["weight_scale"].float().half().numpy()[..., None]))
        w = ops.convert(ops.reshape(w, ops.constant([N, K]), False), "f32")
    model = ov.Model([ops.matmul(x, w, False, True)], [x])
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.compile_model(model, "CPU", threads).create_infer_request()
    return lambda x: request.infer({0: x.float().numpy()})


def calls_at(
    m: int, dense: list[torch.Tensor], tested: dict[str, Any], others: dict[str, Any]
) -> dict[str, Call]:
    """Every layer as a function of a running number, at m rows."""
    x = torch.randn(m, K).bfloat16()
    calls: dict[str, Call] = {"BF16 F.linear": lambda i: F.linear(x, dense[i % len(dense)])}
    for name, modules in [(n, t[1]) for n, t in tested.items()] + [
        (n, t[0]) for n, t in others.items() if t[0]
    ]:
        calls[name] = lambda i, modules=modules: modules[i % len(modules)](x)  # type: ignore[misc]  # a default argument
    return calls


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    dense = [torch.randn(N, K).mul_(0.02).bfloat16() for _ in range(COLD // (2 * N * K))]
    known = default_registry().schemes
    schemes = [s for s in known if s != "bf16"] + [f"{s}:a8" for s in known if "a8" in known[s].options]
    schemes += STORED
    tested = {name: ours(name, dense) for name in [*schemes, "bf16"]}
    others = {} if args.no_peers else peers(dense)
    buffer = torch.ones(COLD // 4)
    read = COLD / interleaved({"read": lambda _: buffer.sum()})["read"]
    table: dict[str, dict[int, dict[str, float]]] = {}
    for m in args.rows:
        seconds = interleaved(calls_at(m, dense, tested, others))
        base, packed = seconds["BF16 F.linear"], seconds["bf16"]
        for name, s in seconds.items():
            bits = default_registry().schemes[name].bytes(N, K) if name in default_registry().schemes else 0
            table.setdefault(name, {})[m] = {
                "bf16": base / s,
                "prepacked": packed / s,
                "limit": bits / read / s,
            }
    report(table, tested, {name: why for name, (_, why) in others.items() if why}, args.rows, read)


def caveats() -> list[str]:
    """What makes rows look better or worse on this processor."""
    if "bf16" in default_registry().device("cpu").arch.native:
        return []
    return [
        "This processor has no BF16 dot product: BF16 is emulated from a few rows on, which flatters every ratio at M >= 4, and",
        "bitsandbytes' fast 4-bit path, which needs AVX512-BF16, does not run. On processors with it the ratios are smaller.",
    ]


def report(
    table: dict[str, dict[int, dict[str, float]]],
    tested: dict[str, Any],
    absent: dict[str, str],
    rows: list[int],
    read: float,
) -> None:
    arch = default_registry().device("cpu").arch.name
    out = []
    for name, by_rows in table.items():
        kernel, error = (tested[name][0], f"{tested[name][2]:.1e}") if name in tested else ("", "")
        cells = []
        for m in rows:
            cell = by_rows[m]
            need = TARGETS.get(name, {}).get(m)
            mark = "" if need is None else " ✅" if cell["bf16"] >= need else f" ❌ (need {need:g})"
            cells.append(f"{cell['bf16']:.2f} / {cell['prepacked']:.2f}{mark}")
        out.append(
            [
                name,
                kernel,
                error,
                *cells,
                f"{by_rows[rows[0]]['limit']:.0%}" if by_rows[rows[0]]["limit"] else "",
            ]
        )
    notes = [
        "Each cell: speed-up over BF16 `F.linear` / over prepacked BF16 (the honest baseline); medians of interleaved rounds of one run,",
        f"activation quantization included. Limit: share of the time that reading the weight once takes at {rows[0]} row(s),",
        f"at the measured {read / 1e9:.1f} GB/s. Error: against the reference, max|y - y_ref| / max|y_ref|.",
        *caveats(),
        *(f"- {name}: did not run here ({why})" for name, why in absent.items()),
    ]
    title = f"Linear {N}x{K}, {torch.get_num_threads()} threads, weights cold in cache ({arch})"
    write(
        f"linear-{arch}.md",
        markdown(title, ["", "kernel", "error", *(f"M={m}" for m in rows), "of limit"], out, notes),
    )
    kernels: dict[str, dict[str, Any]] = {}
    for name, (kernel, _, error) in tested.items():
        baseline = "bf16" if name == "bf16" else "prepacked"
        speeds = {str(m): round(cell[baseline], 3) for m, cell in table[name].items()}
        kernels.setdefault(kernel, {})[name] = {"error": error, "speeds": speeds}
    path = ROOT / "backends" / "cpu" / "quantport_cpu" / "tuned" / f"{arch}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(
            {"run": describe(), "compiled": not why_unavailable(), "shape": [N, K], "kernels": kernels},
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
