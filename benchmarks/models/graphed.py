"""The decode loop that a CUDA programmer writes by hand: cuBLAS, SDPA and a static KV cache, one step captured in a CUDA graph.

A peer for generation, from the same weights, with nothing of fastgpt's decoding in it. Without a GPU (dry runs) the same step
runs uncaptured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import GPTModel
from fastgpt.graphs import capture


def logits(
    idx: Tensor,
    positions: Tensor,
    visible: Tensor,
    tables: tuple[Tensor, Tensor],
    blocks: Sequence[tuple[Tensor, ...]],
    final: tuple[Tensor, Tensor],
    head: Tensor,
    keys: Tensor,
    values: Tensor,
    eps: float,
) -> Tensor:
    """[B, V] behind idx [B, T] at `positions` [T], whose keys and values join the cache [L, B, H, S, D].

    blocks: of each norm, QKV packed, projection, norm, up, down, weight and bias. visible: mask of the cache, [1, 1, T or 1, S].
    """
    (B, T), (_, _, H, _, D) = idx.shape, keys.shape
    x = F.embedding(idx, tables[0]) + F.embedding(positions, tables[1])
    for layer, (norm1, shift1, qkv, qkv_bias, out, out_bias, norm2, shift2, up, up_bias, down, down_bias) in enumerate(
        blocks
    ):
        y = F.layer_norm(x, (H * D,), norm1, shift1, eps)
        q, k, v = F.linear(y, qkv, qkv_bias).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        keys[layer].index_copy_(2, positions, k)
        values[layer].index_copy_(2, positions, v)
        y = F.scaled_dot_product_attention(q, keys[layer], values[layer], attn_mask=visible)
        x = x + F.linear(y.transpose(1, 2).reshape(B, T, H * D), out, out_bias)
        y = F.layer_norm(x, (H * D,), norm2, shift2, eps)
        x = x + F.linear(F.gelu(F.linear(y, up, up_bias), approximate="tanh"), down, down_bias)
    return F.linear(F.layer_norm(x[:, -1], (H * D,), *final, eps), head)


class GraphedLoop:
    """generate(idx [B, T], n) -> [B, T + n], greedy, T + n at most the context."""

    def __init__(self, model: GPTModel, batch: int) -> None:
        config = self.config = model.config
        weight = model.tok_emb.weight
        options = {"device": weight.device, "dtype": weight.dtype}
        shape = (config.n_layers, batch, config.n_heads, config.context_length, config.head_dim)
        self.keys, self.values = torch.zeros(shape, **options), torch.zeros(shape, **options)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=weight.device)
        self.position = torch.zeros(1, dtype=torch.long, device=weight.device)
        self.slots = torch.arange(config.context_length, device=weight.device)
        self.wte, self.wpe, self.head = weight, model.pos_emb.weight, model.out_head.weight
        self.final = model.final_norm
        self.blocks = []
        for block in model.trf_blocks:
            att, up, down = block.att, block.ff.layers[0], block.ff.layers[2]
            qkv = [(linear.weight, linear.bias) for linear in (att.W_query, att.W_key, att.W_value)]
            norms = [(norm.scale, norm.shift) for norm in (block.norm1, block.norm2)]
            packed = [torch.cat(parts) for parts in zip(*qkv, strict=True)]
            out, up, down = ((linear.weight, linear.bias) for linear in (att.out_proj, up, down))
            self.blocks.append((*norms[0], *packed, *out, *norms[1], *up, *down))
        self.replay: Callable[[], None] | None = None

    def _forward(self, idx: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Writes keys and values at `positions` [T]; -> ids [B, 1] of the likeliest next tokens."""
        final, tables = (self.final.scale, self.final.shift), (self.wte, self.wpe)
        cache, eps = (self.keys, self.values), self.config.norm_eps
        scores = logits(idx, positions, visible, tables, self.blocks, final, self.head, *cache, eps)
        return scores[:, None, : self.config.vocab_size].argmax(-1)

    def _step(self) -> None:
        """One token: reads and writes `token` and `position`, so that it can be replayed."""
        visible = (self.slots <= self.position)[None, None, None]
        self.token.copy_(self._forward(self.token, self.position, visible))
        self.position.add_(1)

    def capture(self) -> Callable[[], None]:
        """What makes a token from `token` and `position`: the graph's replay, or without a GPU the step itself."""
        if not self.token.is_cuda:
            return self._step
        if self.replay is None:
            moved = [self.token, self.position]
            self.replay, _ = capture(self._step, self.token.device, moved=moved, warmups=3)
        return self.replay

    @torch.no_grad()
    def generate(self, idx: Tensor, new_tokens: int) -> Tensor:
        T = idx.shape[1]
        positions = torch.arange(T, device=idx.device)
        visible = (self.slots <= positions[:, None])[None, None]
        self.token.copy_(self._forward(idx, positions, visible))
        self.position.fill_(T)
        replay = self.capture()
        ids = [idx, self.token.clone()]
        for _ in range(new_tokens - 1):
            replay()
            ids.append(self.token.clone())
        return torch.cat(ids, dim=1)[:, : T + new_tokens]
