"""nanoGPT's architecture as its users run it: one QKV projection, flash SDPA, a tied head over 50,304 rows; written afresh.

https://github.com/karpathy/nanoGPT/blob/master/model.py (MIT) says which layers there are. GELU is the tanh form here, so that
it computes the same function as GPT-2 and its losses can be checked; nanoGPT's erf form costs the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import GPTModel

PADDED_VOCABULARY = 64  # rows come in multiples of this


class Block(nn.Module):
    """Pre-norm attention and feed-forward on a residual stream [B, T, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.attn_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.mlp_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class NanoGPT(nn.Module):
    """forward(idx, targets) -> loss, as nanoGPT's; forward(idx) -> logits of the last position [B, 1, V]."""

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        rows = -(-vocabulary // PADDED_VOCABULARY) * PADDED_VOCABULARY
        self.vocabulary = vocabulary
        self.wte, self.wpe = nn.Embedding(rows, width), nn.Embedding(context, width)
        self.h = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, rows, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:])[..., : self.vocabulary]
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), targets.flatten(), ignore_index=-1)


@torch.no_grad()
def from_fastgpt(model: GPTModel) -> NanoGPT:
    """The same function of the same weights; rows that only padding adds are zero."""
    config = model.config
    shape = config.vocab_size, config.context_length, config.emb_dim, config.n_heads, config.n_layers
    with torch.device(model.device):
        nano = NanoGPT(*shape).to(model.tok_emb.weight.dtype)
    nano.wte.weight.zero_()[: config.vocab_size] = model.tok_emb.weight[: config.vocab_size]
    nano.wpe.weight.copy_(model.pos_emb.weight)
    for block, ours in zip(nano.h, model.trf_blocks, strict=True):
        att, up, down = ours.att, ours.ff.layers[0], ours.ff.layers[2]
        qkv = (att.W_query, att.W_key, att.W_value)
        block.c_attn.weight.copy_(torch.cat([linear.weight for linear in qkv]))
        block.c_attn.bias.copy_(torch.cat([linear.bias for linear in qkv]))
        for theirs, mine in ((block.attn_proj, att.out_proj), (block.c_fc, up), (block.mlp_proj, down)):
            theirs.load_state_dict(mine.state_dict())
        _copy_norm(block.ln_1, ours.norm1)
        _copy_norm(block.ln_2, ours.norm2)
    _copy_norm(nano.ln_f, model.final_norm)
    return nano


def _copy_norm(norm: nn.LayerNorm, ours: nn.Module) -> None:
    norm.weight.copy_(ours.scale)
    norm.bias.copy_(ours.shift)
