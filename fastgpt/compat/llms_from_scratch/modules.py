"""The parts of the book's GPTModel by their own names (chapters 3 and 4), with its constructors and draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastgpt import layers
from fastgpt.config import REQUIRED_KEYS, GPTConfig, HeadSizeError


def _config(cfg: Mapping[str, Any]) -> GPTConfig:
    return GPTConfig.from_dict({key: cfg[key] for key in REQUIRED_KEYS if key in cfg})


class LayerNorm(layers.LayerNorm):
    """LayerNorm(emb_dim): scale and shift [emb_dim], eps 1e-5."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__(emb_dim)


class GELU(layers.Activation):
    """GELU by its tanh approximation."""

    def __init__(self) -> None:
        super().__init__("gelu_tanh")


class FeedForward(layers.FeedForward):
    """FeedForward(cfg): the book's dict."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__(_config(cfg))


class TransformerBlock(layers.TransformerBlock):
    """TransformerBlock(cfg): the book's dict."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__(_config(cfg), layer=0)


class MultiHeadAttention(layers.MultiHeadAttention):
    """Causal attention from d_in to d_out features over num_heads heads; no more than context_length positions.

    Raises AssertionError (a ValueError too) where d_out doesn't divide into the heads.
    """

    def __init__(
        self, d_in: int, d_out: int, context_length: int, dropout: float, num_heads: int, qkv_bias: bool = False
    ) -> None:
        nn.Module.__init__(self)
        if d_out % num_heads:
            raise HeadSizeError(f"d_out must be divisible by num_heads, got {d_out} and {num_heads}")
        self.num_heads, self.head_dim, self.layer, self.causal = num_heads, d_out // num_heads, 0, True
        self.context_length = context_length
        self.W_query, self.W_key, self.W_value = (nn.Linear(d_in, d_out, bias=qkv_bias) for _ in range(3))
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
