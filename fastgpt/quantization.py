"""Weights of one byte: a model whose matrices are int8, with one scale an output.

A token at a time, a GPU waits for weights, and half the bytes are half the wait; a matrix row r becomes the integers
round(W[r] / scale[r]) with scale[r] = max |W[r]| / 127. Embeddings, norms and biases stay; activations keep the model's dtype.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from fastgpt.layers import Int8Linear
from fastgpt.model import GPTModel
from fastgpt.plan import plain

_G = TypeVar("_G", bound=GPTModel)

FORMATS = ("int8",)


def quantize(model: _G, weights: str = "int8") -> _G:
    """A copy of `model` with every nn.Linear as fastgpt.layers.Int8Linear; the model itself stays as it is.

    For inference. On a GPU, `generate` reads the int8 weights for up to 8 rows at a time; prompts and larger batches multiply
    with weights in the model's dtype, made from the integers in each forward, which saves memory and no time. On a CPU that is
    so in fp32; in bf16, `quantize(model.to(torch.bfloat16))`, up to 16 rows at a time are faster too. A tied head becomes int8
    beside the embedding that it was tied to.

    Args:
        model: any GPTModel, on any device, of any dtype.
        weights: "int8", the one format there is.

    Raises:
        ValueError: another format; weights that are not finite.
        TypeError: a Linear that was subclassed or has hooks, which a replacement would lose; or there is none.
    """
    if weights not in FORMATS:
        raise ValueError(f"weights must be one of {FORMATS}, got {weights!r}")
    replaced: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if not plain(module, nn.Linear):
                raise TypeError(
                    f"{name} must be a plain nn.Linear to become int8, got {type(module).__name__} or its hooks"
                )
            try:
                replaced[id(module)] = Int8Linear(module)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    if not replaced:
        raise TypeError("the model has no nn.Linear; it is quantized already")
    for linear in replaced.values():
        linear.bias = copy.deepcopy(linear.bias)
    # What deepcopy would make of each Linear is there already, so that no second copy of the matrices is ever made.
    quantized = copy.deepcopy(model, dict(replaced))
    return quantized.train(model.training)
