"""One token a row on a CPU without calling the modules, at the speed at which the weights can be read.

A token of GPT-2 124M in fp32 reads 498 MB of weights, and that is the floor; calling some 150 modules adds a fifth to it.
`decode` makes a block a dozen torch calls: the reference's arithmetic in the reference's order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.inference.cache import KVCache
from fastgpt.plan import Plan
from fastgpt.reference import activate, decode_attention, int8_linear


def decode(
    x: Tensor, plan: Plan, cache: KVCache, starts: list[int], n_heads: int, activation: str, eps: float
) -> Tensor:
    """The blocks' output [B, C] for embeddings x [B, C] of one new token a row; appends to the cache at each row's start."""
    B, C = x.shape
    uniform = len(set(starts)) == 1
    for layer, block in enumerate(plan.blocks):
        *qkv_scales, out_scale, up_scale, down_scale = block.scales or (None,) * 6
        y = torch.layer_norm(x, (C,), *block.norm1, eps)
        projections = zip(block.qkv, qkv_scales, strict=True)
        q, k, v = (_affine(y, *pair, scale).view(B, n_heads, 1, C // n_heads) for pair, scale in projections)
        keys, values = cache.write(layer, starts, k, v)
        if uniform:
            out = F.scaled_dot_product_attention(q, keys, values)
        else:
            out = decode_attention(q, keys, values, cache.device_lengths)
        x = _affine(out.reshape(B, C), *block.out, out_scale).add_(x)
        y = torch.layer_norm(x, (C,), *block.norm2, eps)
        x = _affine(activate(_affine(y, *block.up, up_scale), activation), *block.down, down_scale).add_(x)
    return x


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    if scale is not None:
        return int8_linear(x, weight.T, scale, bias)
    if len(x) == 1 and x.dtype == torch.bfloat16:
        # Torch's product of a bf16 row with a matrix takes a fifth longer than that of the matrix with a vector.
        y = torch.mv(weight.T, x[0])
        return (y if bias is None else y.add_(bias))[None]
    return x @ weight if bias is None else torch.addmm(bias, x, weight)
