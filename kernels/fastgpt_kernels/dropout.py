"""The residual branch that no LayerNorm follows in its block: residual + dropout(x) in one pass.

    total = residual + dropout(x)      dx = dropout's mask and scale on dtotal      dresidual = dtotal

    x, dx                       [..., C]   fp16 | bf16 | fp32 | fp64
    residual, total, dtotal     [..., C]   any of the four

A program owns a tile of rows and the columns that one warp reads with 16 bytes a lane; the gradient is the same kernel without
a residual, drawing the same mask. torch's dropout and sum take 3 passes forward more than this: the masked x is written and read
again, and so is a byte of mask an element, which the backward pass reads once more.

Bound by bandwidth. Bytes for N elements of size b: 3 N b forward, 2 N b backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import cdiv, check, check_device, check_float, dropout_seed, launch, next_power_of_2, register
from ._math import dropout
from ._rows import as_rows, column_tile, keep_scale

_NUM_WARPS = 4
_LOADS = 2  # of each of two tensors, in flight a lane


@triton.jit(do_not_specialize=["M"])
def _dropout_add_kernel(
    x_ptr, residual_ptr, seed_ptr, y_ptr, stride_x, stride_residual, M, dropout_p, keep_scale,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_COUNTERS: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    PARTS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    rows = (tl.program_id(0) // PARTS).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < M) & (cols < C)
    y = tl.load(x_ptr + rows * stride_x + cols, mask=mask, other=0.0).to(acc_dtype)
    if seed_ptr is not None:
        y = dropout(y, tl.load(seed_ptr), rows * ROW_COUNTERS + cols, dropout_p, keep_scale)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + rows * stride_residual + cols, mask=mask, other=0.0).to(acc_dtype)
    tl.store(y_ptr + rows * C + cols, y, mask=mask)


def _fake(x, residual, seed, dropout_p, like):
    return torch.empty(x.shape, dtype=like.dtype, device=x.device)


@register(
    "_dropout_add(Tensor x, Tensor? residual, Tensor? seed, float dropout_p, Tensor like) -> Tensor",
    _fake,
)
def dropout_add_rows(x, residual, seed, dropout_p, like):
    """x, residual or None [..., C] -> residual + dropout(x) [..., C] in `like`'s dtype."""
    y = _fake(x, residual, seed, dropout_p, like)
    if y.numel() == 0:
        return y
    x, residual = as_rows(x), None if residual is None else as_rows(residual)
    M, C = x.shape
    rows, columns = column_tile(C, min(x.element_size(), y.element_size()), _NUM_WARPS, _LOADS)
    launch(
        _dropout_add_kernel, (cdiv(M, rows) * cdiv(C, columns),),
        x, residual, seed, y, x.stride(0), 0 if residual is None else residual.stride(0),
        M, dropout_p, keep_scale(dropout_p),
        C=C, ROWS=rows, COLUMNS=columns, ROW_COUNTERS=next_power_of_2(C), num_warps=_NUM_WARPS,
    )  # fmt: skip
    return y


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, dropout_p, seed):
        ctx.save_for_backward(seed, x.new_empty(0))
        ctx.dropout_p = dropout_p
        return dropout_add_rows(x, residual, seed, dropout_p, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal):
        seed, like = ctx.saved_tensors
        dx = dropout_add_rows(dtotal, None, seed, ctx.dropout_p, like) if ctx.needs_input_grad[0] else None
        return dx, dtotal, None, None


def dropout_add(x: Tensor, residual: Tensor, dropout_p: float = 0.0, seed: int | None = None) -> Tensor:
    """residual + dropout(x), both [..., C], in the residual's dtype.

    `seed=None` draws the mask's seed from torch's generator of the device; an integer makes the call a pure function.
    """
    check_device("dropout_add", x=x, residual=residual)
    check_float("dropout_add", x=x, residual=residual)
    check(
        x.shape == residual.shape and x.dim() >= 1,
        f"dropout_add: x and residual must have one shape [..., C], got {list(x.shape)} and {list(residual.shape)}",
    )
    check(0.0 <= dropout_p <= 1.0, f"dropout_add: dropout_p must be between 0 and 1, got {dropout_p}")
    seed_tensor = dropout_seed(x.device, seed) if dropout_p > 0.0 else None
    return _DropoutAdd.apply(x, residual, dropout_p, seed_tensor)
