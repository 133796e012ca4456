"""Flash attention: softmax(scale * q @ k.T) @ v without ever storing a [T, S] matrix.

    s2 = scale * log2(e) * q k^T      p = exp2(s2 - max)      l = rowsum(p)      out = p v / l
    dropout                           p in `out` is multiplied by keep / kept; `l` takes p as it is

    q              [B, H, T, D]   bf16 | fp16 | fp32 | fp64     any strides with a unit last one (else copied); D up to 256, in
                                                                fp64 to 128
    k, v           [B, H, S, D]   like q
    out            [B, H, T, D]   like q; memory is [B, T, H, D], which the projection after it reads without a copy
    lse            [B, H, T]      max + log2(l) in fp32; +inf where a query sees no key, so that its p is 0
                   [B, H, T, 2]   for fp32 and fp64 inputs max and log2(l) apart, in their dtype (see _attention_backward.py)
    first          [B, T]         int32 on the device, or None
    seed           [1]            int64 on the device, with dropout only

With `causal`, query t of row b sees keys first[b, t] .. S - T + t. `first` doesn't decrease along T; it is 0 where it is None.

One program owns BLOCK_M queries of one head and walks the keys that any of them sees in three parts: the tiles where its queries'
first keys lie, those that all its queries see whole, without a mask, and the few on the diagonal or at the end. A head's
programs are neighbours, to share L2, and its longest start first. On Hopper and B200 keys and values come as boxes of tensor
descriptors; what those can't have, rows of other than a multiple of 16 bytes first of all, is copied (see _heads.py). The
backward is in _attention_backward.py, and what both say of masks and dropout in _attention_mask.py.

Bound by tensor cores and, at D = 64, as much by exp2: either does 16 scores a clock and SM. FLOPs 4 B H T S D forward, 10
backward, half of that with `causal`, less with `first`: what counts is pairs that are seen. The floor is those over the
tensor-core rate.

Source: Dao, 2023, https://arxiv.org/abs/2307.08691
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._attention_backward import attention_bwd, split_gradients
from ._attention_mask import first_keys, keep, keep_scale, kept_share, key_range, visible
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
from ._launch import arch, cdiv, check, check_device, check_float, dropout_seed, launch, register

MAX_HEAD_SIZE = 256
LOG2_E = tl.constexpr(1.4426950408889634)

# This table and the backward's start from PyTorch's for flex attention (torch/_inductor/template_heuristics) and keep what
# compiles without spills and under the shared memory of every GPU in the row; `python -m fastgpt_kernels.aot` re-derives that,
# and `python -m benchmarks.sweep` measures. Tiles 128 wide are for chips of 227 KB (Hopper, B200), not of 99 KB. Dropout's
# random words take registers, so most tiles are half as large with it.


def _fwd_blocks(arch: int, head_size: int, dtype: torch.dtype, dropout: bool, documents: bool) -> dict[str, Any]:
    wide = arch // 10 in (9, 10)
    between = 96 < head_size < 128  # in these ptxas needs more registers than at 128
    maxnreg = None
    if dtype == torch.float64:
        m, n, stages, warps = 16, 16, 1, 8 if head_size > 64 and arch >= 120 else 4
        maxnreg = 255 if arch >= 120 else None
    elif dtype == torch.float32:  # small enough for "ieee", whose products are unrolled into FMAs
        m, n, stages, warps = (64, 32, 2, 8) if head_size <= 64 else (32, 16, 2 if head_size <= 128 else 1, 8)
        # Where it is left alone, ptxas takes too few registers and spills:
        if ieee(dtype):
            if documents and head_size <= 64 and arch >= 100:
                maxnreg = 255
            elif head_size <= 64 and (dropout or arch >= 100):
                maxnreg = 168 if dropout else 128
            elif 64 < head_size <= 128 and (arch // 10 in (8, 12) or (arch // 10 == 9 and dropout)):
                maxnreg = 128
        elif documents and head_size < 64:
            maxnreg = 255
        elif dropout and head_size > 128:
            m = 16
        elif dropout and head_size == 64 and arch == 80:
            n, maxnreg = 16, 128  # of 32 keys Triton 3.6 spills an address, or takes a second program's registers
        if between:
            maxnreg = 255
    elif head_size <= 64:  # two programs an SM: one's exp2 runs under the other's products
        # 128 rows spill with documents where mma.sync holds them
        half = dropout or (documents and arch // 10 in (8, 12))
        m, n, stages, warps = 64 if half else 128, 64, 3, 4
        if arch == 80 and not half:
            stages = 2  # with two tiles ahead Triton 3.6 spills an address
        if documents and arch in (86, 89) and head_size < 64:
            maxnreg = 255
    elif head_size <= 128 and (wide or not between):
        n = 128 if arch // 10 == 9 and head_size % 8 == 0 else 64  # rows padded for their copies cost registers
        half = dropout or (documents and head_size > 96 and arch >= 120)
        m, n, stages, warps = 128, n // (2 if half else 1), 2, 8
        if dropout and arch // 10 == 10 and not between:
            m, n = 64, 64  # of 128 x 32 Triton 3.6 spills what two programs' registers can't hold
    elif head_size <= 128:
        m, n, stages, warps, maxnreg = 64, 64 if head_size % 8 == 0 else 16 if dropout else 32, 2, 8, 255
    else:
        m, n, stages, warps = 128 if wide else 64, 16 if dropout or (arch >= 120 and head_size <= 192) else 32, 2, 8
    return {"BLOCK_M": m, "BLOCK_N": n, "num_stages": stages, "num_warps": warps, "maxnreg": maxnreg}


@triton.jit(do_not_specialize=["T", "S"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_box, k_rest, v_box, v_rest, first_ptr, out_ptr, lse_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_ot, H, T, S, scale, kept,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // blocks
    row = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b_at, h_at = head // H, head % H
    b, h = b_at.to(tl.int64), h_at.to(tl.int64)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    if first_ptr is not None:
        first_ptr += b * T
    rows = row + tl.arange(0, BLOCK_M)
    q = load_head(q_ptr + b * stride_qb + h * stride_qh, rows, stride_qt, T, D, BLOCK_D, BLOCK_E, True)
    first = first_keys(first_ptr, rows[:, None], T)
    if seed_ptr is not None:
        seed, nothing = tl.load(seed_ptr), tl.cast(kept * 0.0, ACC)

    scale_log2 = tl.cast(scale, ACC) * LOG2_E
    m_i = tl.full([BLOCK_M], float("-inf"), ACC)
    l_i = tl.zeros([BLOCK_M], ACC)
    acc = zero_head(BLOCK_M, BLOCK_D, BLOCK_E, ACC)
    begin, whole, ragged, end = key_range(first_ptr, row, row + BLOCK_M, T, S, BLOCK_N, CAUSAL)
    for PART in tl.static_range(1 if first_ptr is None else 0, 3):
        if PART == 1:
            begin, whole = whole, ragged
        if PART == 2:
            begin, whole = ragged, end
        for col in range(begin, whole, BLOCK_N):
            cols = col + tl.arange(0, BLOCK_N)
            k = next_head(k_ptr, k_box, k_rest, cols, stride_ks, b_at, h_at, col, S, D, BLOCK_D, BLOCK_E, PART != 1)
            v = next_head(v_ptr, v_box, v_rest, cols, stride_vs, b_at, h_at, col, S, D, BLOCK_D, BLOCK_E, PART != 1)
            scores = dot_heads(q, k, PRECISION, ACC)
            if PART != 1:
                seen = visible(rows[:, None], cols[None, :], first, T, S, CAUSAL, first_ptr is not None)
                scores = tl.where(seen, scores, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(scores, 1) * scale_log2)
            # -inf - -inf would be NaN in a row that has seen nothing yet
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(scores * scale_log2 - m_safe[:, None])
            alpha = tl.exp2(m_i - m_safe)
            l_i = l_i * alpha + tl.sum(p, 1)
            if seed_ptr is not None:
                p = tl.where(keep(seed, head, row, col, kept, BLOCK_M, BLOCK_N, False), p, nothing)
            acc = add_dot(scale_head(acc, alpha[:, None]), p, v, PRECISION, ACC)
            m_i = m_new

    empty = l_i == 0.0
    l_i = tl.where(empty, 1.0, l_i)
    norm = 1.0 / l_i
    if seed_ptr is not None:
        norm *= keep_scale(kept, ACC)
    store_head(out_ptr + b * stride_ob + h * stride_oh, rows, stride_ot, T, scale_head(acc, norm[:, None]), D)
    at = head.to(tl.int64) * T + rows
    high = tl.where(empty, float("inf"), m_i)
    if APART:
        tl.store(lse_ptr + at * 2, high, mask=rows < T)
        tl.store(lse_ptr + at * 2 + 1, tl.log2(l_i), mask=rows < T)
    else:
        tl.store(lse_ptr + at, high + tl.log2(l_i), mask=rows < T)


def _lse_like(q: Tensor) -> Tensor:
    B, H, T, _ = q.shape
    if q.dtype in (torch.float32, torch.float64):
        return torch.empty(B, H, T, 2, dtype=q.dtype, device=q.device)
    return torch.empty(B, H, T, dtype=torch.float32, device=q.device)


def _fwd_fake(q, k, v, first, seed, causal, scale, dropout_p):
    B, H, T, D = q.shape
    return torch.empty(B, T, H, D, dtype=q.dtype, device=q.device).transpose(1, 2), _lse_like(q)


@register(
    "_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? first, Tensor? seed, bool causal, float scale, float dropout_p)"
    " -> (Tensor, Tensor)",
    _fwd_fake,
)
def attention_fwd(q, k, v, first, seed, causal, scale, dropout_p):
    """q [B, H, T, D], k and v [B, H, S, D], first [B, T] -> out [B, H, T, D] in [B, T, H, D] memory, lse."""
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
    B, H, T, D = q.shape
    out, lse = _fwd_fake(q, k, v, first, seed, causal, scale, dropout_p)
    blocks = _fwd_blocks(arch(q.device), D, q.dtype, seed is not None, first is not None)
    head = head_constants(q)
    (k, v), boxes = walked(blocks["BLOCK_N"], head, k, v)
    launch(
        _attention_fwd_kernel,
        (B * H * cdiv(T, blocks["BLOCK_M"]),),
        *(q, k, v, *boxes, first, out, lse, seed),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
        *(H, T, k.shape[2], scale, kept_share(dropout_p)),
        CAUSAL=causal,
        APART=lse.dim() == 4,
        **head,
        **blocks,
    )
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, first, seed, *options):
        out, lse = attention_fwd(q, k, v, first, seed, *options)
        ctx.save_for_backward(q, k, v, first, out, lse, seed)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, *saved = ctx.saved_tensors
        gradients = attention_bwd(dout, q, k, *saved, *ctx.options)
        return *split_gradients(gradients, q, k), None, None, None, None, None


class _PackedAttention(torch.autograd.Function):
    """_Attention of one [B, T, 3, H, D]: so the gradient is one too, and nobody has to stack three."""

    @staticmethod
    def forward(ctx, qkv, first, seed, *options):
        out, lse = attention_fwd(*_unpacked(qkv), first, seed, *options)
        ctx.save_for_backward(qkv, first, out, lse, seed)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, *saved = ctx.saved_tensors
        return attention_bwd(dout, *_unpacked(qkv), *saved, *ctx.options).view(qkv.shape), None, None, None, None, None


def _unpacked(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.permute(2, 0, 3, 1, 4).unbind()


def _autocast(x: Tensor) -> Tensor:
    if x.dtype == torch.float64 or x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _in_q(q: Tensor, scale: float) -> bool:
    """Whether q takes the scale: in fp64, since Triton passes a float as fp32; or one so small that -inf times it were NaN."""
    return q.dtype == torch.float64 or abs(scale) < 1e-30


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float, first: Tensor | None) -> None:
    check_device("attention", q=q, k=k, v=v, first=first)
    check_float("attention", q=q, k=k, v=v)
    given = ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in (("q", q), ("k", k), ("v", v)))
    check(q.dtype == k.dtype == v.dtype, f"attention: q, k and v must share a dtype, got {given}")
    check(
        q.dim() == k.dim() == 4 and k.shape == v.shape == (*q.shape[:2], k.shape[2], q.shape[3]),
        f"attention: q must be [B, H, T, D], k and v [B, H, S, D], got {given}",
    )
    B, _, T, D = q.shape
    most = (
        MAX_HEAD_SIZE // 2 if q.dtype == torch.float64 else MAX_HEAD_SIZE
    )  # more takes more shared memory than there is
    check(1 <= D <= most, f"attention: head size must be 1 to {most} in {q.dtype}, got {D}")
    check(0.0 <= dropout_p <= 1.0, f"attention: dropout_p must be from 0 to 1, got {dropout_p}")
    check(math.isfinite(scale), f"attention: scale must be finite, got {scale}")
    if first is None:
        return
    check(
        first.dtype == torch.int32 and first.shape == (B, T),
        f"attention: first must be int32 of shape {(B, T)}, got {first.dtype} {tuple(first.shape)}",
    )
    check(causal, "attention: first goes with causal=True alone, got causal=False")
    if first.device.type == "cpu" and not torch.compiler.is_compiling():  # where looking doesn't make a device wait
        down = (first[:, 1:] < first[:, :-1]).nonzero()
        check(
            len(down) == 0, f"attention: first must not decrease along T, but does behind [row, t] {down[:1].tolist()}"
        )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q @ k.T) @ v. q [B, H, T, D], k and v [B, H, S, D] -> [B, H, T, D]; scale defaults to D ** -0.5.

    `causal` is aligned to the end: query t sees keys 0 .. S - T + t, so that the queries may be the last T of S positions. With
    `first`, int32 [B, T], query t of row b sees keys first[b, t] .. S - T + t: where its document begins in a packed row, the
    length of the padding on the row's left, or S - T + t - w + 1 for a window of w keys. It must not decrease along T, and what
    no query of a tile sees costs nothing; on a device that can't be checked, and queries then may miss keys. A query that sees
    no key gives zeros and no gradient.

    Dropout acts on the probabilities; dropout_p counts in steps of 1 / 65536. Under autocast, inputs narrower than fp64 are cast
    to its dtype, as torch's scaled_dot_product_attention does. An input whose last stride isn't 1 is copied.
    """
    q, k, v = _autocast(q), _autocast(k), _autocast(v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, v, causal, scale, dropout_p, first)
    if scale < 0.0:
        q, scale = -q, -scale  # the kernels take scale * max(scores) for max(scale * scores)
    if _in_q(q, scale):
        q, scale = q * scale, 1.0
    seeds = dropout_seed(q.device, seed) if dropout_p > 0.0 else None
    first = None if first is None else first.contiguous()
    return _Attention.apply(q, k, v, first, seeds, causal, scale, dropout_p)


def packed_attention(
    qkv: Tensor,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """`attention` of what one projection made: qkv [B, T, 3, H, D] -> [B, H, T, D]. Its gradient is one such tensor."""
    qkv = _autocast(qkv)
    check(
        qkv.dim() == 5 and qkv.shape[2] == 3,
        f"packed_attention: qkv must be [B, T, 3, H, D], got {qkv.dtype} {tuple(qkv.shape)}",
    )
    q, k, v = _unpacked(qkv)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale < 0.0 or _in_q(q, scale):
        return attention(q, k, v, causal, scale, dropout_p, seed, first)
    _check(q, k, v, causal, scale, dropout_p, first)
    seeds = dropout_seed(q.device, seed) if dropout_p > 0.0 else None
    first = None if first is None else first.contiguous()
    return _PackedAttention.apply(qkv, first, seeds, causal, scale, dropout_p)
