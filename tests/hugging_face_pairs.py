"""What tests of transformers' models share: a tiny one, the same accelerated, and when their numbers are the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import spread
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from fastgpt.compat.huggingface import accelerate  # noqa: E402

END = 100  # the end-of-text token
# transformers 5.23 says so of the name that PEFT 0.21 uses, and that 5.17 has alone.
RENAMED = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated and will be removed in v6:FutureWarning"
)
HEAD_8 = {"n_embd": 32, "n_head": 4}
HEAD_64 = {"n_embd": 128, "n_head": 2}


def hf_model(seed: int = 0, dropout: float = 0.0, kind: str = "GPT2LMHeadModel", **changes: Any) -> Any:
    """A tiny random model in eval mode whose argmaxes have margins and whose attention is far from uniform."""
    sizes = {"vocab_size": 101, "n_positions": 32, "n_layer": 2, **HEAD_8, **changes}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    config = transformers.GPT2Config(bos_token_id=END, eos_token_id=END, **{**drops, **sizes})
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config).eval()
    spread(model)
    with torch.no_grad():
        for block in model.base_model.h:
            block.attn.c_attn.weight.mul_(24.0 / config.n_embd**0.5)
    return model


def pair(**changes: Any) -> tuple[Any, Any]:
    """(transformers' own, the same accelerated)"""
    model = hf_model(**changes)
    return model, accelerate(copy.deepcopy(model))


def ids(B: int, T: int, seed: int = 1) -> Tensor:
    return torch.randint(0, END, (B, T), generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of the largest value; fp32 sums in another order differ by some 3e-7 of it."""
    error = (a.detach() - b.detach()).abs().max().item()
    assert error <= tolerance * b.detach().abs().max().item(), error


def step(model: Any, **inputs: Any) -> Any:
    """Forward in training mode with a fixed seed, and backward."""
    model.train().zero_grad()
    torch.manual_seed(5)
    out = model(**inputs)
    out.loss.backward()
    return out


def same_gradients(model: Any, other: Any, tolerance: float = 1e-5) -> None:
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            close(b.grad, a.grad, tolerance)


def padded_batch(side: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    rows = [ids(1, n, n)[0] for n in (5, 9, 12)]
    x, mask = torch.full((3, 12), END), torch.zeros(3, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(12 - len(row), 12) if side == "left" else slice(0, len(row))
        x[i, where], mask[i, where] = row, 1
    return x, mask, rows
