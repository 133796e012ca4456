"""What tests of linear and mlp share: inputs, and a comparison with float64 beside torch in the same dtype."""

from __future__ import annotations

import contextlib
import importlib
from itertools import pairwise

import torch
from compare import TruncatedProducts, assert_as_accurate_as_torch

from fastgpt import reference
from fastgpt_kernels import _launch

module = importlib.import_module("fastgpt_kernels.linear")  # the package has a function of that name
NAMES = {"linear": ("y", "dx", "dweight", "dbias"), "mlp": ("y", "dx", "dw1", "db1", "dw2", "db2", "dresidual")}


def problem(op, shape, dtype, device, lead=None):
    """Inputs and incoming gradient: of linear [M, K] -> [M, N] for shape (M, K, N), of mlp with a last width for four."""
    M, *widths = shape
    inputs = [torch.randn(*(lead or (M,)), widths[0])]
    for width, out in pairwise(widths):
        inputs += [torch.randn(out, width) / width**0.5, torch.randn(out)]
    grad = torch.randn(*(lead or (M,)), widths[-1])
    assert len(widths) == (2 if op == "linear" else 3)
    return [t.to(device, dtype) for t in inputs], grad.to(device, dtype)


def run(op, inputs, grad, activation, dtype=None, layout=None):
    """The op's result and the gradients of its inputs, the leaves in the layout of their `inputs`; a sixth is mlp's residual."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    laid_out = [layout(t) for t in leaves] if layout else leaves
    y = op(*laid_out[:5], activation, *laid_out[5:])
    y.backward(grad.to(y.dtype))
    return y, *(t.grad for t in leaves)


def compare(name, inputs, grad, activation, ours=module, layout=None):
    function, expected = getattr(ours, name), getattr(reference, name)
    got = run(function, inputs, grad, activation, layout=layout)
    # A card's tf32 products of ours cut their operands: torch's see the same.
    cut = inputs[0].is_cuda and _launch.tf32(inputs[0].dtype)
    with TruncatedProducts() if cut else contextlib.nullcontext():
        plain = run(expected, inputs, grad, activation, layout=layout)
    results = got, plain, run(expected, inputs, grad, activation, torch.float64, layout=layout)
    for value, *tensors in zip(NAMES[name][: len(got)], *results, strict=True):
        assert_as_accurate_as_torch(*tensors, value)
