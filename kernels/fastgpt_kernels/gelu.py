"""GELU, alone or of a sum with a bias, as one memory pass beside a GEMM that can't take it into its epilogue.

    y  = gelu(x + bias)           "tanh": GPT-2's approximation; "none": the exact form with erf
    dx = dy * gelu'(x + bias)     dbias = sum over rows of dx

    x, y, dy, dx   [..., N]       fp16 | bf16 | fp32 | fp64      flattened to M rows of N, arithmetic in fp32 (fp64)
    bias, dbias    [N]            any of the four

A program owns a tile of rows and the columns that one warp reads with 16 bytes a lane, so that every lane has four loads in
flight. With a bias, a program of the backward walks down several tiles and sums its columns of dx in registers; a second
kernel adds up these partial sums in a fixed order. The sum is of dx before its rounding.

Bound by bandwidth: 2 M N b bytes forward and 3 M N b backward for itemsize b. The partial sums add 2% to that.

Under autocast these ops take what comes. Inputs and incoming gradients have any strides; a last dimension that isn't of unit
stride costs a copy.

Source: Hendrycks, Gimpel, 2016, https://arxiv.org/abs/1606.08415
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import cdiv, check, check_device, check_float, launch, register
from ._math import activation, activation_grad
from ._rows import as_rows, column_sums, column_tile

ACTIVATIONS = {"tanh": "gelu_tanh", "none": "gelu"}

_NUM_WARPS = 4
# Loads of x in flight a lane: with dy's and the 12 warps that fit beside the sums, 48 KB a multiprocessor, over twice its need.
_LOADS = 4
# Tiles that a program of the backward sums up: its partial sum is then 8 bytes beside 6 * 128 of traffic in 16-bit columns.
_TILES = 8


@triton.jit(do_not_specialize=["M"])
def _gelu_fwd_kernel(
    x_ptr, bias_ptr, y_ptr, stride_xm, M,
    N: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    PARTS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    rows = (tl.program_id(0) // PARTS).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(0) % PARTS * COLUMNS + tl.broadcast_to(tl.arange(0, COLUMNS)[None, :], (ROWS, COLUMNS))
    mask = (rows < M) & (cols < N)
    x = tl.load(x_ptr + rows * stride_xm + cols, mask=mask, other=0.0).to(acc_dtype)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(acc_dtype)
    tl.store(y_ptr + rows * N + cols, activation(x, ACTIVATION), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr, stride_dym, stride_xm, M,
    N: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    PARTS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    block = (tl.program_id(0) // PARTS).to(tl.int64)
    cols = tl.program_id(0) % PARTS * COLUMNS + tl.broadcast_to(tl.arange(0, COLUMNS)[None, :], (ROWS, COLUMNS))
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(acc_dtype)
        dbias = tl.zeros((ROWS, COLUMNS), acc_dtype)
    for tile in range(TILES):
        rows = (block * TILES + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (rows < M) & (cols < N)
        x = tl.load(x_ptr + rows * stride_xm + cols, mask=mask, other=0.0).to(acc_dtype)
        dy = tl.load(dy_ptr + rows * stride_dym + cols, mask=mask, other=0.0).to(acc_dtype)
        if bias_ptr is not None:
            x += bias
        dx = dy * activation_grad(x, ACTIVATION)
        tl.store(dx_ptr + rows * N + cols, dx, mask=mask)
        if bias_ptr is not None:
            dbias += dx
    if bias_ptr is not None:
        cols = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(partial_ptr + block * N + cols, tl.sum(dbias, axis=0), mask=cols < N)


def _gelu_fwd_fake(x, bias, activation):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@register("_gelu_fwd(Tensor x, Tensor? bias, str activation) -> Tensor", _gelu_fwd_fake)
def gelu_fwd(x, bias, activation):
    """x [..., N], bias [N] -> y [..., N]."""
    y = _gelu_fwd_fake(x, bias, activation)
    if x.numel() == 0:
        return y
    x, bias = as_rows(x), None if bias is None else bias.contiguous()
    M, N = x.shape
    rows, columns = column_tile(N, x.element_size(), _NUM_WARPS, _LOADS)
    launch(
        _gelu_fwd_kernel, (cdiv(M, rows) * cdiv(N, columns),),
        x, bias, y, x.stride(0), M,
        N=N, ACTIVATION=activation, ROWS=rows, COLUMNS=columns, num_warps=_NUM_WARPS,
    )  # fmt: skip
    return y


def _gelu_bwd_fake(dy, x, bias, activation):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    like = x if bias is None else bias
    return dx, torch.empty(0 if bias is None else bias.shape, dtype=like.dtype, device=x.device)


@register("_gelu_bwd(Tensor dy, Tensor x, Tensor? bias, str activation) -> (Tensor, Tensor)", _gelu_bwd_fake)
def gelu_bwd(dy, x, bias, activation):
    """dy, x [..., N], bias [N] -> dx [..., N], dbias [N] or [0]."""
    outputs = dx, dbias = _gelu_bwd_fake(dy, x, bias, activation)
    N = x.shape[-1]
    if x.numel() == 0 and (bias is None or N == 0):
        return outputs
    dy, x, bias = as_rows(dy), as_rows(x), None if bias is None else bias.contiguous()
    M = x.shape[0]
    rows, columns = column_tile(N, x.element_size(), _NUM_WARPS, _LOADS)
    tiles = 1 if bias is None else _TILES
    blocks = cdiv(M, rows * tiles)
    acc_dtype = torch.promote_types(x.dtype, torch.float32)
    partial = None if bias is None else torch.empty(blocks, N, dtype=acc_dtype, device=x.device)
    launch(
        _gelu_bwd_kernel, (blocks * cdiv(N, columns),),
        dy, x, bias, dx, partial, dy.stride(0), x.stride(0), M,
        N=N, ACTIVATION=activation, ROWS=rows, COLUMNS=columns, TILES=tiles, num_warps=_NUM_WARPS,
    )  # fmt: skip
    if partial is not None:
        column_sums(partial, dbias)
    return outputs


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, activation):
        ctx.save_for_backward(x, bias)
        ctx.activation = activation
        return gelu_fwd(x, bias, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        dx, dbias = gelu_bwd(dy, x, bias, ctx.activation)
        return dx, None if bias is None else dbias, None


def _check(op: str, x: Tensor, bias: Tensor | None, approximate: str) -> None:
    check_device(op, x=x, bias=bias)
    check_float(op, x=x, bias=bias)
    check(approximate in ACTIVATIONS, f'{op}: approximate must be "tanh" or "none", got {approximate!r}')


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """GELU; "tanh" is GPT-2's approximation, "none" the exact erf form."""
    _check("gelu", x, None, approximate)
    if x.dim() == 0:
        return gelu(x[None], approximate)[0]
    return _Gelu.apply(x, None, ACTIVATIONS[approximate])


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias), x [..., C], bias [C]."""
    _check("bias_gelu", x, bias, approximate)
    check(x.dim() > 0, "bias_gelu: x must have at least one dimension, got a scalar")
    message = f"bias_gelu: bias must be [{x.shape[-1:].numel()}], the last dimension of x, got {list(bias.shape)}"
    check(bias.shape == x.shape[-1:], message)
    return _Gelu.apply(x, bias, ACTIVATIONS[approximate])
