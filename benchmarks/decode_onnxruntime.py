"""onnxruntime's ``MatMulNBits`` as a contender of ``decode.py``: only the products of a step of a Llama, int4 in groups of 128 with int8
activations, one after another; without attention, norms and embedding, which makes it faster than a model would be."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode_contenders import Contender, OnToken
from torch import Tensor

GROUP = 128


def load(directory: Path, threads: int) -> Contender:
    """Quantizes the projections and the head of a Llama, and builds a graph of them.

    Raises:
        ValueError: the model has experts.
    """
    from quantport.checkpoint import Checkpoint

    ort, onnx = importlib.import_module("onnxruntime"), importlib.import_module("onnx")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "num_experts" in config:
        raise ValueError("MatMulNBits multiplies no experts")
    with Checkpoint.open(directory) as checkpoint:
        products = Products(onnx, checkpoint.read)
        x = "x"
        for i in range(config["num_hidden_layers"]):
            x = products.layer(x, f"model.layers.{i}.")
        tied = "lm_head.weight" not in checkpoint.tensors
        products.kept.append(products.product(x, "model.embed_tokens" if tied else "lm_head"))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = products.model(config["hidden_size"]).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def step(rows: int) -> None:
        session.run(None, {"x": torch.ones(rows, config["hidden_size"]).numpy()})

    def generate(ids: list[int], tokens: int, on_token: OnToken) -> None:
        for rows in [len(ids), *[1] * (tokens - 1)]:
            step(rows)
            on_token()

    return Contender(generate, products.bytes)


class Products:
    """A graph of products that grows."""

    def __init__(self, onnx: Any, read: Callable[[str], Tensor]) -> None:
        self.onnx, self.read = onnx, read
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.kept: list[str] = []  # outputs, which are not optimized away
        self.bytes = 0

    def layer(self, x: str, prefix: str) -> str:
        """The projections of a layer; what attention would make of q, k and v is q."""
        q, k, v = (self.product(x, f"{prefix}self_attn.{each}_proj") for each in "qkv")
        self.kept += [k, v]
        x = self.product(q, f"{prefix}self_attn.o_proj")
        gate, up = (self.product(x, f"{prefix}mlp.{each}_proj") for each in ("gate", "up"))
        self.nodes.append(self.onnx.helper.make_node("Mul", [gate, up], [f"{prefix}product"]))
        return self.product(f"{prefix}product", f"{prefix}mlp.down_proj")

    def product(self, x: str, name: str) -> str:
        """A ``MatMulNBits`` with a weight of the checkpoint, padded to whole groups."""
        weight = self.read(f"{name}.weight").float()
        n, k = weight.shape
        groups = torch.nn.functional.pad(weight, (0, -k % GROUP)).view(n, -1, GROUP)
        scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-12)
        codes = (groups / scale).round_().add_(8).to(torch.uint8)
        packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
        for suffix, tensor in (("codes", packed), ("scale", scale.flatten())):
            self.weights.append(self.onnx.numpy_helper.from_array(tensor.numpy(), f"{name}.{suffix}"))
            self.bytes += tensor.nbytes
        options = {"K": k, "N": n, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
        inputs = [x, f"{name}.codes", f"{name}.scale"]
        self.nodes.append(
            self.onnx.helper.make_node("MatMulNBits", inputs, [name], domain="com.microsoft", **options)
        )
        return name

    def model(self, hidden: int) -> Any:
        """The model: ``x`` fp32 ``[rows, hidden]`` to the outputs that are kept."""
        helper, fp32 = self.onnx.helper, self.onnx.TensorProto.FLOAT
        outputs = [helper.make_tensor_value_info(name, fp32, None) for name in self.kept]
        x = helper.make_tensor_value_info("x", fp32, ["rows", hidden])
        graph = helper.make_graph(self.nodes, "step", [x], outputs, self.weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)
