"""Weights of a byte or of half a byte: a model whose matrices are int8 or int4.

A token at a time, a machine waits for weights, and half the bytes are half the wait.

    int8    row r of a matrix is round(W[r] / scale[r]) with scale[r] = max |W[r]| / 127
    int4    32 columns of a row are 16 equal steps from the least of them to the greatest: 5 bits a weight, steps and all

Embeddings, norms and biases stay; activations keep the model's dtype.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from fastgpt.layers import ROUNDED
from fastgpt.model import GPTModel
from fastgpt.plan import plain

_G = TypeVar("_G", bound=GPTModel)


def quantize(model: _G, weights: str = "int8") -> _G:
    """A copy of `model` with every nn.Linear as fastgpt.layers.Int8Linear or Int4Linear; the model itself stays as it is.

    For inference. On a GPU, `generate` reads int8 weights for up to 8 rows at a time; on a CPU a few rows at a time read int8
    or int4. Prompts and larger batches multiply with weights in the model's dtype, made from the integers in each forward, which
    saves memory and no time. A CPU keeps a second copy of the integers, in the order in which it reads them. A tied head is
    rounded beside the embedding that it was tied to. `save_pretrained` writes a form of fastgpt's own.

    Args:
        model: any GPTModel, on any device, of any dtype.
        weights: "int8", or, for a CPU, "int4".

    Raises:
        ValueError: another format; weights that are not finite, or for int4 of a width that isn't a multiple of 32.
        TypeError: a Linear that was subclassed or has hooks, which a replacement would lose; or there is none.
    """
    if weights not in ROUNDED:
        raise ValueError(f"weights must be one of {tuple(ROUNDED)}, got {weights!r}")
    replaced: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if not plain(module, nn.Linear):
                raise TypeError(
                    f"{name} must be a plain nn.Linear to become {weights}, got {type(module).__name__} or its hooks"
                )
            try:
                replaced[id(module)] = ROUNDED[weights](module)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    if not replaced:
        raise TypeError("the model has no nn.Linear; it is quantized already")
    for linear in replaced.values():
        linear.bias = copy.deepcopy(linear.bias)
    # What deepcopy would make of each Linear is there already, so that no second copy of the matrices is ever made.
    quantized = copy.deepcopy(model, dict(replaced))
    return quantized.train(model.training)
