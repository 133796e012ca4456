"""One token at a time, fast: a block's work as a handful of calls, without calling its modules.

On a CPU a token of GPT-2 124M in fp32 reads 498 MB of weights, and that is the floor; calling some 150 modules adds a fifth to
it. Here a block is a dozen torch calls: the reference's arithmetic in the reference's order, on the parameters themselves, so
that nothing is copied and nothing can go stale.

What it runs from is a Plan, made by `GPTModel`, which also says when it applies: plain pre-norm blocks in eval mode, no
gradients, a KV cache, one new token a row, on a CPU. Everything else takes the modules.
"""

from __future__ import annotations

from typing import NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from fastgpt.cache import KVCache
from fastgpt.reference import activate, decode_attention

_M = TypeVar("_M", bound=nn.Module)


class BlockWeights(NamedTuple):
    """A block's parameters: norms (scale, shift or None); matrices as [in, out] views with their biases or None."""

    norm1: tuple[Tensor, Tensor | None]
    qkv: list[tuple[Tensor, Tensor | None]]
    out: tuple[Tensor, Tensor | None]
    norm2: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]


def plain(module: nn.Module, kind: type[_M]) -> TypeGuard[_M]:
    """Exactly a `kind`, with nothing that calling it would run besides its own forward."""
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class Plan:
    """The weights of all blocks, and what must not have changed since they were gathered.

    Gathering asks every module for its parts, which costs a millisecond a token at 12 layers; `holds` looks at the same things
    in a tenth of that. Values may change in place at any time: the weights are the parameters' own memory.
    """

    def __init__(self, root: nn.Module, blocks: list[BlockWeights]) -> None:
        self.blocks = blocks
        modules = list(root.modules())
        self._modules = [(module, type(module)) for module in modules]
        self._children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self._parameters = [
            (m._parameters, name, p, p.data_ptr())
            for m in modules
            for name, p in m._parameters.items()
            if p is not None
        ]

    def holds(self) -> bool:
        """Whether every module, parameter and parameter's memory is still the one gathered, and no hook was added."""
        return (
            all(plain(module, kind) for module, kind in self._modules)
            and all(children.get(name) is child for children, name, child in self._children)
            and all(owned.get(name) is p and p.data_ptr() == at for owned, name, p, at in self._parameters)
        )


def decode(
    x: Tensor, plan: Plan, cache: KVCache, starts: list[int], n_heads: int, activation: str, eps: float
) -> Tensor:
    """The blocks' output [B, C] for embeddings x [B, C] of one new token a row; appends to the cache at each row's start."""
    B, C = x.shape
    uniform = len(set(starts)) == 1
    for layer, block in enumerate(plan.blocks):
        y = torch.layer_norm(x, (C,), *block.norm1, eps)
        q, k, v = (_affine(y, *pair).view(B, n_heads, 1, C // n_heads) for pair in block.qkv)
        keys, values = cache.write(layer, starts, k, v)
        if uniform:
            out = torch.nn.functional.scaled_dot_product_attention(q, keys, values)
        else:
            out = decode_attention(q, keys, values, cache.device_lengths)
        x = _affine(out.reshape(B, C), *block.out).add_(x)
        y = torch.layer_norm(x, (C,), *block.norm2, eps)
        x = _affine(activate(_affine(y, *block.up), activation), *block.down).add_(x)
    return x


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)
