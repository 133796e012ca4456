"""What tests of both losses share: targets, and a comparison with float64 beside torch in the same dtype."""

from __future__ import annotations

import importlib
import math

import torch
from compare import assert_as_accurate_as_torch

from fastgpt import reference

kernels = importlib.import_module("fastgpt_kernels.cross_entropy")  # the package has a function of that name
DTYPES = [torch.float32, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]


def some_targets(N, V, device, ignored=0):
    targets = torch.randint(0, V, (N,), device=device)
    targets[:ignored] = -100
    return targets


def assert_cross_entropy(logits, targets, reduction="mean", grad=None, ignore_index=-100, ops=kernels):
    """Loss and gradient of ops.cross_entropy; `grad` is the incoming gradient in float64, by default the loss's sum's."""
    results = []
    for op, dtype in (
        (ops.cross_entropy, logits.dtype),
        (reference.cross_entropy, logits.dtype),
        (reference.cross_entropy, torch.float64),
    ):
        leaf = logits.detach().to(dtype).requires_grad_()
        before = leaf.detach().clone()
        loss = op(leaf, targets, ignore_index=ignore_index, reduction=reduction)
        (loss.sum() if grad is None else loss).backward(None if grad is None else grad.to(loss.dtype))
        torch.testing.assert_close(leaf.detach(), before, rtol=0, atol=0, equal_nan=True)
        results.append((loss, leaf.grad))
    for name, ours, torch_same_dtype, exact in zip(("loss", "dlogits"), *results, strict=True):
        assert_as_accurate_as_torch(ours, torch_same_dtype, exact, name)


def assert_linear_cross_entropy(x, weight, bias, targets, reduction="mean", grad=None, ops=kernels):
    results = []
    for op, dtype in (
        (ops.linear_cross_entropy, x.dtype),
        (reference.linear_cross_entropy, x.dtype),
        (reference.linear_cross_entropy, torch.float64),
    ):
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        loss = op(leaves[0], leaves[1], targets, leaves[2], reduction=reduction)
        (loss.sum() if grad is None else loss).backward(None if grad is None else grad.to(loss.dtype))
        results.append((loss, *(t.grad for t in leaves if t is not None)))
    for name, ours, torch_same_dtype, exact in zip(("loss", "dx", "dweight", "dbias"), *results, strict=False):
        assert_as_accurate_as_torch(ours, torch_same_dtype, exact, name)


LAYOUTS = {
    "padded rows": lambda t: torch.cat([t, torch.full_like(t, math.nan)], 1)[:, : t.shape[1]],
    "offset by one": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "every other row": lambda t: torch.stack([t, torch.full_like(t, math.nan)], 1)[:, 0],
    "every other column": lambda t: torch.stack([t, torch.full_like(t, math.nan)], 2)[:, :, 0],
    "transposed": lambda t: t.t().contiguous().t(),
    "one row expanded": lambda t: t[:1].expand(t.shape),
    "one column expanded": lambda t: t[:, :1].expand(t.shape),
}
