"""What tests of the fused token share: a model's weights and prompts for it."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fastgpt import GPTModel, KVCache, use_backend


def wide_tiles(monkeypatch: Any) -> None:
    """For whole generations in the interpreter, which pays by the program."""
    for name in ("ROWS", "PROJECT_ROWS", "HEAD_ROWS"):
        monkeypatch.setattr(importlib.import_module("fastgpt_kernels.decode_token"), name, 64)


def token_weights(ops: Any, model: GPTModel) -> Any:
    """The model's parameters as `ops.TokenWeights`; of a quantized one the integers with their scales."""

    def pair(weight, bias):
        return weight.detach(), None if bias is None else bias.detach()

    layers, scales = [], []
    for block in model.trf_blocks:
        att, up, down = block.att, block.ff.layers[0], block.ff.layers[2]
        square = (att.W_query, att.W_key, att.W_value, att.out_proj)
        first, second = (pair(norm.scale, norm.shift) for norm in (block.norm1, block.norm2))
        parts = [first, *(pair(m.weight, m.bias) for m in square), second]
        parts += [pair(m.weight, m.bias) for m in (up, down)]
        layers.append(ops.LayerWeights(*(t for part in parts for t in part)))
        if hasattr(up, "scale"):
            scales.append(ops.LayerScales(*(m.scale for m in (*square, up, down))))
    tables, head = (model.tok_emb.weight.detach(), model.pos_emb.weight.detach()), model.out_head
    ends = *pair(model.final_norm.scale, model.final_norm.shift), *pair(head.weight, head.bias)
    return ops.TokenWeights(*tables, tuple(layers), *ends, *((tuple(scales), head.scale) if scales else ()))


def prefilled(model: GPTModel, prompts: list[list[int]], capacity: int) -> KVCache:
    """A cache of the prompts, right-padded and cut, by the reference path."""
    cache = KVCache(model.config, len(prompts), capacity, model.tok_emb.weight.dtype, model.device)
    padded = torch.tensor([p + [0] * (max(map(len, prompts)) - len(p)) for p in prompts], device=model.device)
    with torch.no_grad(), use_backend("reference"):
        model(padded, cache=cache)
    cache.truncate([len(p) for p in prompts])
    return cache
