"""Small models for tests, with weights spread so that argmaxes have margins."""

from __future__ import annotations

from typing import Any

import torch

from fastgpt import GPTConfig, GPTModel

TINY = {
    "vocab_size": 101,
    "context_length": 16,
    "emb_dim": 32,
    "n_heads": 4,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": True,
}


def tiny_config(**changes: Any) -> GPTConfig:
    return GPTConfig.from_dict({**TINY, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> GPTModel:
    """A tiny GPTModel in eval mode whose biases, norms and weights are all away from their initial values."""
    torch.manual_seed(seed)
    model = GPTModel(tiny_config(**changes)).eval()
    spread(model)
    return model


@torch.no_grad()
def spread(model: torch.nn.Module) -> None:
    """Triple the matrices and shake the vectors, in place."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.mul_(3.0)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
