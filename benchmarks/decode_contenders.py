"""One contender of ``decode.py`` in a process of its own: it loads, and then generates whenever a line comes in, in stages, of
which each begins when the next line comes: so the bursts of several processes alternate.

    python benchmarks/decode_contenders.py NAME DIRECTORY GGUF PROMPT TOKENS BURST THREADS
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

OnToken = Callable[[], None]
COMPILED = " compiled"  # ends the name of a contender with a static cache and a compiled step
PEERS = (
    "Transformers BF16",
    "Transformers FP32",
    f"Transformers BF16{COMPILED}",
    "llama.cpp BF16",
    "llama.cpp Q8_0",
    "llama.cpp Q4_0",
    "llama.cpp Q4_K_M",
    "OpenVINO int8",
    "OpenVINO int4",
    "onnxruntime MatMulNBits",
    "torchao int8",
    f"torchao int8{COMPILED}",
    "torchao int4",
    "quanto int8",
    "quanto int4",
    "bitsandbytes 8-bit",
    "bitsandbytes NF4",
)


class Contender(NamedTuple):
    """A model that is loaded.

    Attributes:
        generate: Writes so many greedy tokens after a prompt, and calls back after each.
        read: Bytes of weights that one token reads; 0 where that is not known.
    """

    generate: Callable[[list[int], int, OnToken], object]
    read: int = 0


def load(name: str, directory: Path, gguf: Path, threads: int) -> Contender:
    """Loads a contender by its name: a scheme of ours, or one of ``PEERS``."""
    library, _, kind = name.removesuffix(COMPILED).partition(" ")
    if library == "llama.cpp":
        return llama_cpp(kind, gguf, threads)
    if library == "onnxruntime":
        return importlib.import_module("decode_onnxruntime").load(directory, threads)
    import torch

    torch.set_num_threads(threads)
    if library == "OpenVINO":
        return openvino(kind, directory, threads)
    model = transformers_model(library, kind, directory) if kind else ours(library, directory)
    return of_transformers(model, name.endswith(COMPILED), kind == "")


def ours(scheme: str, directory: Path) -> Any:
    import quantport

    return quantport.load(directory, scheme, device="cpu")


def transformers_model(library: str, kind: str, directory: Path) -> Any:
    """A peer that loads through Transformers."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

    if library == "Transformers":
        dtype = {"BF16": torch.bfloat16, "FP32": torch.float32}[kind]
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    if library == "torchao" and kind == "int8":
        ao = importlib.import_module("torchao.quantization")
        config = TorchAoConfig(ao.Int8DynamicActivationInt8WeightConfig())
    elif library == "torchao":
        int4 = importlib.import_module("torchao.prototype.quantization.int4.inference_workflow")
        config = TorchAoConfig(int4.PrototypeInt4WeightOnlyConfig(group_size=64))
    elif library == "quanto":
        config = QuantoConfig(weights=kind)
    elif kind == "8-bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, quantization_config=config)


class Callback:
    """A streamer of ``generate`` that calls back for each token that is new."""

    def __init__(self, on_token: OnToken) -> None:
        self.on_token, self.is_prompt = on_token, True

    def put(self, _: object) -> None:
        if not self.is_prompt:
            self.on_token()
        self.is_prompt = False

    def end(self) -> None:
        """Of a streamer."""


def of_transformers(model: Any, compiled: bool = False, is_ours: bool = False) -> Contender:
    """A model with the ``generate`` of Transformers."""
    import torch

    options: dict[str, Any] = {"do_sample": False, "use_cache": True, "eos_token_id": None}
    if compiled and is_ours:
        importlib.import_module("quantport").compile_decode(model)
    elif compiled:
        from transformers import CompileConfig

        config = CompileConfig(mode="default", fullgraph=True)
        config._compile_all_devices = True  # the CPU too
        options |= {"cache_implementation": "static", "max_cache_len": 1024, "compile_config": config}

    def generate(ids: list[int], tokens: int, on_token: OnToken) -> object:
        prompt = torch.tensor([ids])
        count = {"max_new_tokens": tokens, "attention_mask": torch.ones_like(prompt)}
        return model.generate(prompt, streamer=Callback(on_token), **count, **options)

    return Contender(generate, bytes_read(model))


def bytes_read(model: Any) -> int:
    """Bytes of weights that one token reads: of an embedding nothing, of experts those that are chosen."""
    config = model.config
    share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    plan = getattr(model, "quantport_plan", None)
    if plan is not None:
        steps = [
            s for s in plan.steps if s.layer.loaded and (s.layer.role.name != "EMBEDDING" or s.layer.tied)
        ]
        return round(sum(s.after * (share if s.layer.experts else 1) for s in steps))
    if getattr(model, "hf_quantizer", None) is not None or not hasattr(model, "named_parameters"):
        return 0
    head = model.get_output_embeddings().weight
    read = {name: p for name, p in model.named_parameters() if "embed_tokens" not in name or p is head}
    return round(sum(p.nbytes * (share if ".experts." in name else 1) for name, p in read.items()))


def openvino(kind: str, directory: Path, threads: int) -> Contender:
    """Exported and compressed while loading."""
    intel = importlib.import_module("optimum.intel")
    bits = {"int8": {"bits": 8}, "int4": {"bits": 4, "sym": True, "group_size": 64, "ratio": 1.0}}[kind]
    model = intel.OVModelForCausalLM.from_pretrained(
        directory,
        export=True,
        quantization_config=intel.OVWeightQuantizationConfig(**bits),
        ov_config={"INFERENCE_NUM_THREADS": threads},
    )
    return of_transformers(model)


def llama_cpp(kind: str, gguf: Path, threads: int) -> Contender:
    """llama.cpp over the same weights, quantized by its own tool into a file that is kept beside the BF16 one."""
    llama = importlib.import_module("llama_cpp")
    path = gguf if kind == "BF16" else gguf.with_suffix(f".{kind}.gguf")
    model = llama.Llama(
        str(path), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def generate(ids: list[int], tokens: int, on_token: OnToken) -> None:
        model.reset()
        model.eval(ids)
        for left in reversed(range(tokens)):
            logits = llama.llama_get_logits(model.ctx)
            best = max_of(logits, model.n_vocab())
            on_token()
            if left:
                model.eval([best])

    return Contender(generate, gguf_bytes_read(path))


def max_of(logits: Any, count: int) -> int:
    numpy = importlib.import_module("numpy")
    return int(numpy.ctypeslib.as_array(logits, (count,)).argmax())


def quantize_gguf(gguf: Path, kind: str, threads: int) -> None:
    """llama.cpp's own quantization of a BF16 file, unless it is there."""
    llama = importlib.import_module("llama_cpp")
    ctypes = importlib.import_module("ctypes")
    path = gguf.with_suffix(f".{kind}.gguf")
    if kind == "BF16" or path.exists():
        return
    params = llama.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama.llama_model_quantize(str(gguf).encode(), str(path).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp did not quantize {gguf} to {kind}")


def gguf_bytes_read(path: Path) -> int:
    """As ``bytes_read``, of a file; 0 where the package ``gguf`` is missing."""
    try:
        reader = importlib.import_module("gguf").GGUFReader(path)
    except ImportError:
        return 0
    fields = {name.partition(".")[2]: field for name, field in reader.fields.items()}
    experts, used = (
        fields[key].contents() if key in fields else 1 for key in ("expert_count", "expert_used_count")
    )
    tied = all(t.name != "output.weight" for t in reader.tensors)
    read = [t for t in reader.tensors if t.name != "token_embd.weight" or tied]
    return round(sum(int(t.n_bytes) * (used / experts if "_exps" in t.name else 1) for t in read))


def memory(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


class Stages:
    """Measures a generation in stages: the prompt, and bursts of tokens; between them it waits for a line."""

    def __init__(self, tokens: int, burst: int) -> None:
        self.ends, self.count, self.start = (
            {1 + i for i in range(0, tokens + 1, burst)},
            0,
            time.perf_counter(),
        )
        self.last = max(self.ends)

    def __call__(self) -> None:
        self.count += 1
        if self.count in self.ends:
            say(seconds=time.perf_counter() - self.start)
            if self.count < self.last:
                sys.stdin.readline()
                self.start = time.perf_counter()


def say(**values: float) -> None:
    print(json.dumps(values), flush=True)


def warm_imports(name: str) -> None:
    """Imports what loading would, and compiles what a first load does: neither is a load."""
    library = name.partition(" ")[0]
    if library == "llama.cpp":
        importlib.import_module("llama_cpp")
        return
    if library == "OpenVINO":
        importlib.import_module("optimum.intel")
        return
    modeling = importlib.import_module("transformers")
    _ = modeling.LlamaForCausalLM, modeling.Qwen3MoeForCausalLM
    if " " not in name.removesuffix(COMPILED):
        import torch

        import quantport
        from quantport.checkpoint import save_tensors

        with tempfile.TemporaryDirectory() as tmp:
            small = save_tensors(Path(tmp) / "m", [("a.weight", torch.randn(256, 256).bfloat16())])
            layer = torch.nn.Linear(256, 256, bias=False)
            quantport.load(
                small, name.removesuffix(COMPILED), model=lambda: torch.nn.ModuleDict({"a": layer})
            )


def main() -> None:
    name, directory, gguf = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    prompt, tokens, burst, threads = map(int, sys.argv[4:])
    warm_imports(name)
    if name.startswith("llama.cpp"):
        quantize_gguf(gguf, name.partition(" ")[2], threads)
    base, start = memory("VmRSS"), time.perf_counter()
    contender = load(name, directory, gguf, threads)
    seconds = time.perf_counter() - start
    ids = [(7 * i * i + 3 * i) % 1000 for i in range(prompt)]
    contender.generate(ids, 4, lambda: None)  # what the first call compiles, packs or allocates
    say(load=seconds, peak=memory("VmHWM") - base, read=contender.read)
    while sys.stdin.readline():
        contender.generate(ids, tokens + 1, Stages(tokens, burst))


if __name__ == "__main__":
    main()
