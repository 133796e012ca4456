"""What the tests of attention share: tensors, a run forward and backward, its comparison with float64, small tiles."""

from __future__ import annotations

import importlib

import torch
from compare import assert_as_accurate_as_torch

from fastgpt import reference
from fastgpt_kernels import attention

forward = importlib.import_module("fastgpt_kernels.attention")  # the package has a function of that name
backward = importlib.import_module("fastgpt_kernels._attention_backward")

DTYPES = [torch.float32, torch.float16]


def small_blocks(forward, backward):
    """Tiles so small that sizes the interpreter can bear have several, whole and on the diagonal."""
    forward._fwd_blocks = lambda *_: {"BLOCK_M": 32, "BLOCK_N": 16, "num_stages": 1, "num_warps": 4}
    backward._bwd_blocks = lambda *_: {"BLOCK_INNER": 16, "BLOCK_OWN": 32, "num_stages": 1, "num_warps": 4}


def problem(B, H, T, S, D, dtype=torch.float32, device="cpu"):
    """q, k, v and the gradient of out."""
    return [torch.randn(B, H, n, D, device=device).to(dtype) for n in (T, S, S, T)]


def run(op, q, k, v, dout, **options):
    """out, dq, dk, dv."""
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    out = op(*inputs, **options)
    return [out, *torch.autograd.grad(out, inputs, dout)]


def compare(ours, tensors, reference_op=reference.attention, **options):
    exact = run(reference_op, *(t.double() for t in tensors), **options)
    theirs = run(reference_op, *tensors, **options)
    results = run(ours, *tensors, **options)
    for name, o, t, e in zip(("out", "dq", "dk", "dv"), results, theirs, exact, strict=True):
        assert_as_accurate_as_torch(o, t, e, name)
    return results


def dropout_mask(B, H, T, S, p, seed, device, op=attention):
    """What survives, taken out of the op: with q = 0 and v = identity, out is the matrix of kept probabilities."""
    eye = torch.eye(S, device=device).expand(B, H, S, S)
    return op(torch.zeros(B, H, T, S, device=device), eye, eye, causal=False, dropout_p=p, seed=seed) > 0
