"""Softmax over the last dimension with a scale and a causal mask, forward and backward.

    y  = exp(s - max(s)) / sum(exp(s - max(s)))      s = scale * x, and -inf where masked
    dx = scale * y * (dy - sum(y * dy))

    x, y, dy, dx   [..., N]      fp16 | bf16 | fp32 | fp64      flattened to M rows of N, arithmetic in fp32 (fp64)
    causal         [..., T, N]   row t sees columns 0 .. N - T + t

A row without a visible finite score gives zeros, and so does its gradient.

Up to 32,768 columns (16,384 in the backward) a row stays in the registers of 1 to 16 warps, so x is read once and y written
once: 2 M N b bytes forward and 3 M N b backward for itemsize b, over the memory's rate. What a causal row can't see is not
read. A wider row belongs to one program that reads it twice: first for its maximum and sum, kept per lane and rescaled as
the maximum grows (the online softmax), then to write y. The second reading comes from L2 as long as the rows in flight fit:
two of V = 50,257 on each of 132 multiprocessors are 27 of 50 MB. The rows of a contiguous tensor of odd width start anywhere,
so the wide kernels step through 16-byte blocks of memory, not columns, and mask the two ends.

Under autocast this op takes what comes. Inputs and incoming gradients have any strides; a last dimension that isn't of unit
stride costs a copy.

Source: Milakov, Gimelshein, 2018, https://arxiv.org/abs/1805.02867
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import cdiv, check, check_device, check_float, launch, next_power_of_2, register
from ._rows import as_rows, row_tile

# fp32 scores in one lane: at 32, a warp takes rows up to 1024 wide, in about 60 registers.
_LANE_COLUMNS = 32
# At 16 warps the widest row in registers has 64 scores a lane forward, and 32 of y and dy each backward: no spill.
_FWD_REGISTER_COLUMNS = 32768
_BWD_REGISTER_COLUMNS = 16384
# Wide rows: two programs of this size share a multiprocessor, 64 KB in flight between them and no more rows than L2 holds.
_WIDE_WARPS = 16
_WIDE_UNROLL = 4
_WIDE_REGISTERS = 64


@triton.jit
def _visible(rows, N, T, CAUSAL: tl.constexpr):
    """How many columns these rows see; not positive where none."""
    if CAUSAL:
        visible = N - T + rows.to(tl.int32) % T + 1
    else:
        visible = rows * 0 + N
    return visible


# N is specialised on being a multiple of 16, which is what makes the loads 16 bytes wide.
@triton.jit(do_not_specialize=["M", "T"])
def _softmax_fwd_kernel(
    x_ptr, y_ptr, stride_xm, M, N, T, scale,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, CHUNK)[None, :]
    visible = _visible(rows, N, T, CAUSAL)
    # Loads are cut at whole vectors and the rest of the mask applied in registers, or they would shrink to single elements.
    readable = (visible + (VECTOR - 1)) // VECTOR * VECTOR

    scores: tl.tuple = ()
    m = tl.full((ROWS, CHUNK), float("-inf"), acc_dtype)
    for c in tl.static_range(0, CHUNKS * CHUNK, CHUNK):
        mask = (rows < M) & (c + cols < N) & (c + cols < readable)
        x = tl.load(x_ptr + rows * stride_xm + (c + cols), mask=mask, other=0.0).to(acc_dtype)
        s = tl.where(c + cols < visible, x * scale, float("-inf"))
        m = tl.maximum(m, s)
        scores = scores + (s,)
    m = tl.max(m, axis=1, keep_dims=True)
    m = tl.where(m == float("-inf"), 0.0, m)

    exps: tl.tuple = ()
    l = tl.zeros((ROWS, CHUNK), acc_dtype)
    for c in tl.static_range(CHUNKS):
        e = tl.exp(scores[c] - m)
        l += e
        exps = exps + (e,)
    l = tl.sum(l, axis=1, keep_dims=True)
    normaliser = 1.0 / tl.where(l == 0.0, 1.0, l)
    for c in tl.static_range(0, CHUNKS * CHUNK, CHUNK):
        mask = (rows < M) & (c + cols < N)
        tl.store(y_ptr + rows * N + (c + cols), exps[c // CHUNK] * normaliser, mask=mask)


@triton.jit(do_not_specialize=["M", "T"])
def _softmax_bwd_kernel(
    y_ptr, dy_ptr, dx_ptr, stride_dym, M, N, T, scale,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, CHUNK)[None, :]
    visible = _visible(rows, N, T, CAUSAL)
    readable = (visible + (VECTOR - 1)) // VECTOR * VECTOR

    ys: tl.tuple = ()
    dys: tl.tuple = ()
    dot = tl.zeros((ROWS, CHUNK), acc_dtype)
    for c in tl.static_range(0, CHUNKS * CHUNK, CHUNK):
        mask = (rows < M) & (c + cols < N) & (c + cols < readable)
        y = tl.load(y_ptr + rows * N + (c + cols), mask=mask, other=0.0).to(acc_dtype)
        dy = tl.load(dy_ptr + rows * stride_dym + (c + cols), mask=mask, other=0.0).to(acc_dtype)
        dy = tl.where(c + cols < visible, dy, 0.0)
        dot += y * dy
        ys, dys = ys + (y,), dys + (dy,)
    dot = tl.sum(dot, axis=1, keep_dims=True)
    for c in tl.static_range(0, CHUNKS * CHUNK, CHUNK):
        dx = scale * ys[c // CHUNK] * (dys[c // CHUNK] - dot)
        tl.store(dx_ptr + rows * N + (c + cols), dx, mask=(rows < M) & (c + cols < N))


# The wide kernels count columns from the last 16-byte boundary before the row, which begins at column `begin` < VECTOR and
# stops seeing at `end`. Columns VECTOR .. floor are whole vectors, whose masks leave the loads 16 bytes wide; the edges before
# and behind them are read one by one. VECTOR is 1, and begin 0, unless all rows are N apart.
@triton.jit
def _edges(begin, floor, row_end, VECTOR: tl.constexpr):
    """The columns of both edges, and whether they're in the row."""
    i = tl.arange(0, 2 * VECTOR)
    cols = tl.where(i < VECTOR, i, floor - VECTOR + i)
    return cols, (i >= begin) & (cols < row_end)


@triton.jit
def _inner(c, floor, readable, CHUNK: tl.constexpr, VECTOR: tl.constexpr):
    """The columns of a chunk, and whether they're whole vectors to be written, and to be read."""
    cols = c + tl.arange(0, CHUNK)
    mask = (cols >= VECTOR) & (cols < floor)
    return cols, mask, mask & (cols < readable)


@triton.jit(do_not_specialize=["T"])
def _softmax_wide_fwd_kernel(
    x_ptr, y_ptr, stride_xm, N, T, scale,
    CAUSAL: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    begin = (row * stride_xm % VECTOR).to(tl.int32)
    floor = (begin + N) // VECTOR * VECTOR
    end = begin + _visible(row, N, T, CAUSAL).to(tl.int32)
    readable = (end + (VECTOR - 1)) // VECTOR * VECTOR
    x_ptr += row * stride_xm // VECTOR * VECTOR
    y_ptr += row * N // VECTOR * VECTOR

    m = tl.full((CHUNK,), float("-inf"), acc_dtype)
    l = tl.zeros((CHUNK,), acc_dtype)
    for start in range(0, end, UNROLL * CHUNK):
        scores: tl.tuple = ()
        m_new = m
        for c in tl.static_range(0, UNROLL * CHUNK, CHUNK):
            cols, _, mask = _inner(start + c, floor, readable, CHUNK, VECTOR)
            s = tl.load(x_ptr + cols, mask=mask, other=0.0).to(acc_dtype) * scale
            s = tl.where(mask & (cols < end), s, float("-inf"))
            m_new = tl.maximum(m_new, s)
            scores = scores + (s,)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        l *= tl.exp(m - shift)
        for i in tl.static_range(UNROLL):
            l += tl.exp(scores[i] - shift)
        m = m_new

    edge_cols, edge_mask = _edges(begin, floor, begin + N, VECTOR)
    edge_x = tl.load(x_ptr + edge_cols, mask=edge_mask & (edge_cols < end), other=0.0).to(acc_dtype)
    edge_s = tl.where(edge_mask & (edge_cols < end), edge_x * scale, float("-inf"))
    m_row = tl.maximum(tl.max(m, axis=0), tl.max(edge_s, axis=0))
    m_row = tl.where(m_row == float("-inf"), 0.0, m_row)
    edge_exps = tl.exp(edge_s - m_row)
    l_row = tl.sum(l * tl.exp(m - m_row), axis=0) + tl.sum(edge_exps, axis=0)
    normaliser = 1.0 / tl.where(l_row == 0.0, 1.0, l_row)

    tl.store(y_ptr + edge_cols, edge_exps * normaliser, mask=edge_mask)
    for start in range(0, floor, UNROLL * CHUNK):
        for c in tl.static_range(0, UNROLL * CHUNK, CHUNK):
            cols, in_row, mask = _inner(start + c, floor, readable, CHUNK, VECTOR)
            s = tl.load(x_ptr + cols, mask=mask, other=0.0).to(acc_dtype) * scale
            y = tl.where(cols < end, tl.exp(s - m_row) * normaliser, 0.0)
            tl.store(y_ptr + cols, y, mask=in_row)


@triton.jit(do_not_specialize=["T"])
def _softmax_wide_bwd_kernel(
    y_ptr, dy_ptr, dx_ptr, stride_dym, N, T, scale,
    CAUSAL: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    begin = (row * stride_dym % VECTOR).to(tl.int32)
    floor = (begin + N) // VECTOR * VECTOR
    end = begin + _visible(row, N, T, CAUSAL).to(tl.int32)
    readable = (end + (VECTOR - 1)) // VECTOR * VECTOR
    y_ptr += row * N // VECTOR * VECTOR
    dx_ptr += row * N // VECTOR * VECTOR
    dy_ptr += row * stride_dym // VECTOR * VECTOR

    dot = tl.zeros((CHUNK,), acc_dtype)
    for start in range(0, end, UNROLL * CHUNK):
        for c in tl.static_range(0, UNROLL * CHUNK, CHUNK):
            cols, _, mask = _inner(start + c, floor, readable, CHUNK, VECTOR)
            y = tl.load(y_ptr + cols, mask=mask, other=0.0).to(acc_dtype)
            dy = tl.load(dy_ptr + cols, mask=mask, other=0.0).to(acc_dtype)
            dot += y * tl.where(cols < end, dy, 0.0)

    edge_cols, edge_mask = _edges(begin, floor, begin + N, VECTOR)
    edge_y = tl.load(y_ptr + edge_cols, mask=edge_mask & (edge_cols < end), other=0.0).to(acc_dtype)
    edge_dy = tl.load(dy_ptr + edge_cols, mask=edge_mask & (edge_cols < end), other=0.0).to(acc_dtype)
    dot_row = tl.sum(dot, axis=0) + tl.sum(edge_y * edge_dy, axis=0)

    tl.store(dx_ptr + edge_cols, scale * edge_y * (edge_dy - dot_row), mask=edge_mask)
    for start in range(0, floor, UNROLL * CHUNK):
        for c in tl.static_range(0, UNROLL * CHUNK, CHUNK):
            cols, in_row, mask = _inner(start + c, floor, readable, CHUNK, VECTOR)
            y = tl.load(y_ptr + cols, mask=mask, other=0.0).to(acc_dtype)
            dy = tl.load(dy_ptr + cols, mask=mask, other=0.0).to(acc_dtype)
            tl.store(dx_ptr + cols, scale * y * (tl.where(cols < end, dy, 0.0) - dot_row), mask=in_row)


def _launch_narrow(kernel, tensors, stride, M, N, T, scale, causal):
    itemsize = tensors[0].element_size()
    rows, chunk, num_warps = row_tile(next_power_of_2(N), itemsize, _LANE_COLUMNS)
    launch(
        kernel, (cdiv(M, rows),), *tensors, stride, M, N, T, scale,
        CAUSAL=causal, ROWS=rows, CHUNK=chunk, CHUNKS=next_power_of_2(cdiv(N, chunk)),
        VECTOR=max(16 // itemsize, 1), num_warps=num_warps,
    )  # fmt: skip


def _launch_wide(kernel, tensors, stride, M, N, T, scale, causal):
    vector = 16 // tensors[0].element_size()
    launch(
        kernel, (M,), *tensors, stride, N, T, scale,
        CAUSAL=causal, CHUNK=32 * vector * _WIDE_WARPS, UNROLL=_WIDE_UNROLL, VECTOR=vector if stride == N else 1,
        num_warps=_WIDE_WARPS, maxnreg=_WIDE_REGISTERS,
    )  # fmt: skip


def _softmax_fwd_fake(x, scale, causal):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@register("_softmax_fwd(Tensor x, float scale, bool causal) -> Tensor", _softmax_fwd_fake)
def softmax_fwd(x, scale, causal):
    """x [..., N] -> y [..., N]."""
    y = _softmax_fwd_fake(x, scale, causal)
    if x.numel() == 0:
        return y
    if x.dtype == torch.float64:  # a kernel's scalar is fp32
        x, scale = x * scale, 1.0
    T, x = x.shape[-2] if causal else 1, as_rows(x)
    M, N = x.shape
    if N <= _FWD_REGISTER_COLUMNS:
        _launch_narrow(_softmax_fwd_kernel, (x, y), x.stride(0), M, N, T, scale, causal)
    else:
        _launch_wide(_softmax_wide_fwd_kernel, (x, y), x.stride(0), M, N, T, scale, causal)
    return y


def _softmax_bwd_fake(y, dy, scale, causal):
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


@register("_softmax_bwd(Tensor y, Tensor dy, float scale, bool causal) -> Tensor", _softmax_bwd_fake)
def softmax_bwd(y, dy, scale, causal):
    """y, dy [..., N] -> dx [..., N]; y is the forward's, so contiguous."""
    dx = _softmax_bwd_fake(y, dy, scale, causal)
    if y.numel() == 0:
        return dx
    if y.dtype == torch.float64:
        dy, scale = dy * scale, 1.0
    T, y, dy = y.shape[-2] if causal else 1, as_rows(y), as_rows(dy)
    M, N = y.shape
    if N <= _BWD_REGISTER_COLUMNS:
        _launch_narrow(_softmax_bwd_kernel, (y, dy, dx), dy.stride(0), M, N, T, scale, causal)
    else:
        _launch_wide(_softmax_wide_bwd_kernel, (y, dy, dx), dy.stride(0), M, N, T, scale, causal)
    return dx


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, causal):
        y = softmax_fwd(x, scale, causal)
        ctx.save_for_backward(y)
        ctx.scale, ctx.causal = scale, causal
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return softmax_bwd(y, dy, ctx.scale, ctx.causal), None, None


def softmax(x: Tensor, scale: float = 1.0, causal: bool = False) -> Tensor:
    """softmax(scale * x) over the last dimension. With `causal`, x is [..., T, S] and query t sees keys 0 .. S - T + t.

    A row whose visible scores are all -inf, or that sees none, gives zeros.
    """
    check_device("softmax", x=x)
    check_float("softmax", x=x)
    check(x.dim() >= 1 + causal, f"softmax: x must have {1 + causal} dimensions or more, got {x.dim()}")
    return _Softmax.apply(x, float(scale), causal)
