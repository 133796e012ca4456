"""Token and position embeddings with dropout, forward and backward.

    y[b, t] = dropout(tok_weight[idx[b, t]] + pos_weight[offset + t])
    d       = dropout's mask and scale on dy
    dtok_weight[v] = sum of d where idx is v      dpos_weight[offset + t] = sum over b of d[b, t]

    idx                     [B, T]      int32 | int64; one outside 0 .. V - 1 gives a row of NaN and no gradient to any token
    positions               [B, T]      int32 | int64, or None: then offset + t; outside 0 .. P - 1 as with idx
    tok_weight              [V, C]      fp16 | bf16 | fp32 | fp64
    pos_weight              [P, C]      any of the four
    y, dy, d                [B, T, C]   tok_weight's dtype

A program of the forward owns a tile of tokens and the columns that one warp reads with 16 bytes a lane: each of B T C
elements is read once and written once, where torch's gather, sum and dropout take 6.5 passes (4 without dropout). A program
of the backward owns such a tile of positions and walks over the batch, so that one reading of dy gives d and, in a fixed
order, dpos_weight. Without dropout d is dy and isn't written. The sum over tokens of a kind is torch's own: it sorts idx and
adds up segments, no atomics, and its floor is to read d and write [V, C], which no kernel here would lower. Positions that are
given are summed in the same way.

Bound by bandwidth. Bytes: 2 B T C b forward and backward for itemsize b, before torch's part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import arch, cdiv, check, check_device, check_float, dropout_seed, launch, next_power_of_2, register
from ._math import dropout
from ._rows import as_rows, column_tile, keep_scale
from .dropout import dropout_add_rows

_NUM_WARPS = 4
# Loads in flight a lane: of tokens in the forward; of positions in the backward, whose loop has the next ones on their way.
_FWD_LOADS = 4
_BWD_LOADS = 1


@triton.jit(do_not_specialize=["M", "T", "V", "P", "offset"])
def _embedding_fwd_kernel(
    idx_ptr, positions_ptr, tok_ptr, pos_ptr, seed_ptr, y_ptr, stride_tok, stride_pos, M, T, V, P, offset,
    dropout_p, keep_scale,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_COUNTERS: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    PARTS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    rows = (tl.program_id(0) // PARTS).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < M) & (cols < C)
    token = tl.load(idx_ptr + rows, mask=rows < M, other=0).to(tl.int64)
    known = (token >= 0) & (token < V)
    if positions_ptr is not None:
        position = tl.load(positions_ptr + rows, mask=rows < M, other=0).to(tl.int64)
        known = known & (position >= 0) & (position < P)
    else:
        position = ((tl.program_id(0) // PARTS * ROWS + tl.arange(0, ROWS)[:, None]) % T + offset).to(tl.int64)
    y = tl.load(tok_ptr + token * stride_tok + cols, mask=mask & known, other=float("nan")).to(acc_dtype)
    y += tl.load(pos_ptr + position * stride_pos + cols, mask=mask & known, other=0.0).to(acc_dtype)
    if seed_ptr is not None:
        y = dropout(y, tl.load(seed_ptr), rows * ROW_COUNTERS + cols, dropout_p, keep_scale)
    tl.store(y_ptr + rows * C + cols, y, mask=mask)


@triton.jit(do_not_specialize=["B", "T", "offset"])
def _embedding_bwd_kernel(
    dy_ptr, seed_ptr, d_ptr, dpos_ptr, stride_dy, B, T, offset, dropout_p, keep_scale,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_COUNTERS: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    PARTS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    t = (tl.program_id(0) // PARTS).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (t < T) & (cols < C)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    dpos = tl.zeros((ROWS, COLUMNS), acc_dtype)
    for b in tl.range(0, B, num_stages=4):
        rows = b * T.to(tl.int64) + t
        d = tl.load(dy_ptr + rows * stride_dy + cols, mask=mask, other=0.0).to(acc_dtype)
        if seed_ptr is not None:
            d = dropout(d, seed, rows * ROW_COUNTERS + cols, dropout_p, keep_scale)
            tl.store(d_ptr + rows * C + cols, d, mask=mask)
        dpos += d
    tl.store(dpos_ptr + (t + offset) * C + cols, dpos, mask=mask)


def _embedding_fwd_fake(idx, tok_weight, pos_weight, dropout_p, seed, offset, positions):
    return torch.empty((*idx.shape, tok_weight.shape[1]), dtype=tok_weight.dtype, device=idx.device)


@register(
    "_embedding_fwd(Tensor idx, Tensor tok_weight, Tensor pos_weight, float dropout_p, Tensor? seed, SymInt offset,"
    " Tensor? positions) -> Tensor",
    _embedding_fwd_fake,
)
def embedding_fwd(idx, tok_weight, pos_weight, dropout_p, seed, offset, positions):
    """idx and positions [B, T], tok_weight [V, C], pos_weight [P, C] -> y [B, T, C]."""
    y = _embedding_fwd_fake(idx, tok_weight, pos_weight, dropout_p, seed, offset, positions)
    if y.numel() == 0:
        return y
    tok_weight, pos_weight = as_rows(tok_weight), as_rows(pos_weight)
    M, (V, C) = idx.numel(), tok_weight.shape
    rows, columns = column_tile(C, y.element_size(), _NUM_WARPS, _FWD_LOADS)
    launch(
        _embedding_fwd_kernel, (cdiv(M, rows) * cdiv(C, columns),),
        idx.contiguous(), None if positions is None else positions.contiguous(), tok_weight, pos_weight, seed, y,
        tok_weight.stride(0), pos_weight.stride(0),
        M, idx.shape[1], V, pos_weight.shape[0], offset, dropout_p, keep_scale(dropout_p),
        C=C, ROWS=rows, COLUMNS=columns, ROW_COUNTERS=next_power_of_2(C), num_warps=_NUM_WARPS,
        # not reached: without a limit ptxas prefers a spill there to losing a program on the multiprocessor
        maxnreg=128 if seed is not None and arch(y.device) >= 120 else None,
    )  # fmt: skip
    return y


def _embedding_bwd_fake(dy, pos_weight, dropout_p, seed, offset):
    d = torch.empty(0 if seed is None else dy.shape, dtype=dy.dtype, device=dy.device)
    return d, torch.zeros(pos_weight.shape, dtype=pos_weight.dtype, device=dy.device)


@register(
    "_embedding_bwd(Tensor dy, Tensor pos_weight, float dropout_p, Tensor? seed, SymInt offset) -> (Tensor, Tensor)",
    _embedding_bwd_fake,
)
def embedding_bwd(dy, pos_weight, dropout_p, seed, offset):
    """dy [B, T, C] -> d [B, T, C], or [0] without dropout, and dpos_weight [P, C]."""
    outputs = d, dpos = _embedding_bwd_fake(dy, pos_weight, dropout_p, seed, offset)
    if dy.numel() == 0:
        return outputs
    (B, T, C), dy = dy.shape, as_rows(dy)
    rows, columns = column_tile(C, dy.element_size(), _NUM_WARPS, _BWD_LOADS)
    launch(
        _embedding_bwd_kernel, (cdiv(T, rows) * cdiv(C, columns),),
        dy, seed, None if seed is None else d, dpos, dy.stride(0), B, T, offset, dropout_p, keep_scale(dropout_p),
        C=C, ROWS=rows, COLUMNS=columns, ROW_COUNTERS=next_power_of_2(C), num_warps=_NUM_WARPS,
    )  # fmt: skip
    return outputs


def _rows_by_index(d: Tensor, index: Tensor, rows: int) -> Tensor:
    """[rows, C]: at i the sum of d where index is i."""
    # torch's sum writes wherever an index points: -1 it leaves out, and what is past the table goes to a row behind it
    return torch.ops.aten.embedding_dense_backward(d, index.clamp(-1, rows), rows + 1, -1, False)[:rows]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, idx, tok_weight, pos_weight, dropout_p, seed, offset, positions):
        ctx.save_for_backward(idx, pos_weight, seed, positions)
        ctx.vocabulary, ctx.dropout_p, ctx.offset = tok_weight.shape[0], dropout_p, offset
        return embedding_fwd(idx, tok_weight, pos_weight, dropout_p, seed, offset, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        idx, pos_weight, seed, positions = ctx.saved_tensors
        if positions is None:
            d, dpos = embedding_bwd(dy, pos_weight, ctx.dropout_p, seed, ctx.offset)
            d = dy if seed is None else d
            dtok = _rows_by_index(d, idx, ctx.vocabulary)
        else:
            d = dy if seed is None else dropout_add_rows(dy, None, seed, ctx.dropout_p, dy)
            # what gave NaN has no gradient to either table
            P, V = pos_weight.shape[0], ctx.vocabulary
            known = (idx >= 0) & (idx < V) & (positions >= 0) & (positions < P)
            dtok = _rows_by_index(d, idx.where(known, -1), V)
            wide = d.to(torch.promote_types(d.dtype, pos_weight.dtype))
            dpos = _rows_by_index(wide, positions.where(known, -1), P).to(pos_weight.dtype)
        return None, dtok, dpos, None, None, None, None


def embedding(
    idx: Tensor,
    tok_weight: Tensor,
    pos_weight: Tensor,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    positions: Tensor | None = None,
) -> Tensor:
    """dropout(tok_weight[idx] + pos_weight[positions]). idx [B, T], weights [V, C] and [P, C] -> [B, T, C].

    positions: int32 or int64 [B, T]; None is offset .. offset + T - 1 in every row. `seed=None` draws the mask's seed from
    torch's generator of the device; an integer makes the call a pure function.
    """
    check_device("embedding", idx=idx, tok_weight=tok_weight, pos_weight=pos_weight, positions=positions)
    check_float("embedding", tok_weight=tok_weight, pos_weight=pos_weight)
    integers = (torch.int32, torch.int64)
    check(
        idx.dtype in integers and idx.dim() == 2,
        f"embedding: idx must be int32 or int64 [B, T], got {idx.dtype} {list(idx.shape)}",
    )
    shapes = list(tok_weight.shape), list(pos_weight.shape)
    matching = tok_weight.dim() == pos_weight.dim() == 2 and tok_weight.shape[1] == pos_weight.shape[1]
    check(matching, f"embedding: tok_weight and pos_weight must be [V, C] and [P, C], got {shapes[0]} and {shapes[1]}")
    if positions is None:
        last = offset + idx.shape[1]
        check(
            offset >= 0 and last <= shapes[1][0],
            f"embedding: positions {offset} .. {last - 1} don't fit pos_weight of {shapes[1][0]} rows",
        )
    else:
        check(
            positions.dtype in integers and positions.shape == idx.shape,
            f"embedding: positions must be int32 or int64 {list(idx.shape)}, got {positions.dtype} {list(positions.shape)}",
        )
        check(offset == 0, f"embedding: positions are given, so offset must be 0, got {offset}")
    check(0.0 <= dropout_p <= 1.0, f"embedding: dropout_p must be between 0 and 1, got {dropout_p}")
    seed_tensor = dropout_seed(idx.device, seed) if dropout_p > 0.0 else None
    return _Embedding.apply(idx, tok_weight, pos_weight, dropout_p, seed_tensor, offset, positions)
