"""What tests of checkpoints share: transformers' model, its ids, and when weights or logits are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fastgpt import GPTModel
from fastgpt.checkpoints.names import expected_shapes

IDS = torch.randint(0, 101, (2, 16), generator=torch.Generator().manual_seed(7))


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {
        name: (t.dtype, t.shape, t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def rows(model: GPTModel) -> dict[str, Tensor]:
    """A model's state dict with vocab_size rows and a tied head once."""
    shapes = expected_shapes(model.config)
    return {name: tensor[: shapes[name][0]] for name, tensor in model.state_dict().items() if name in shapes}


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-5)


def hugging_face(**changes: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": 101, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
