"""nanoGPT's model, written afresh from its description as an oracle: fused c_attn, tied head, exact GELU, scaled init.

https://github.com/karpathy/nanoGPT/blob/master/model.py (MIT) says which layers there are, what they are called, in which order
they are drawn and where dropout is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool, dropout: float, gelu: str) -> None:
        super().__init__()
        self.heads, self.p, self.gelu = heads, dropout, gelu
        self.ln_1 = Norm(width, bias)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(width, 3 * width, bias), "c_proj": nn.Linear(width, width, bias)}
        )
        self.ln_2 = Norm(width, bias)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width, bias), "c_proj": nn.Linear(4 * width, width, bias)}
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for part in self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)
        )
        scores = (q @ k.mT) / math.sqrt(C // self.heads)
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        seen = F.dropout(scores.softmax(-1), self.p, self.training) @ v
        x = x + F.dropout(self.attn["c_proj"](seen.transpose(1, 2).reshape(B, T, C)), self.p, self.training)
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate=self.gelu)
        return x + F.dropout(self.mlp["c_proj"](hidden), self.p, self.training)


class NanoGPT(nn.Module):
    def __init__(
        self,
        vocab: int,
        context: int,
        width: int,
        heads: int,
        layers: int,
        bias: bool,
        dropout: float = 0.0,
        gelu: str = "none",
    ) -> None:
        super().__init__()
        self.context, self.p = context, dropout
        parts = {"wte": nn.Embedding(vocab, width), "wpe": nn.Embedding(context, width)}
        parts["h"] = nn.ModuleList([Block(width, heads, bias, dropout, gelu) for _ in range(layers)])
        parts["ln_f"] = Norm(width, bias)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight
        self.apply(self._draw)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, 0.0, 0.02 / math.sqrt(2 * layers))

    @staticmethod
    def _draw(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx: Tensor) -> Tensor:
        tree = self.transformer
        x = F.dropout(tree["wte"](idx) + tree["wpe"](torch.arange(idx.shape[1])), self.p, self.training)
        for block in tree["h"]:
            x = block(x)
        return self.lm_head(tree["ln_f"](x))

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx: Tensor, count: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        for _ in range(count):
            logits = self(idx[:, -self.context :])[:, -1] / temperature
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, logits.shape[-1])).values[:, [-1]]] = -math.inf
            idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), dim=1)
        return idx
