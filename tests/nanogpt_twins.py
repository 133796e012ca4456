"""What tests beside nanoGPT share: its model written afresh and ours with the same weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from models import spread
from nanogpt_oracle import NanoGPT
from torch import nn

from fastgpt.compat.nanogpt import GPT, GPTConfig

SIZES = {"block_size": 16, "vocab_size": 96, "n_layer": 2, "n_head": 4, "n_embd": 32}


def oracle(bias: bool = True, dropout: float = 0.0, gelu: str = "none") -> NanoGPT:
    return NanoGPT(96, 16, 32, 4, 2, bias, dropout, gelu)


def twins(bias: bool = True, dropout: float = 0.0, **changes) -> tuple[NanoGPT, GPT]:
    """(oracle, ours) with the same weights, spread so that argmaxes have margins."""
    theirs = oracle(bias, dropout)
    spread(theirs)
    ours = GPT(GPTConfig(**SIZES, bias=bias, dropout=dropout, **changes))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tokens(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(96, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, rtol: float = 1e-4) -> None:
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert error < rtol, f"{name}: {error:.1e}"


def seeded(call, seed: int = 5):
    torch.manual_seed(seed)
    return call()


class LoRA(nn.Module):
    """A Linear and a low-rank update beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.randn(2, linear.in_features))
        self.B = nn.Parameter(torch.randn(linear.out_features, 2))
        self.lengths: list[int] = []

    def forward(self, x):
        self.lengths.append(x.shape[1])
        return self.linear(x) + F.linear(F.linear(x, self.A), self.B) * 0.05
