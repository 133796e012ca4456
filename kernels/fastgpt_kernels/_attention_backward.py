"""Attention backward: dq, dk and dv from what the forward kept, in one launch and a small one before it.

    p = exp2(s2 - max) / l          delta = rowsum(dout * out)      dp = dout v^T           ds = p * (dp - delta)
    dq = scale * ds k               dk = scale * ds^T q             dv = p^T dout
    dropout    dv takes p and ds takes dp where p was kept, both scaled by 1 / kept; that factor is left to the end of the sums,
               so that ds is p * (dp - kept * delta)

    q, dq, dout    [B, H, T, D]   bf16 | fp16 | fp32 | fp64     any strides with a unit last one (else copied)
    k, v, dk, dv   [B, H, S, D]   like q
    statistics     [B, H, T', 4]  fp32 (fp64), T rounded up; +inf and 0 in the rows that adds
                   16 bits        lse, 0, kept * delta, 0           lse = max + log2(l)
                   32 and 64      max, log2(l), kept * delta, 0

Where T == S the gradients are slices of one [B, T, 3, H, D] buffer, the memory order of a packed QKV projection's output.

Some programs own keys (dk and dv) and others queries (dq), as in PyTorch's flex attention: seven products for the five of an
algorithm that adds dq up atomically, and sums of a fixed order for it. Both go through the tiles of the other side that hold a
pair that is seen, in three parts: ragged, whole, ragged (see _attention_mask.py). A head's programs are neighbours, to share L2.

In 32 bits and more, max and log2(l) stay apart as far as the exponent: the compiler makes `s2 - max` one fused operation here
and in the forward, with the same rounding, and so p is what the forward had. Their sum would be rounded once more, by 1e-3
where scores are some 10,000, which 16-bit results don't show.

Source: Dao, 2023, https://arxiv.org/abs/2307.08691; https://github.com/pytorch/pytorch/tree/main/torch/_inductor/kernel/flex
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_mask import first_keys, keep, keep_scale, kept_share, key_range, query_range, visible
from ._heads import (
    add_dot,
    dot_heads,
    head_constants,
    ieee,
    load_head,
    next_head,
    scale_head,
    store_head,
    unit_last,
    walked,
    zero_head,
)
from ._launch import arch, cdiv, launch, register

LOG2_E = tl.constexpr(1.4426950408889634)

# The backward's statistics have rows of 16 bytes, and their number is padded to a multiple of this, no smaller than a tile: a
# tile's are one aligned vector without a mask. Triton 3.6 copies a vector shorter than the threads are many once per warp.
PADDING = 128


def _statistics_rows(head_size: int, dtype: torch.dtype) -> int:
    """Rows of out and dout to a program of the kernel that writes them, a streaming one: 16 KB of each at D = 64 in 16 bits.

    Half where heads are over 128 wide. Few where they come in more registers: in fp64, in fp32 over 96 wide but for 128, and
    where 16-bit rows aren't multiples of 16 bytes and so come element by element.
    """
    spread = head_size % 8 if dtype.itemsize == 2 else head_size > 96 and head_size != 128
    if head_size <= 64 or not (spread or dtype == torch.float64):
        return PADDING if head_size <= 128 else 64
    return 32 if head_size <= 128 else 16


# The table starts from PyTorch's for flex attention (torch/_inductor/template_heuristics), as the forward's does.


def _bwd_blocks(arch: int, head_size: int, dtype: torch.dtype, dropout: bool, documents: bool) -> dict[str, Any]:
    """BLOCK_OWN is what a program owns, keys or queries; BLOCK_INNER is what it takes at a time of the other."""
    maxnreg = None
    between = 96 < head_size < 128  # these cost more registers than 128 does
    if dtype == torch.float64:
        m, n, stages, warps, maxnreg = 16, 16, 1, 4 if head_size <= 32 else 8, 255
    elif dtype == torch.float32:
        if head_size <= 64:
            m, n, stages, warps = 32, 32, 2, 8
            # Left to choose, ptxas takes fewer registers than it needs and spills: in tf32, and with dropout.
            few = dropout or (head_size < 64 and arch // 10 in (8, 12))
            maxnreg = (255 if few else 128 if arch == 80 else None) if ieee(dtype) else 128 if head_size == 64 else 255
        else:
            m, n, stages, warps = 16, 32 if head_size <= 128 else 16, 2 if head_size <= 128 and ieee(dtype) else 1, 8
            if ieee(dtype):
                maxnreg = 128 if dropout and head_size <= 96 and arch == 80 else None
            elif between:
                maxnreg = 255
            elif arch // 10 == 10 and head_size <= 96:
                m, n = 32, 64  # the rows that a product in tensor memory takes; with fewer, in registers, ptxas spills
    elif head_size > 128:
        m, n, stages, warps, maxnreg = 32, 32, 1, 8, 255
    elif arch // 10 in (9, 10):
        spills = (head_size > 96 and arch < 100) or (32 < head_size < 64 and arch >= 100)  # with documents
        narrow = (head_size > 64 and (dropout or between)) or (documents and spills)
        m, n = 32 if narrow else 64, 64 if dropout and ((documents and head_size > 96) or between) else 128
        # Of D = 128 in two stages, ptxas spills 16 bytes on sm90.
        deep = head_size <= 64 or (head_size > 96 and not narrow and arch // 10 == 9)
        stages, warps = 3 if deep else 2, 8
        if between and arch >= 100:
            maxnreg = 255
    else:
        m, n = 32 if 64 < head_size <= 96 or (between and dropout) else 64, 32 if between and dropout else 64
        stages, warps = 2, 4 if head_size <= 64 else 8
        if documents and arch in (86, 89) and head_size < 64:
            maxnreg = 255
        # Where ptxas would spill, mostly 8 bytes of an address, rows come half as many at a time:
        padded = 80 < head_size <= 96
        if arch >= 120:
            spills = dropout or (documents and head_size <= 96)
        elif arch == 80:
            spills = documents and not dropout and (head_size <= 64 or padded)
        else:
            spills = dropout and (padded or (documents and 48 < head_size <= 64))
        m //= 2 if spills else 1
    return {"BLOCK_INNER": m, "BLOCK_OWN": n, "num_stages": stages, "num_warps": warps, "maxnreg": maxnreg}


@triton.jit(do_not_specialize=["T"])
def _attention_statistics_kernel(
    out_ptr, dout_ptr, lse_ptr, statistics_ptr,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, H, T, kept,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, PADDING: tl.constexpr,
    APART: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, PADDING) * (PADDING // ROWS)
    head = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    out = load_head(out_ptr + b * stride_ob + h * stride_oh, rows, stride_ot, T, D, BLOCK_D, BLOCK_E, True)
    dout = load_head(dout_ptr + b * stride_gb + h * stride_gh, rows, stride_gt, T, D, BLOCK_D, BLOCK_E, True)
    delta = tl.sum(out[0].to(ACC) * dout[0].to(ACC), 1)
    if BLOCK_E > 0:
        delta += tl.sum(out[1].to(ACC) * dout[1].to(ACC), 1)
    at = head.to(tl.int64) * T + rows
    zero = tl.zeros([ROWS], ACC)
    if APART:
        high = tl.load(lse_ptr + at * 2, mask=rows < T, other=float("inf"))
        low = tl.load(lse_ptr + at * 2 + 1, mask=rows < T, other=0.0)
    else:
        high = tl.load(lse_ptr + at, mask=rows < T, other=float("inf"))
        low = zero
    statistics = tl.join(tl.join(high, delta * kept), tl.join(low, zero))
    to = statistics_ptr + (tl.program_id(0).to(tl.int64) * (4 * ROWS) + tl.arange(0, 4 * ROWS))
    tl.store(to, tl.reshape(statistics, [4 * ROWS]))


@triton.jit(do_not_specialize=["T", "S"])
def _attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, q_box, q_rest, k_box, k_rest, v_box, v_rest, dout_box, dout_rest,
    first_ptr, dout_ptr, statistics_ptr, seed_ptr, dq_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqt, stride_dkb, stride_dks, H, T, S, scale, kept,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_OWN: tl.constexpr,
    PADDING: tl.constexpr, CAUSAL: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    key_blocks = tl.cdiv(S, BLOCK_OWN)
    blocks = key_blocks + tl.cdiv(T, BLOCK_OWN)
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    b_at, h_at = head // H, head % H
    b, h = b_at.to(tl.int64), h_at.to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    dout_ptr += b * stride_gb + h * stride_gh
    statistics_ptr += head.to(tl.int64) * tl.cdiv(T, PADDING) * (4 * PADDING)
    if first_ptr is not None:
        first_ptr += b * T
    scale_log2 = tl.cast(scale, ACC) * LOG2_E
    rescale = 1.0
    if seed_ptr is not None:
        rescale = keep_scale(kept, ACC)
        seed, nothing = tl.load(seed_ptr), tl.cast(kept * 0.0, ACC)

    if block < key_blocks:
        col = block * BLOCK_OWN
        cols = col + tl.arange(0, BLOCK_OWN)
        k = load_head(k_ptr, cols, stride_ks, S, D, BLOCK_D, BLOCK_E, True)
        v = load_head(v_ptr, cols, stride_vs, S, D, BLOCK_D, BLOCK_E, True)
        dk = zero_head(BLOCK_OWN, BLOCK_D, BLOCK_E, ACC)
        dv = zero_head(BLOCK_OWN, BLOCK_D, BLOCK_E, ACC)
        begin, whole, ragged, end = query_range(first_ptr, col, col + BLOCK_OWN, T, S, BLOCK_INNER, CAUSAL)
        for PART in tl.static_range(2 if first_ptr is None else 3):
            if PART == 1:
                begin, whole = whole, ragged
            if PART == 2:
                begin, whole = ragged, end
            for tile in range(begin, whole):
                row = tile * BLOCK_INNER
                rows = row + tl.arange(0, BLOCK_INNER)
                # Past the last query that one is read again, or zeros: with max = +inf p is 0 or, of a NaN or Inf, NaN.
                near = tl.minimum(rows, T - 1)
                q = next_head(q_ptr, q_box, q_rest, near, stride_qt, b_at, h_at, row, T, D, BLOCK_D, BLOCK_E, False)
                dout = next_head(
                    dout_ptr, dout_box, dout_rest, near, stride_gt, b_at, h_at, row, T, D, BLOCK_D, BLOCK_E, False
                )
                # Statistics behind both products, to hold fewer registers.
                scores_t = dot_heads(k, q, PRECISION, ACC)
                dp_t = dot_heads(v, dout, PRECISION, ACC)
                statistics = tl.load(statistics_ptr + tile * (4 * BLOCK_INNER) + tl.arange(0, 4 * BLOCK_INNER))
                high_delta, low = tl.split(tl.reshape(statistics, [BLOCK_INNER, 2, 2]))
                high, delta = tl.split(high_delta)
                s_t = scores_t * scale_log2 - high[None, :]
                if APART:
                    log_sum, _ = tl.split(low)
                    s_t -= log_sum[None, :]
                p_t = tl.exp2(s_t)
                if PART != 1:
                    first = first_keys(first_ptr, rows[None, :], T)
                    seen_t = visible(rows[None, :], cols[:, None], first, T, S, CAUSAL, first_ptr is not None)
                    p_t = tl.where(seen_t, p_t, 0.0)
                kept_t = p_t
                if seed_ptr is not None:
                    kept_t = tl.where(keep(seed, head, row, col, kept, BLOCK_INNER, BLOCK_OWN, True), p_t, nothing)
                dv = add_dot(dv, kept_t, dout, PRECISION, ACC)
                if seed_ptr is None:
                    ds_t = p_t * (dp_t - delta[None, :])
                else:
                    ds_t = kept_t * dp_t - p_t * delta[None, :]
                if PART != 1:
                    ds_t = tl.where(p_t == 0.0, 0.0, ds_t)  # 0 * NaN would take a NaN of v to keys that nobody sees
                dk = add_dot(dk, ds_t, q, PRECISION, ACC)
        offset = b * stride_dkb + h * D
        store_head(dk_ptr + offset, cols, stride_dks, S, scale_head(dk, scale * rescale), D)
        store_head(dv_ptr + offset, cols, stride_dks, S, scale_head(dv, rescale), D)
    else:
        row = (blocks - 1 - block) * BLOCK_OWN
        rows = row + tl.arange(0, BLOCK_OWN)
        q = load_head(q_ptr, rows, stride_qt, T, D, BLOCK_D, BLOCK_E, True)
        dout = load_head(dout_ptr, rows, stride_gt, T, D, BLOCK_D, BLOCK_E, True)
        high = tl.load(statistics_ptr + rows * 4)
        delta = tl.load(statistics_ptr + rows * 4 + 2)
        if APART:
            log_sum = tl.load(statistics_ptr + rows * 4 + 1)
        first = first_keys(first_ptr, rows[:, None], T)
        dq = zero_head(BLOCK_OWN, BLOCK_D, BLOCK_E, ACC)
        begin, whole, ragged, end = key_range(first_ptr, row, row + BLOCK_OWN, T, S, BLOCK_INNER, CAUSAL)
        for PART in tl.static_range(1 if first_ptr is None else 0, 3):
            if PART == 1:
                begin, whole = whole, ragged
            if PART == 2:
                begin, whole = ragged, end
            for col in range(begin, whole, BLOCK_INNER):
                cols = col + tl.arange(0, BLOCK_INNER)
                k = next_head(k_ptr, k_box, k_rest, cols, stride_ks, b_at, h_at, col, S, D, BLOCK_D, BLOCK_E, PART != 1)
                v = next_head(v_ptr, v_box, v_rest, cols, stride_vs, b_at, h_at, col, S, D, BLOCK_D, BLOCK_E, PART != 1)
                scores = dot_heads(q, k, PRECISION, ACC)
                dp = dot_heads(dout, v, PRECISION, ACC)
                s = scores * scale_log2 - high[:, None]
                if APART:
                    s -= log_sum[:, None]
                p = tl.exp2(s)
                if seed_ptr is not None:
                    dp = tl.where(keep(seed, head, row, col, kept, BLOCK_OWN, BLOCK_INNER, False), dp, nothing)
                ds = p * (dp - delta[:, None])
                if PART != 1:
                    seen = visible(rows[:, None], cols[None, :], first, T, S, CAUSAL, first_ptr is not None)
                    ds = tl.where(seen, ds, 0.0)
                dq = add_dot(dq, ds, k, PRECISION, ACC)
        store_head(dq_ptr + b * stride_dqb + h * D, rows, stride_dqt, T, scale_head(dq, scale * rescale), D)


def split_gradients(gradients: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv [B, H, T or S, D] inside one buffer: interleaved as [B, T, 3, H, D], or behind each other if T != S."""
    B, H, T, D = q.shape
    S = k.shape[2]
    if T == S:
        dq, dk, dv = gradients.view(B, T, 3, H, D).unbind(2)
    else:
        sizes = T, S, S
        parts = gradients.split([B * H * D * size for size in sizes])
        dq, dk, dv = (part.view(B, size, H, D) for part, size in zip(parts, sizes, strict=True))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _bwd_fake(dout, q, k, v, first, out, lse, seed, causal, scale, dropout_p):
    return q.new_empty(q.numel() + 2 * k.numel())


@register(
    "_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? first, Tensor out, Tensor lse, Tensor? seed,"
    " bool causal, float scale, float dropout_p) -> Tensor",
    _bwd_fake,
)
def attention_bwd(dout, q, k, v, first, out, lse, seed, causal, scale, dropout_p):
    """dout [B, H, T, D] and what `attention_fwd` took and gave -> the buffer that `split_gradients` takes apart."""
    dout, q, k, v = unit_last(dout), unit_last(q), unit_last(k), unit_last(v)
    B, H, T, D = q.shape
    S = k.shape[2]
    gradients = torch.empty(q.numel() + 2 * k.numel(), dtype=q.dtype, device=q.device)
    dq, dk, dv = split_gradients(gradients, q, k)
    statistics = torch.empty(B, H, cdiv(T, PADDING) * PADDING, 4, dtype=lse.dtype, device=q.device)
    head = head_constants(q) | {"APART": lse.dim() == 4}
    kept, rows = kept_share(dropout_p), _statistics_rows(D, q.dtype)
    launch(
        _attention_statistics_kernel,
        (B * H * cdiv(T, PADDING) * (PADDING // rows),),
        *(out, dout, lse, statistics, *out.stride()[:3], *dout.stride()[:3], H, T, kept),
        **{name: head[name] for name in ("D", "BLOCK_D", "BLOCK_E", "APART", "ACC")},
        ROWS=rows,
        PADDING=PADDING,
        # Left alone, ptxas takes 80 of few rows, and of fp32's on sm100, and spills.
        maxnreg=255 if rows < PADDING or (q.dtype == torch.float32 and arch(q.device) // 10 == 10) else None,
    )
    blocks = _bwd_blocks(arch(q.device), D, q.dtype, seed is not None, first is not None)
    (q, k, v, dout), boxes = walked(blocks["BLOCK_INNER"], head, q, k, v, dout)
    launch(
        _attention_bwd_kernel,
        (B * H * (cdiv(S, blocks["BLOCK_OWN"]) + cdiv(T, blocks["BLOCK_OWN"])),),
        *(q, k, v, *boxes, first, dout, statistics, seed, dq, dk, dv),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3]),
        *(dq.stride(0), dq.stride(2), dk.stride(0), dk.stride(2)),
        *(H, T, S, scale, kept),
        PADDING=PADDING,
        CAUSAL=causal,
        **head,
        **blocks,
    )
    return gradients
