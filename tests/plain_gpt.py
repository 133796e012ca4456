"""GPT-2 out of torch.nn's modules and F alone, to train beside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import GPTModel


class Plain(nn.Module):
    """The same GPT, with nothing but nn modules and F."""

    def __init__(self, source: GPTModel) -> None:
        super().__init__()
        size, C = source.config, source.config.emb_dim
        self.wte, self.wpe = nn.Embedding(size.vocab_size, C), nn.Embedding(size.context_length, C)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln1": nn.LayerNorm(C),
                    "attention": nn.MultiheadAttention(C, size.n_heads, batch_first=True),
                    "ln2": nn.LayerNorm(C),
                    "up": nn.Linear(C, 4 * C),
                    "down": nn.Linear(4 * C, C),
                }
            )
            for _ in range(size.n_layers)
        )
        self.ln = nn.LayerNorm(C)
        state = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
        places = {"wte.weight": "tok_emb.weight", "wpe.weight": "pos_emb.weight", "ln.weight": "final_norm.scale"}
        places["ln.bias"] = "final_norm.shift"
        mine = {name: state[theirs] for name, theirs in places.items()}
        for i in range(size.n_layers):
            ours, theirs = f"blocks.{i}.", f"trf_blocks.{i}."
            for kind in ("weight", "bias"):
                parts = [state[f"{theirs}att.W_{part}.{kind}"] for part in ("query", "key", "value")]
                mine[f"{ours}attention.in_proj_{kind}"] = torch.cat(parts)
                mine[f"{ours}attention.out_proj.{kind}"] = state[f"{theirs}att.out_proj.{kind}"]
                mine[f"{ours}up.{kind}"] = state[f"{theirs}ff.layers.0.{kind}"]
                mine[f"{ours}down.{kind}"] = state[f"{theirs}ff.layers.2.{kind}"]
                norm = "scale" if kind == "weight" else "shift"
                mine[f"{ours}ln1.{kind}"] = state[f"{theirs}norm1.{norm}"]
                mine[f"{ours}ln2.{kind}"] = state[f"{theirs}norm2.{norm}"]
        self.load_state_dict(mine)

    def forward(self, idx: Tensor, drop: float = 0.0) -> Tensor:
        T = idx.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        x = F.dropout(self.wte(idx) + self.wpe.weight[:T], drop)
        for block in self.blocks:
            y = block["ln1"](x)
            x = x + F.dropout(block["attention"](y, y, y, attn_mask=mask, need_weights=False)[0], drop)
            x = x + F.dropout(block["down"](F.gelu(block["up"](block["ln2"](x)), approximate="tanh")), drop)
        return self.ln(x) @ self.wte.weight.T
