"""What a device may bring for the quantized KV cache: rows made and attended to as they are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from quantport.scheme import Quant


class KVKernel(ABC):
    """Operators of one kind of device over rows of the cache (``quantport.kvcache.rows``). Stateless.

    Rows are uint8 ``[batch, heads, tokens, row bytes]``: those of a head lie one behind the other, heads need
    not.
    """

    @abstractmethod
    def serves(self, quant: Quant, key_width: int, value_width: int, dtype: torch.dtype) -> bool:
        """Whether it is for heads of these widths, quantized so, in a model of this dtype. It is asked once
        for each layer of a cache; where it says no, rows are read back and torch attends.
        """

    @abstractmethod
    def encode(self, states: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor], quant: Quant) -> None:
        """Writes what ``quantport.kvcache.encode`` returns, byte for byte; but for the codes of rows with a
        NaN or an Inf, whose scale is NaN.

        Args:
            states: Keys and values ``[batch, heads, tokens, width]``.
            rows: Where to write.
            quant: How.
        """

    @abstractmethod
    def attend(
        self, query: Tensor, rows: tuple[Tensor, Tensor], quant: Quant, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Computes ``scaled_dot_product_attention`` of a few query rows over what is stored, ``code * scale``
        unrounded, in fp32.

        Args:
            query: ``[batch, heads * n, q_tokens, key width]``; each head of keys serves n of them.
            rows: Keys and values.
            quant: How they were quantized.
            mask: ``[batch or 1, heads * n or 1, q_tokens or 1, tokens or 1]``, bool (True attends) or of the
                dtype of ``query`` (added); None for none. A query that may attend to nothing gets zeros.
            scale: What products are multiplied by.

        Returns:
            ``[batch, heads * n, q_tokens, value width]`` in the dtype of ``query``.
        """
