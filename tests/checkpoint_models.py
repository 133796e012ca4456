"""What tests of checkpoints share: models of both kinds, files of them, and when weights or logits are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from models import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fastgpt import GPTModel
from fastgpt.checkpoints.names import expected_shapes

IDS = torch.randint(0, 101, (2, 16), generator=torch.Generator().manual_seed(7))


def bits(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {
        name: (t.dtype, t.shape, t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return bits(a) == bits(b)


def rows(model: GPTModel) -> dict[str, Tensor]:
    """A model's state dict with vocab_size rows and a tied head once."""
    shapes = expected_shapes(model.config)
    return {name: tensor[: shapes[name][0]] for name, tensor in model.state_dict().items() if name in shapes}


def close(ours: Tensor, theirs: Tensor) -> None:
    """Within roundings of the largest value: a tied model reaches 75, and another order of sums moves it by 3e-7 of that."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max().item()
    assert error <= 3e-6 * theirs.abs().max().item(), error


def hugging_face(**changes: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": 101, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def sharp(**changes: Any) -> GPTModel:
    """A tiny model whose logits depend on every weight, with a norm epsilon and square matrices that can't be mistaken."""
    return tiny_model(**{"norm_eps": 0.01, **changes})


def theirs(**changes: Any) -> GPT2LMHeadModel:
    """transformers' GPT-2 of the sizes and the epsilon of `sharp`."""
    return hugging_face(layer_norm_epsilon=0.01, **changes)


def read(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())


def write(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory
