"""Triton kernels for GPT-2-family models, forward and backward, behind the signatures of `fastgpt.reference`."""

from fastgpt_kernels.attention import attention, packed_attention
from fastgpt_kernels.cross_entropy import (
    cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_with_statistics,
)
from fastgpt_kernels.decode import decode_attention
from fastgpt_kernels.dropout import dropout_add
from fastgpt_kernels.embedding import embedding
from fastgpt_kernels.gelu import bias_gelu, gelu
from fastgpt_kernels.layer_norm import add_layer_norm, layer_norm
from fastgpt_kernels.linear import linear, mlp
from fastgpt_kernels.softmax import softmax

__all__ = [
    "add_layer_norm",
    "attention",
    "bias_gelu",
    "cross_entropy",
    "decode_attention",
    "dropout_add",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_with_statistics",
    "mlp",
    "packed_attention",
    "softmax",
]
