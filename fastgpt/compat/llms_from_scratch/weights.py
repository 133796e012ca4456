"""The book's way of loading OpenAI's weights: `params`, a tree of numpy arrays, into a model's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.checkpoints import layouts


def assign(left: Tensor, right: Any) -> nn.Parameter:
    """A new Parameter with a copy of right's numbers, on left's device. ValueError where the shapes differ."""
    if tuple(left.shape) != tuple(right.shape):
        raise ValueError(f"Shape mismatch. Left: {tuple(left.shape)}, Right: {tuple(right.shape)}")
    copy = right.detach().clone() if isinstance(right, Tensor) else torch.tensor(right)
    return nn.Parameter(copy if left.is_meta else copy.to(left.device))


def load_weights_into_gpt(gpt: nn.Module, params: Mapping[str, Any]) -> None:
    """Give gpt, this package's GPTModel or upstream's, new Parameters with what params holds; the head gets the tokens' weights.

    Args:
        params: as upstream's download_and_load_gpt2 returns it: wte, wpe, blocks, g and b.

    Raises ValueError with every mismatch, before anything is assigned: shapes, layers, and biases that gpt lacks (GPT-2 needs
    qkv_bias=True in cfg).
    """
    heads: Any = gpt.get_submodule("trf_blocks.0.att")
    _, tensors = layouts.from_params(params, heads.num_heads)
    tensors["out_head.weight"] = tensors["tok_emb.weight"]
    own = dict(gpt.named_parameters(remove_duplicate=False))
    problems = [f"the model has no {name}" for name in tensors if name not in own]
    problems += [f"params have nothing for {name}" for name in own if name not in tensors]
    problems += [
        f"{name} is {list(own[name].shape)} in the model, {list(tensor.shape)} in params"
        for name, tensor in tensors.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"params don't fit the model in {len(problems)} places:\n  " + "\n  ".join(problems))
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        setattr(gpt.get_submodule(owner), attribute, assign(own[name], tensor.contiguous()))
