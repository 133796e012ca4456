"""One token a row on a CPU without calling the modules, at the speed at which the weights can be read.

A token of GPT-2 124M in fp32 reads 498 MB of weights, and that is the floor; calling some 150 modules adds a fifth to it.
`decode` makes a block a dozen torch calls: the reference's arithmetic in the reference's order, its products by `ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.inference.cache import KVCache
from fastgpt.plan import Plan
from fastgpt.reference import activate, decode_attention


def decode(
    x: Tensor, plan: Plan, cache: KVCache, starts: list[int], n_heads: int, activation: str, eps: float
) -> Tensor:
    """The blocks' output [B, C] for embeddings x [B, C] of one new token a row; appends to the cache at each row's start."""
    B, C = x.shape
    uniform = len(set(starts)) == 1
    plain = plan.obstacle is None and plan.contiguous and all(type(t) in (Tensor, nn.Parameter) for t in plan.tensors)
    multiply = ops.product(x) if plain else ops.linear

    def product(linear: nn.Module, x: Tensor) -> Tensor:
        if type(linear) is nn.Linear:
            return multiply(x, linear.weight, linear.bias)
        return linear.forward(x)  # of rounded weights

    for layer, block in enumerate(plan.blocks):
        *qkv, out, up, down = block.linears
        y = torch.layer_norm(x, (C,), *block.norm1, eps)
        q, k, v = (product(linear, y).view(B, n_heads, 1, C // n_heads) for linear in qkv)
        keys, values = cache.write(layer, starts, k, v)
        q = q.to(keys.dtype)
        if uniform:
            heads = F.scaled_dot_product_attention(q, keys, values)
        else:
            heads = decode_attention(q, keys, values, cache.device_lengths)
        x = product(out, heads.reshape(B, C).to(x.dtype)).add_(x)
        y = torch.layer_norm(x, (C,), *block.norm2, eps)
        x = product(down, activate(product(up, y), activation)).add_(x)
    return x
