"""The fused decode step against the model in float64, token after token."""

from __future__ import annotations

import importlib

import pytest
import torch
from compare import assert_as_accurate_as_torch
from models import tiny_config, tiny_model
from mutants import mutant

from fastgpt import GPTModel, KVCache, use_backend

module = importlib.import_module("fastgpt_kernels.decode_token")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

STEPS = 3


def small_splits(target):
    """Splits so small that contexts which the interpreter can bear have several, of which short rows leave some empty."""
    target.SPLIT_KEYS = 16
    return target


@pytest.fixture(autouse=True)
def _small_splits(request, monkeypatch):
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(module, "SPLIT_KEYS", 16)


def token_weights(ops, model: GPTModel):
    def linear(module):
        return module.weight.detach(), None if module.bias is None else module.bias.detach()

    def norm(module):
        return module.scale.detach(), None if module.shift is None else module.shift.detach()

    layers = []
    for block in model.trf_blocks:
        att, ff = block.att, block.ff.layers
        parts = [norm(block.norm1), *(linear(m) for m in (att.W_query, att.W_key, att.W_value, att.out_proj))]
        parts += [norm(block.norm2), linear(ff[0]), linear(ff[2])]
        layers.append(ops.LayerWeights(*(t for part in parts for t in part)))
    tables = model.tok_emb.weight.detach(), model.pos_emb.weight.detach()
    return ops.TokenWeights(*tables, tuple(layers), *norm(model.final_norm), *linear(model.out_head))


def prefilled(model: GPTModel, prompts: list[list[int]], capacity: int) -> KVCache:
    """A cache of the prompts, right-padded and cut, by the reference path."""
    device, dtype = model.tok_emb.weight.device, model.tok_emb.weight.dtype
    cache = KVCache(model.config, len(prompts), capacity, dtype, device)
    padded = torch.tensor([p + [0] * (max(map(len, prompts)) - len(p)) for p in prompts], device=device)
    with torch.no_grad(), use_backend("reference"):
        model(padded, cache=cache)
    cache.truncate([len(p) for p in prompts])
    return cache


@torch.no_grad()
def run(ops, model: GPTModel, prompts, tokens, capacity: int):
    """Logits [STEPS, B, V] and the caches of feeding tokens [STEPS, B] after the prompts; unused cache is NaN."""
    cache, config = prefilled(model, prompts, capacity), model.config
    for row, prompt in enumerate(prompts):
        cache.keys[:, row, :, len(prompt) :] = cache.values[:, row, :, len(prompt) :] = torch.nan
    weights = token_weights(ops, model)
    buffers = ops.token_buffers(weights, len(prompts), config.n_heads, capacity, config.vocab_size)
    for buffer in buffers:
        buffer.fill_(torch.nan)
    positions = cache.device_lengths.clone()
    logits = [
        ops.decode_token(
            step, positions, weights, cache.keys, cache.values, buffers, config.activation, config.norm_eps
        ).clone()
        for step in tokens
    ]
    assert positions.tolist() == [len(p) + len(tokens) for p in prompts]
    return torch.stack(logits), cache


@torch.no_grad()
def reference(model: GPTModel, prompts, tokens, capacity: int):
    cache = prefilled(model, prompts, capacity)
    with use_backend("reference"):
        return torch.stack([model(step[:, None], cache=cache)[:, 0] for step in tokens]), cache


def compare(ops, model: GPTModel, prompts, capacity: int) -> None:
    tokens = torch.randint(model.config.vocab_size, (STEPS, len(prompts)), device=model.tok_emb.weight.device)
    double = GPTModel(model.config).to(tokens.device, torch.float64).eval()
    double.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    exact, exact_cache = reference(double, prompts, tokens, capacity)
    theirs, their_cache = reference(model, prompts, tokens, capacity)
    ours, cache = run(ops, model, prompts, tokens, capacity)
    assert_as_accurate_as_torch(ours.to(theirs.dtype), theirs, exact, "logits")
    for row, length in enumerate(cache.device_lengths.tolist()):
        for name in ("keys", "values"):
            new = [getattr(c, name)[:, row, :, length : length + STEPS] for c in (cache, their_cache, exact_cache)]
            assert_as_accurate_as_torch(*new, f"new {name} of row {row}")


SHAPES = {
    "one row": ({}, [[5, 6, 7]]),
    "ragged rows, several splits": ({"context_length": 48}, [[3] * 40, [9], [4, 5] * 8]),
    "odd width and heads": ({"emb_dim": 66, "n_heads": 3, "context_length": 24}, [[1, 2], [3] * 20]),
    "heads of 80": ({"emb_dim": 160, "n_heads": 2, "n_layers": 1}, [[1, 2, 3]]),
    "no biases, untied head, exact GELU": ({"bias": False, "qkv_bias": False, "activation": "gelu"}, [[1], [2, 3]]),
    "head bias, ReLU": ({"head_bias": True, "tie_weights": False, "activation": "relu"}, [[1, 2]]),
    "eight rows": ({"n_layers": 1}, [[7] * n for n in range(1, 9)]),
}


def shaped_model(changes, dtype=torch.float32, device="cpu") -> GPTModel:
    settings = {"qkv_bias": True, "tie_weights": True} | changes
    return tiny_model(**settings).to(device, dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_decode_token(name, dtype, device):
    changes, prompts = SHAPES[name]
    model = shaped_model(changes, dtype, device)
    compare(module, model, prompts, model.config.context_length)
