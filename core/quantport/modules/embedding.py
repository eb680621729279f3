"""An embedding with a quantized weight, and the output head that may share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantport.kernels.base import Kernel, WeightSpec
from quantport.kernels.embedding import embedding_kernels, look_up
from quantport.modules import ops
from quantport.modules.base import EMPTY_WEIGHT, QuantModule
from quantport.modules.weight_view import WeightView
from quantport.plugins.registry import Registry


class QuantEmbedding(QuantModule):
    """Looks up rows of a quantized weight and dequantizes those; stands where ``torch.nn.Embedding`` stood.

    Args:
        kernel: One that keeps the stored layout; a tied output head multiplies by it.
        spec: Scheme and shape [num_embeddings, embedding_dim].
        dtype: Of the rows that it returns.
        tied: Names of the output heads that share the weight.
        padding_idx: As ``nn.Embedding`` has it, for code that asks; it matters to gradients only.
        registry: As for ``QuantModule``.
    """

    def __init__(
        self,
        kernel: Kernel,
        spec: WeightSpec,
        dtype: torch.dtype = torch.bfloat16,
        tied: Sequence[str] = (),
        padding_idx: int | None = None,
        registry: Registry | None = None,
    ) -> None:
        super().__init__(kernel, {"": spec}, "linear", dtype, registry=registry)
        self.num_embeddings, self.embedding_dim, self.padding_idx = spec.n, spec.k, padding_idx
        self.spec, self.tied = spec, tuple(tied)

    def forward(self, ids: Tensor) -> Tensor:
        """Integer ``[...]`` to ``[..., embedding_dim]`` in ``dtype``."""
        packed = self.packed()
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.quantport.embedding(ids, packed, self.bound[""].handle, self.dtype)
            return y
        return look_up(self.kernel_of(""), ids, packed, self.spec, self.dtype)

    @property
    def weight(self) -> WeightView:
        """Shape, dtype and device of the weight. It is no tensor."""
        return WeightView(torch.Size((self.num_embeddings, self.embedding_dim)), self.dtype, self.device)

    def _usable(self, kernels: Sequence[Kernel]) -> Sequence[Kernel]:
        return embedding_kernels(kernels, bool(self.tied))

    def extra_repr(self) -> str:
        """Shape, scheme and kernel."""
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}, kernel={self.kernel.name}"


class TiedLinear(nn.Linear):
    """An output head that multiplies by the weight of a quantized embedding. It holds none of its own.

    Args:
        embedding: Holds the weight, and the kernel.
        bias: ``[n]`` or None.
    """

    def __init__(self, embedding: QuantEmbedding, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        # in a tuple, so that it is a reference and no submodule: moved and counted once
        self._embedding = (embedding,)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", bias)

    @property
    def embedding(self) -> QuantEmbedding:
        """The module that holds the weight."""
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``x``."""
        source = self._embedding[0]
        return ops.linear(source.bound[""], x, source.packed(), self._parameters["bias"])

    @property
    def weight(self) -> WeightView:  # type: ignore[override]  # of nn.Linear it is a Parameter
        """Shape, dtype and device of the weight. It is no tensor."""
        return self.embedding.weight

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As of ``nn.Module``, and the empty weight of the embedding: it is asked for, but not held here."""
        yield from super().parameters(recurse)
        if recurse and EMPTY_WEIGHT in self.embedding._parameters:
            yield self.embedding.get_parameter(EMPTY_WEIGHT)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update((prefix + key, tensor) for key, tensor in self.embedding.stored_tensors())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        spec = self.embedding.spec
        # the embedding loads them under its own name
        keys = {prefix + key for key in spec.scheme.layout(spec.n, spec.k)}
        rest = {key: value for key, value in state_dict.items() if key not in keys}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        """Shape, scheme and kernel."""
        source = self.embedding
        return (
            f"{self.in_features}, {self.out_features}, tied, scheme={source.scheme}, "
            f"kernel={source.kernel.name}"
        )
