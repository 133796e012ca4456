"""Layer normalization over the last dimension, alone or behind a residual addition with dropout, forward and backward.

    total = residual + dropout(x)                     without residual: total = x
    y     = (total - mean) * rstd * weight + bias
    rstd  = 1 / sqrt(var + eps)                   var is biased: divided by N

    dtotal' = dtotal + rstd * (g - mean(g) - xhat * mean(g * xhat))     g = dy * weight, xhat = (total - mean) * rstd
    dresidual = dtotal'    dx = dropout's mask and scale on dtotal'    dweight = sum(dy * xhat)    dbias = sum(dy)

    x, dx                           [..., N]   fp16 | bf16 | fp32 | fp64      flattened to M rows of N
    residual, total, dtotal         [..., N]   residual's dtype; x's where there is no residual
    y, dy                           [..., N]   the same, or the dtype that the call names
    weight, bias                    [N]        any of the four, each its own
    mean, rstd                      [M]        fp32 (fp64 for fp64), the dtype of all arithmetic too

A row up to 1792 wide (768 in the backward) belongs to one warp, so its sums are shuffles and the rows of a program need no
barrier; a wider row takes 2 to 16 warps. Rows are cut into chunks of one 16-byte load a lane, not padded to a power of two:
GPT-2's 768, 1024 and 1280 leave no lane of the forward idle. The backward is persistent: each program walks over row tiles
with the next one on its way through shared memory, sums its own dweight and dbias in registers, and a second kernel adds up
these partial sums in a fixed order. The dropout mask is drawn again from its counter, never stored.

Bound by bandwidth. Bytes for M rows of itemsize b: layer_norm 2 M N b forward and 3 M N b backward, add_layer_norm 4 M N b
forward and 4 M N b backward (5 with dropout, 1 less where total has no gradient). The backward of rows wider than 8192
spills registers: slower, but right.

Under autocast these ops take what comes. Inputs and incoming gradients have any strides; a last dimension that isn't of unit
stride costs a copy.

Source: Ba, Kiros, Hinton, 2016, https://arxiv.org/abs/1607.06450
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import (
    arch,
    cdiv,
    check,
    check_device,
    check_float,
    dropout_seed,
    launch,
    next_power_of_2,
    register,
    sm_count,
)
from ._math import dropout
from ._rows import as_rows, column_sums, keep_scale, row_tile

# Columns of a row in one lane. The forward keeps them once: 56 are GPT-2 XL's 1600 in seven chunks, in 100 registers. The
# backward keeps them four times (xhat, g and two sums): at 24 three programs of four warps share an SM without a spill.
_FWD_LANE_COLUMNS = 56
_BWD_LANE_COLUMNS = 24
# Rows a backward program has at least: writing and reading its two partial sums costs as much traffic as three rows of bf16.
_MIN_ROWS = 8


def _residency(num_warps: int, registers: int, tile_bytes: int, shared_memory: int) -> tuple[int, int, int]:
    """Backward programs on an SM if a lane needs `registers`, how many it may then have, and loop stages.

    stages - 1 tiles of each program wait in shared memory.
    """
    programs = max(65536 // (32 * num_warps * registers), 1)
    stages = max(s for s in (1, 2, 3) if s == 1 or min(programs, 2) * (s - 1) * tile_bytes <= shared_memory)
    if stages > 1:
        programs = min(programs, shared_memory // ((stages - 1) * tile_bytes))
    return programs, min(65536 // (32 * num_warps * programs) // 8 * 8, 255), stages


@triton.jit(do_not_specialize=["M"])
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_rm, M, dropout_p, keep_scale,
    N: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, ROW_COUNTERS: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = mean_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    # Broadcast before any load: weight and bias arrive in the layout of x instead of going through shared memory.
    cols = tl.broadcast_to(tl.arange(0, CHUNK)[None, :], (ROWS, CHUNK))

    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    # All loads before the first store, behind which the compiler would keep them.
    xs: tl.tuple = ()
    residuals: tl.tuple = ()
    for c in tl.static_range(0, N, CHUNK):
        mask = (rows < M) & (c + cols < N)
        xs = xs + (tl.load(x_ptr + rows * stride_xm + (c + cols), mask=mask, other=0.0),)
        if residual_ptr is not None:
            residuals = residuals + (tl.load(residual_ptr + rows * stride_rm + (c + cols), mask=mask, other=0.0),)

    totals: tl.tuple = ()
    partial = tl.zeros((ROWS, CHUNK), acc_dtype)
    for c in tl.static_range(0, N, CHUNK):
        mask = (rows < M) & (c + cols < N)
        total = xs[c // CHUNK].to(acc_dtype)
        if residual_ptr is not None:
            if seed_ptr is not None:
                total = dropout(total, seed, rows * ROW_COUNTERS + (c + cols), dropout_p, keep_scale)
            total += residuals[c // CHUNK].to(acc_dtype)
            # The statistics are of the rounded sum, since the backward knows no other.
            total = total.to(total_ptr.dtype.element_ty).to(acc_dtype)
            tl.store(total_ptr + rows * N + (c + cols), total, mask=mask)
        partial += total
        totals = totals + (total,)
    mean = tl.sum(partial, axis=1, keep_dims=True) / N

    partial = tl.zeros((ROWS, CHUNK), acc_dtype)
    partial_square = tl.zeros((ROWS, CHUNK), acc_dtype)
    for c in tl.static_range(0, N, CHUNK):
        # Lanes beyond N hold -mean here; without the mask they would add mean ** 2 to the variance.
        centered = tl.where(c + cols < N, totals[c // CHUNK] - mean, 0.0)
        partial += centered
        partial_square += centered * centered
    # What rounding left of the mean, which rstd multiplies by up to 1 / sqrt(eps) where a row is constant.
    rest = tl.sum(partial, axis=1, keep_dims=True) / N
    mean += rest
    rstd = tl.rsqrt(tl.sum(partial_square, axis=1, keep_dims=True) / N - rest * rest + EPS)
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)

    for c in tl.static_range(0, N, CHUNK):
        y = (totals[c // CHUNK] - mean) * rstd
        y *= tl.load(weight_ptr + (c + cols), mask=c + cols < N, other=0.0).to(acc_dtype)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + (c + cols), mask=c + cols < N, other=0.0).to(acc_dtype)
        tl.store(y_ptr + rows * N + (c + cols), y, mask=(rows < M) & (c + cols < N))


@triton.jit(do_not_specialize=["M"])
def _layer_norm_bwd_kernel(
    dy_ptr, dtotal_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    dresidual_ptr, dx_ptr, partial_dweight_ptr, partial_dbias_ptr,
    stride_dym, stride_dtm, stride_tm, M, dropout_p, keep_scale,
    N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, ROW_COUNTERS: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = mean_ptr.dtype.element_ty
    cols = tl.broadcast_to(tl.arange(0, CHUNK)[None, :], (ROWS, CHUNK))

    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    weights: tl.tuple = ()
    dweights: tl.tuple = ()
    dbiases: tl.tuple = ()
    for c in tl.static_range(0, N, CHUNK):
        weights = weights + (tl.load(weight_ptr + (c + cols), mask=c + cols < N, other=0.0),)
        dweights = dweights + (tl.zeros((ROWS, CHUNK), acc_dtype),)
        if partial_dbias_ptr is not None:
            dbiases = dbiases + (tl.zeros((ROWS, CHUNK), acc_dtype),)

    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)

        xhats: tl.tuple = ()
        gs: tl.tuple = ()
        next_dweights: tl.tuple = ()
        next_dbiases: tl.tuple = ()
        partial_g = tl.zeros((ROWS, CHUNK), acc_dtype)
        partial_gx = tl.zeros((ROWS, CHUNK), acc_dtype)
        for c in tl.static_range(0, N, CHUNK):
            mask = (rows < M) & (c + cols < N)
            total = tl.load(total_ptr + rows * stride_tm + (c + cols), mask=mask, other=0.0).to(acc_dtype)
            dy = tl.load(dy_ptr + rows * stride_dym + (c + cols), mask=mask, other=0.0).to(acc_dtype)
            xhat = (total - mean) * rstd
            g = dy * weights[c // CHUNK].to(acc_dtype)
            partial_g += g
            partial_gx += g * xhat
            xhats, gs = xhats + (xhat,), gs + (g,)
            next_dweights = next_dweights + (dweights[c // CHUNK] + dy * xhat,)
            if partial_dbias_ptr is not None:
                next_dbiases = next_dbiases + (dbiases[c // CHUNK] + dy,)
        dweights, dbiases = next_dweights, next_dbiases
        mean_g = tl.sum(partial_g, axis=1, keep_dims=True) / N
        mean_gx = tl.sum(partial_gx, axis=1, keep_dims=True) / N

        for c in tl.static_range(0, N, CHUNK):
            mask = (rows < M) & (c + cols < N)
            d = (gs[c // CHUNK] - mean_g - xhats[c // CHUNK] * mean_gx) * rstd
            if dtotal_ptr is not None:
                d += tl.load(dtotal_ptr + rows * stride_dtm + (c + cols), mask=mask, other=0.0).to(acc_dtype)
            tl.store(dresidual_ptr + rows * N + (c + cols), d, mask=mask)
            if dx_ptr is not None:
                if seed_ptr is not None:
                    d = dropout(d, seed, rows * ROW_COUNTERS + (c + cols), dropout_p, keep_scale)
                tl.store(dx_ptr + rows * N + (c + cols), d, mask=mask)

    out = tl.program_id(0).to(tl.int64) * N + tl.arange(0, CHUNK)
    for c in tl.static_range(0, N, CHUNK):
        mask = c + tl.arange(0, CHUNK) < N
        tl.store(partial_dweight_ptr + c + out, tl.sum(dweights[c // CHUNK], axis=0), mask=mask)
        if partial_dbias_ptr is not None:
            tl.store(partial_dbias_ptr + c + out, tl.sum(dbiases[c // CHUNK], axis=0), mask=mask)


def _layer_norm_fwd_fake(x, residual, weight, bias, eps, dropout_p, seed, dtype):
    like = x if residual is None else residual
    stats = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": x.device}
    rows = x.shape[:-1].numel()
    y = torch.empty(x.shape, dtype=dtype or like.dtype, device=x.device)
    total = torch.empty(0 if residual is None else x.shape, dtype=like.dtype, device=x.device)
    return y, total, torch.empty(rows, **stats), torch.empty(rows, **stats)


@register(
    "_layer_norm_fwd(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, float dropout_p, Tensor? seed,"
    " ScalarType? dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _layer_norm_fwd_fake,
)
def layer_norm_fwd(x, residual, weight, bias, eps, dropout_p, seed, dtype):
    """x, residual [..., N] -> y [..., N], total [..., N] or [0], mean [M], rstd [M]."""
    outputs = y, total, mean, rstd = _layer_norm_fwd_fake(x, residual, weight, bias, eps, dropout_p, seed, dtype)
    if x.numel() == 0:
        return outputs
    x, residual = as_rows(x), None if residual is None else as_rows(residual)
    M, N = x.shape
    itemsize = min(
        x.element_size(), (x if residual is None else residual).element_size()
    )  # y's has no part in its bits
    rows, chunk, num_warps = row_tile(N, itemsize, _FWD_LANE_COLUMNS)
    ragged = seed is not None and N % chunk != 0 and arch(x.device) >= 120  # takes 136 registers
    launch(
        _layer_norm_fwd_kernel, (cdiv(M, rows),),
        x, residual, weight.contiguous(), None if bias is None else bias.contiguous(), seed, y, total, mean, rstd,
        x.stride(0), 0 if residual is None else residual.stride(0), M, dropout_p, keep_scale(dropout_p),
        N=N, EPS=eps, ROWS=rows, CHUNK=chunk, ROW_COUNTERS=next_power_of_2(N), num_warps=num_warps,
        maxnreg=144 if ragged else 128,  # without a limit ptxas prefers a spill to losing a program on the multiprocessor
    )  # fmt: skip
    return outputs


def _layer_norm_bwd_fake(dy, dtotal, total, weight, bias, mean, rstd, dropout_p, seed, dx_dtype):
    dresidual = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    dx = torch.empty(0 if dx_dtype is None else total.shape, dtype=dx_dtype or total.dtype, device=total.device)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=total.device)
    dbias = torch.empty(
        0 if bias is None else bias.shape, dtype=(weight if bias is None else bias).dtype, device=total.device
    )
    return dresidual, dx, dweight, dbias


@register(
    "_layer_norm_bwd(Tensor dy, Tensor? dtotal, Tensor total, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " float dropout_p, Tensor? seed, ScalarType? dx_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _layer_norm_bwd_fake,
)
def layer_norm_bwd(dy, dtotal, total, weight, bias, mean, rstd, dropout_p, seed, dx_dtype):
    """dy, dtotal, total [..., N] -> dresidual [..., N], dx [..., N] or [0] where it equals dresidual, dweight [N], dbias [N]."""
    outputs = dresidual, dx, dweight, dbias = _layer_norm_bwd_fake(
        dy, dtotal, total, weight, bias, mean, rstd, dropout_p, seed, dx_dtype
    )
    if weight.numel() == 0:
        return outputs
    dy, total, dtotal = as_rows(dy), as_rows(total), None if dtotal is None else as_rows(dtotal)
    M, N = total.shape
    rows, chunk, num_warps = row_tile(N, total.element_size(), _BWD_LANE_COLUMNS)
    padded = rows * cdiv(N, chunk) * chunk
    shared_memory = 90_000 if arch(total.device) in (86, 89, 120) else 150_000
    tile_bytes = padded * total.element_size() * (2 if dtotal is None else 3)
    lane_columns = padded // (32 * num_warps)
    registers = 48 + 5 * lane_columns
    tight = seed is not None and lane_columns == _BWD_LANE_COLUMNS and N % chunk != 0  # GPT-2 large, with dropout
    medium = seed is not None and lane_columns == 16 and N % chunk == 0
    if arch(total.device) // 10 == 10 and (tight or medium):
        registers += 32  # sm100 computes on pairs of registers: they take 198 and 155
    resident, registers, stages = _residency(num_warps, registers, tile_bytes, shared_memory)
    if arch(total.device) in (80, 90) and (tight or medium) and dtotal is not None:
        # With two tiles ahead Triton 3.6 spills an address. One tile of each program is some 50 KB a multiprocessor in flight.
        stages = min(stages, 2)
    programs = min(cdiv(M, max(rows, _MIN_ROWS)), resident * sm_count(total.device))
    partial_dweight = torch.empty(programs, N, dtype=mean.dtype, device=total.device)
    partial_dbias = None if bias is None else torch.empty_like(partial_dweight)
    launch(
        _layer_norm_bwd_kernel, (programs,),
        dy, dtotal, total, weight.contiguous(), mean, rstd, seed,
        dresidual, None if dx_dtype is None else dx, partial_dweight, partial_dbias,
        dy.stride(0), 0 if dtotal is None else dtotal.stride(0), total.stride(0), M, dropout_p, keep_scale(dropout_p),
        N=N, ROWS=rows, CHUNK=chunk, STAGES=stages, ROW_COUNTERS=next_power_of_2(N), num_warps=num_warps,
        maxnreg=registers,
        enable_fp_fusion=N > 1,  # of one column dx is 0, and an FMA of dy * weight - mean_g leaves what rounding took of mean_g
    )  # fmt: skip
    column_sums(partial_dweight, dweight, partial_dbias, None if bias is None else dbias)
    return outputs


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        y, _, mean, rstd = layer_norm_fwd(x, None, weight, bias, eps, 0.0, None, dtype)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, _, dweight, dbias = layer_norm_bwd(dy, None, x, weight, bias, mean, rstd, 0.0, None, None)
        return dx, dweight, None if bias is None else dbias, None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, dropout_p, seed, dtype):
        if x is None:
            y, _, mean, rstd = layer_norm_fwd(residual, None, weight, bias, eps, 0.0, None, dtype)
            total = residual.view_as(residual)
        else:
            y, total, mean, rstd = layer_norm_fwd(x, residual, weight, bias, eps, dropout_p, seed, dtype)
        ctx.save_for_backward(total, weight, bias, mean, rstd, seed)
        ctx.dropout_p = dropout_p
        # Without dropout both addends have one gradient, unless their dtypes differ.
        own = x is not None and (dropout_p > 0.0 or x.dtype != residual.dtype)
        ctx.adds, ctx.dx_dtype = x is not None, x.dtype if own else None
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtotal):
        total, weight, bias, mean, rstd, seed = ctx.saved_tensors
        dy = torch.zeros_like(total) if dy is None else dy
        dresidual, dx, dweight, dbias = layer_norm_bwd(
            dy, dtotal, total, weight, bias, mean, rstd, ctx.dropout_p, seed, ctx.dx_dtype
        )
        if not ctx.adds:
            dx = None
        elif ctx.dx_dtype is None:
            dx = dresidual
        return dx, dresidual, dweight, None if bias is None else dbias, None, None, None, None


def _check(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None, residual: Tensor | None = None
) -> None:
    check_device(op, x=x, weight=weight, bias=bias, residual=residual)
    check_float(op, x=x, weight=weight, bias=bias, residual=residual)
    check(dtype is None or dtype.is_floating_point, f"{op}: dtype must be a floating one, got {dtype}")
    check(x.dim() > 0, f"{op}: x must have at least one dimension, got a scalar")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check(
                vector.shape == x.shape[-1:],
                f"{op}: {name} must be [{x.shape[-1]}], the last dimension of x, got {list(vector.shape)}",
            )


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension. x [..., C] -> x's shape, in `dtype` or else x's."""
    _check("layer_norm", x, weight, bias, dtype)
    return _LayerNorm.apply(x, weight, bias, eps, dtype)


def add_layer_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """total = residual + dropout(x); returns (layer_norm(total), total) [..., C]: total in the residual's dtype, the norm in
    `dtype` or else that too.

    Where x is None total is the residual itself, whose two gradients the backward pass adds up. `seed=None` draws the mask's
    seed from torch's generator of the device; an integer makes the call a pure function.
    """
    _check("add_layer_norm", residual if x is None else x, weight, bias, dtype, residual)
    check(
        x is None or x.shape == residual.shape,
        f"add_layer_norm: residual must have x's shape {None if x is None else list(x.shape)}, got {list(residual.shape)}",
    )
    check(0.0 <= dropout_p <= 1.0, f"add_layer_norm: dropout_p must be between 0 and 1, got {dropout_p}")
    seed_tensor = dropout_seed(residual.device, seed) if dropout_p > 0.0 and x is not None else None
    return _AddLayerNorm.apply(x, residual, weight, bias, eps, dropout_p if x is not None else 0.0, seed_tensor, dtype)
