"""What tests beside the package llms_from_scratch share: its modules, and pairs of models with the same weights."""

from __future__ import annotations

import pytest
import torch
from models import TINY, spread

from fastgpt.compat.llms_from_scratch import GPTModel, KVCache

ch02, ch04, ch05, appendix_e, kv_cache = (
    pytest.importorskip(f"llms_from_scratch.{name}", reason="needs llms_from_scratch and matplotlib, which it imports")
    for name in ("ch02", "ch04", "ch05", "appendix_e", "kv_cache.utils")
)
V, T = TINY["vocab_size"], TINY["context_length"]
ATOL = 2e-5  # fp32 beside fp32; two formulations of upstream's own model differ by 2e-6


def twins(seed=123, kind=ch04.GPTModel, **changes):
    """(upstream, ours) with the same weights, away from their initial values, in eval mode."""
    cfg = {**TINY, **changes}
    torch.manual_seed(seed)
    upstream = kind(cfg).eval()
    spread(upstream)
    model = GPTModel(cfg).eval()
    model.load_state_dict(upstream.state_dict())
    return upstream, model


def ids(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def same_logits(model, upstream, idx=None):
    idx = ids(2, 9) if idx is None else idx
    torch.testing.assert_close(model(idx), upstream(idx), rtol=0, atol=ATOL)


def margins(model, tokens, start, context=T):
    """The smallest lead of a greedy choice over the next best, for tokens from position `start` on."""
    leads = []
    for end in range(start, tokens.shape[1]):
        best = model(tokens[:, max(end - context, 0) : end])[:, -1].topk(2).values
        leads.append((best[:, 0] - best[:, 1]).min().item())
    return min(leads)


class Letters:
    """A tokenizer with the two methods that the book uses."""

    def encode(self, text, allowed_special=None):
        return [ord(character) % V for character in text]

    def decode(self, tokens):
        return "".join(chr(33 + token) for token in tokens)


def caches(kind, model):
    """A way of calling model with a fresh cache of one of the three kinds."""
    if kind == "own":
        model.reset_kv_cache()
        return lambda idx: model(idx, use_cache=True)
    cache = {"ours": KVCache, "upstreams": kv_cache.KVCache}[kind](n_layers=2)
    return lambda idx: model(idx, cache=cache)


def loaders():
    train = [(ids(4, 12, seed=s), ids(4, 12, seed=s + 50)) for s in range(5)]
    return train, [(ids(4, 12, seed=99), ids(4, 12, seed=98))]
