"""Flash attention: softmax(scale * q @ k.T) @ v without ever storing a [T, S] matrix, forward and backward.

    forward    s2 = scale * log2(e) * q k^T       p = exp2(s2 - max)      l = rowsum(p)      out = p v / l
               lse = max + log2(l)                in base 2, so that the softmax is p = exp2(s2 - lse)
    backward   delta = rowsum(dout * out)         dp = dout v^T           ds = p * (dp - delta)
               dq = scale * ds k                  dk = scale * ds^T q     dv = p^T dout
    dropout    p in `out` and `dv`, and dp, are multiplied by keep / (1 - dropout_p); `l` and `ds` take p as it is

    q, dq          [B, H, T, D]   bf16 | fp16 | fp32 | fp64     any strides with a unit last one (else copied)
    k, v, dk, dv   [B, H, S, D]   like q
    out            [B, H, T, D]   like q; memory is [B, T, H, D], which the projection after it reads without a copy
    lse            [B, H, T]      fp32 (fp64); +inf where a query sees no key, so that its p is 0
    statistics     [B, H, T', 4]  lse, -, delta, - for the backward, T rounded up; +inf and 0 in the rows that adds
    seed           [1]            int64 on the device, with dropout only

With `causal`, query t sees keys 0 .. S - T + t. Where T == S the gradients are slices of one [B, T, 3, H, D] buffer, the
memory order of a packed QKV projection's output.

One forward program owns BLOCK_M queries of one head and walks the keys: first the tiles that all its queries see whole,
without a mask, then the few on the diagonal or at the end. The backward is one launch in which some programs own keys (dk
and dv) and others queries (dq), as in PyTorch's flex attention: seven products for the five of an algorithm that adds dq up
atomically, and sums of a fixed order for it. A head's programs are neighbours, to share L2, and its longest start first.

Bound by tensor cores and, at D = 64, as much by exp2: either does 16 scores a clock and SM. FLOPs 4 B H T S D forward, 10
backward, half of that with `causal`; the floor is those over the tensor-core rate.

Source: Dao, 2023, https://arxiv.org/abs/2307.08691; https://github.com/pytorch/pytorch/tree/main/torch/_inductor/kernel/flex
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._heads import add_dot, dot_heads, head_constants, load_head, scale_head, store_head, unit_last, zero_head
from ._launch import arch, check, check_device, check_float, dropout_seed, launch, register
from ._math import dropout_keep

MAX_HEAD_SIZE = 256
LOG2_E = tl.constexpr(1.4426950408889634)

# The backward's statistics have rows of 16 bytes, and their number is padded to a multiple of this, no smaller than a tile: a
# tile's are one aligned vector without a mask. Triton 3.6 copies a vector shorter than the threads are many once per warp. The
# kernel that writes them, a streaming one, owns as many rows: 16 KB of out and of dout at D = 64.
PADDING = 128

# Both tables start from PyTorch's for flex attention (torch/_inductor/template_heuristics) and keep what compiles without
# spills and under the shared memory of every GPU in the row; `python -m fastgpt_kernels.aot` re-derives that, and
# `benchmarks/attention.py --sweep` measures. Tiles 128 wide are for chips of 227 KB (Hopper, B200), not of 99 KB. Dropout's
# random words take registers, so its tiles are half as large.


def _ieee() -> bool:
    return torch.get_float32_matmul_precision() == "highest"


def _fwd_blocks(arch: int, head_size: int, dtype: torch.dtype, dropout: bool) -> dict[str, int | None]:
    wide = arch // 10 in (9, 10)
    maxnreg = None
    if dtype == torch.float64:
        m, n, stages, warps = 16, 16, 1, 4
    elif dtype == torch.float32:  # small enough for "ieee", whose products are unrolled into FMAs
        m, n, stages, warps = (64, 32, 2, 8) if head_size <= 64 else (32, 16, 2 if head_size <= 128 else 1, 8)
        if arch in (86, 89) and 64 < head_size <= 128 and _ieee():
            maxnreg = 96  # left alone, ptxas spills at D = 96 to stay under 65 registers
    elif head_size <= 64:  # two programs an SM: one's exp2 runs under the other's products
        m, n, stages, warps = 64 if dropout else 128, 64, 3, 4
    elif head_size <= 128:
        m, n, stages, warps = 128, (128 if arch // 10 == 9 else 64) // (2 if dropout else 1), 2, 8
    else:
        m, n, stages, warps = 128 if wide else 64, 16 if dropout else 32, 2, 8
    return {"BLOCK_M": m, "BLOCK_N": n, "num_stages": stages, "num_warps": warps, "maxnreg": maxnreg}


def _bwd_blocks(arch: int, head_size: int, dtype: torch.dtype, dropout: bool) -> dict[str, int | None]:
    """BLOCK_OWN is what a program owns, keys or queries; BLOCK_INNER is what it takes at a time of the other."""
    maxnreg = None
    if dtype == torch.float64:
        m, n, stages, warps = 16, 16, 1, 4
    elif dtype == torch.float32:
        if head_size <= 64:
            m, n, stages, warps = 32, 32, 2, 8
            maxnreg = None if _ieee() else 128  # left alone, ptxas spills, or takes 174 with dropout: one program's
        else:
            m, n, stages, warps = 16, 32 if head_size <= 128 else 16, 2 if head_size <= 128 and _ieee() else 1, 8
    elif head_size > 128:
        m, n, stages, warps = 32, 32, 1, 8
    elif arch // 10 in (9, 10):
        m, n, stages, warps = 32 if dropout else 64, 128, 3 if head_size <= 64 else 2, 8
    else:
        m, n, stages, warps = 32 if 64 < head_size <= 96 else 64, 64, 2, 4 if head_size <= 64 else 8
        if dropout and arch >= 120:
            m //= 2
    return {"BLOCK_INNER": m, "BLOCK_OWN": n, "num_stages": stages, "num_warps": warps, "maxnreg": maxnreg}


@triton.jit
def _visible(rows, cols, T, S, CAUSAL: tl.constexpr):
    """Whether queries `rows` < T see keys `cols`; the two are shaped to broadcast."""
    if CAUSAL:
        visible = cols <= rows + (S - T)
    else:
        visible = cols < S
    return visible


@triton.jit
def _keep(seed_ptr, head, rows, cols, T, S, dropout_p):
    """Which probabilities survive dropout.

    The four words of a Philox counter go to elements (row or row + 8, col or col + 8): tensor cores leave those in one thread,
    in a tile of queries by keys and in its transpose alike, so that it makes one call for the four.
    """
    row = head.to(tl.int64) * tl.cdiv(T, 16) * 8 + ((rows >> 4) * 8 + (rows & 7))
    counter = row * (tl.cdiv(S, 16) * 8) + ((cols >> 4) * 8 + (cols & 7))
    word = (rows >> 2 & 2) + (cols >> 3 & 1)
    return dropout_keep(tl.load(seed_ptr), counter * 4 + word, dropout_p)


@triton.jit
def _key_range(row, rows_end, T, S, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """(full, end): queries row .. rows_end - 1 all see every key before `full`, a multiple of BLOCK, and none from `end` on."""
    seen_by_all, seen_by_any = S, S
    if CAUSAL:
        seen_by_all = tl.minimum(tl.maximum(row + 1 + S - T, 0), S)
        seen_by_any = tl.maximum(tl.minimum(rows_end, T) + S - T, 0)
    return seen_by_all // BLOCK * BLOCK, seen_by_any


@triton.jit(do_not_specialize=["T", "S"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_ot, H, T, S, scale, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // blocks
    row = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    rows = row + tl.arange(0, BLOCK_M)
    q = load_head(q_ptr + b * stride_qb + h * stride_qh, rows, stride_qt, T, D, BLOCK_D, BLOCK_E, True)

    scale_log2 = tl.cast(scale, ACC) * LOG2_E
    m_i = tl.full([BLOCK_M], float("-inf"), ACC)
    l_i = tl.zeros([BLOCK_M], ACC)
    acc = zero_head(BLOCK_M, BLOCK_D, BLOCK_E, ACC)
    full, last = _key_range(row, row + BLOCK_M, T, S, BLOCK_N, CAUSAL)
    begin, end = 0, full
    for MASKED in tl.static_range(2):
        for start in range(begin, end, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            k = load_head(k_ptr, cols, stride_ks, S, D, BLOCK_D, BLOCK_E, MASKED)
            v = load_head(v_ptr, cols, stride_vs, S, D, BLOCK_D, BLOCK_E, MASKED)
            scores = dot_heads(q, k, PRECISION, ACC)
            if MASKED:
                visible = _visible(rows[:, None], cols[None, :], T, S, CAUSAL)
                scores = tl.where(visible, scores * scale_log2, float("-inf"))
                m_new = tl.maximum(m_i, tl.max(scores, 1))
            else:
                m_new = tl.maximum(m_i, tl.max(scores, 1) * scale_log2)
            # -inf - -inf would be NaN in a row that has seen nothing yet
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            if MASKED:
                p = tl.exp2(scores - m_safe[:, None])
            else:
                p = tl.exp2(scores * scale_log2 - m_safe[:, None])
            alpha = tl.exp2(m_i - m_safe)
            l_i = l_i * alpha + tl.sum(p, 1)
            if DROPOUT:
                p = tl.where(_keep(seed_ptr, head, rows[:, None], cols[None, :], T, S, dropout_p), p, 0.0)
            acc = add_dot(scale_head(acc, alpha[:, None]), p, v, PRECISION, ACC)
            m_i = m_new
        begin, end = full, last

    empty = l_i == 0.0
    l_i = tl.where(empty, 1.0, l_i)
    norm = 1.0 / l_i
    if DROPOUT:
        norm /= tl.where(dropout_p < 1.0, 1.0 - dropout_p, 1.0)
    store_head(out_ptr + b * stride_ob + h * stride_oh, rows, stride_ot, T, scale_head(acc, norm[:, None]), D)
    lse = tl.where(empty, float("inf"), m_i + tl.log2(l_i))
    tl.store(lse_ptr + head.to(tl.int64) * T + rows, lse, mask=rows < T)


@triton.jit(do_not_specialize=["T"])
def _attention_statistics_kernel(
    out_ptr, dout_ptr, lse_ptr, statistics_ptr,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, H, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PADDING: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, PADDING)
    head = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * PADDING + tl.arange(0, PADDING)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    out = load_head(out_ptr + b * stride_ob + h * stride_oh, rows, stride_ot, T, D, BLOCK_D, BLOCK_E, True)
    dout = load_head(dout_ptr + b * stride_gb + h * stride_gh, rows, stride_gt, T, D, BLOCK_D, BLOCK_E, True)
    delta = tl.sum(out[0].to(ACC) * dout[0].to(ACC), 1)
    if BLOCK_E > 0:
        delta += tl.sum(out[1].to(ACC) * dout[1].to(ACC), 1)
    lse = tl.load(lse_ptr + head.to(tl.int64) * T + rows, mask=rows < T, other=float("inf"))
    to = statistics_ptr + head.to(tl.int64) * blocks * (4 * PADDING) + rows * 4
    tl.store(to, lse)
    tl.store(to + 2, delta)


@triton.jit(do_not_specialize=["T", "S"])
def _attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, statistics_ptr, seed_ptr, dq_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqt, stride_dkb, stride_dks, H, T, S, scale, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_OWN: tl.constexpr,
    PADDING: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    key_blocks = tl.cdiv(S, BLOCK_OWN)
    blocks = key_blocks + tl.cdiv(T, BLOCK_OWN)
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    dout_ptr += b * stride_gb + h * stride_gh
    statistics_ptr += head.to(tl.int64) * tl.cdiv(T, PADDING) * (4 * PADDING)
    scale_log2 = tl.cast(scale, ACC) * LOG2_E
    kept = 1.0
    if DROPOUT:
        kept /= tl.where(dropout_p < 1.0, 1.0 - dropout_p, 1.0)

    if block < key_blocks:
        col = block * BLOCK_OWN
        cols = col + tl.arange(0, BLOCK_OWN)
        k = load_head(k_ptr, cols, stride_ks, S, D, BLOCK_D, BLOCK_E, True)
        v = load_head(v_ptr, cols, stride_vs, S, D, BLOCK_D, BLOCK_E, True)
        dk = zero_head(BLOCK_OWN, BLOCK_D, BLOCK_E, ACC)
        dv = zero_head(BLOCK_OWN, BLOCK_D, BLOCK_E, ACC)
        tiles = tl.cdiv(T, BLOCK_INNER)
        begin, end = 0, 0
        if CAUSAL:  # from the first query that sees any of the keys to the first tile that sees them all
            begin = tl.maximum(col + T - S, 0) // BLOCK_INNER
            end = tl.minimum(tl.cdiv(tl.maximum(col + BLOCK_OWN - 1 + T - S, 0), BLOCK_INNER), tiles)
        for UNMASKED in tl.static_range(2):
            for tile in range(begin, end):
                rows = tile * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
                # Past the last query that one is read again: with lse = +inf its p is 0 or, where it is NaN already, NaN.
                near = tl.minimum(rows, T - 1)
                q = load_head(q_ptr, near, stride_qt, T, D, BLOCK_D, BLOCK_E, False)
                dout = load_head(dout_ptr, near, stride_gt, T, D, BLOCK_D, BLOCK_E, False)
                # Both products before the exp2, which so runs under the second; statistics after them, to hold fewer registers.
                scores_t = dot_heads(k, q, PRECISION, ACC)
                dp_t = dot_heads(v, dout, PRECISION, ACC)
                statistics = tl.load(statistics_ptr + tile * (4 * BLOCK_INNER) + tl.arange(0, 4 * BLOCK_INNER))
                lse_delta, _ = tl.split(tl.reshape(statistics, [BLOCK_INNER, 2, 2]))
                lse, delta = tl.split(lse_delta)
                p_t = tl.exp2(scores_t * scale_log2 - lse[None, :])
                if not UNMASKED:
                    p_t = tl.where(_visible(rows[None, :], cols[:, None], T, S, CAUSAL), p_t, 0.0)
                kept_t = p_t
                if DROPOUT:
                    keep_t = _keep(seed_ptr, head, rows[None, :], cols[:, None], T, S, dropout_p)
                    kept_t = tl.where(keep_t, p_t * kept, 0.0)
                    dp_t = tl.where(keep_t, dp_t * kept, 0.0)
                dv = add_dot(dv, kept_t, dout, PRECISION, ACC)
                ds_t = p_t * (dp_t - delta[None, :])
                if not UNMASKED:
                    ds_t = tl.where(p_t == 0.0, 0.0, ds_t)  # 0 * NaN would take a NaN of v to keys that nobody sees
                dk = add_dot(dk, ds_t, q, PRECISION, ACC)
            begin, end = end, tiles
        offset = b * stride_dkb + h * D
        store_head(dk_ptr + offset, cols, stride_dks, S, scale_head(dk, scale), D)
        store_head(dv_ptr + offset, cols, stride_dks, S, dv, D)
    else:
        row = (blocks - 1 - block) * BLOCK_OWN
        rows = row + tl.arange(0, BLOCK_OWN)
        q = load_head(q_ptr, rows, stride_qt, T, D, BLOCK_D, BLOCK_E, True)
        dout = load_head(dout_ptr, rows, stride_gt, T, D, BLOCK_D, BLOCK_E, True)
        lse = tl.load(statistics_ptr + rows * 4)
        delta = tl.load(statistics_ptr + rows * 4 + 2)
        dq = zero_head(BLOCK_OWN, BLOCK_D, BLOCK_E, ACC)
        full, last = _key_range(row, row + BLOCK_OWN, T, S, BLOCK_INNER, CAUSAL)
        begin, end = 0, full
        for MASKED in tl.static_range(2):
            for start in range(begin, end, BLOCK_INNER):
                cols = start + tl.arange(0, BLOCK_INNER)
                k = load_head(k_ptr, cols, stride_ks, S, D, BLOCK_D, BLOCK_E, MASKED)
                v = load_head(v_ptr, cols, stride_vs, S, D, BLOCK_D, BLOCK_E, MASKED)
                scores = dot_heads(q, k, PRECISION, ACC)
                dp = dot_heads(dout, v, PRECISION, ACC)
                p = tl.exp2(scores * scale_log2 - lse[:, None])
                if DROPOUT:
                    keep = _keep(seed_ptr, head, rows[:, None], cols[None, :], T, S, dropout_p)
                    dp = tl.where(keep, dp * kept, 0.0)
                ds = p * (dp - delta[:, None])
                if MASKED:
                    ds = tl.where(_visible(rows[:, None], cols[None, :], T, S, CAUSAL), ds, 0.0)
                dq = add_dot(dq, ds, k, PRECISION, ACC)
            begin, end = full, last
        store_head(dq_ptr + b * stride_dqb + h * D, rows, stride_dqt, T, scale_head(dq, scale), D)


def _statistics(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _split_gradients(gradients: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def _fwd_fake(q, k, v, seed, causal, scale, dropout_p):
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2), q.new_empty(B, H, T, dtype=_statistics(q))


@register(
    "_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? seed, bool causal, float scale, float dropout_p) -> (Tensor, Tensor)",
    _fwd_fake,
)
def attention_fwd(q, k, v, seed, causal, scale, dropout_p):
    """q [B, H, T, D], k and v [B, H, S, D] -> out [B, H, T, D] in [B, T, H, D] memory, lse [B, H, T]."""
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
    B, H, T, D = q.shape
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(B, H, T, dtype=_statistics(q), device=q.device)
    blocks = _fwd_blocks(arch(q.device), D, q.dtype, seed is not None)
    launch(
        _attention_fwd_kernel,
        (B * H * triton.cdiv(T, blocks["BLOCK_M"]),),
        *(q, k, v, out, lse, seed),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
        *(H, T, k.shape[2], scale, dropout_p),
        CAUSAL=causal,
        DROPOUT=seed is not None,
        **head_constants(q),
        **blocks,
    )
    return out, lse


def _bwd_fake(dout, q, k, v, out, lse, seed, causal, scale, dropout_p):
    return q.new_empty(q.numel() + 2 * k.numel())


@register(
    "_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? seed,"
    " bool causal, float scale, float dropout_p) -> Tensor",
    _bwd_fake,
)
def attention_bwd(dout, q, k, v, out, lse, seed, causal, scale, dropout_p):
    """dout [B, H, T, D] and what `attention_fwd` took and gave -> the buffer that `_split_gradients` takes apart."""
    dout, q, k, v = unit_last(dout), unit_last(q), unit_last(k), unit_last(v)
    B, H, T, D = q.shape
    S = k.shape[2]
    gradients = torch.empty(q.numel() + 2 * k.numel(), dtype=q.dtype, device=q.device)
    dq, dk, dv = _split_gradients(gradients, q, k)
    statistics = torch.empty(B, H, triton.cdiv(T, PADDING) * PADDING, 4, dtype=lse.dtype, device=q.device)
    head = head_constants(q)
    launch(
        _attention_statistics_kernel,
        (B * H * triton.cdiv(T, PADDING),),
        *(out, dout, lse, statistics, *out.stride()[:3], *dout.stride()[:3], H, T),
        **{name: head[name] for name in ("D", "BLOCK_D", "BLOCK_E", "ACC")},
        PADDING=PADDING,
    )
    blocks = _bwd_blocks(arch(q.device), D, q.dtype, seed is not None)
    launch(
        _attention_bwd_kernel,
        (B * H * (triton.cdiv(S, blocks["BLOCK_OWN"]) + triton.cdiv(T, blocks["BLOCK_OWN"])),),
        *(q, k, v, dout, statistics, seed, dq, dk, dv),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3]),
        *(dq.stride(0), dq.stride(2), dk.stride(0), dk.stride(2)),
        *(H, T, S, scale, dropout_p),
        PADDING=PADDING,
        CAUSAL=causal,
        DROPOUT=seed is not None,
        **head,
        **blocks,
    )
    return gradients


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, seed, *options):
        out, lse = attention_fwd(q, k, v, seed, *options)
        ctx.save_for_backward(q, k, v, out, lse, seed)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, *saved = ctx.saved_tensors
        gradients = attention_bwd(dout, q, k, *saved, *ctx.options)
        return *_split_gradients(gradients, q, k), None, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """softmax(scale * q @ k.T) @ v. q [B, H, T, D], k and v [B, H, S, D] -> [B, H, T, D]; scale defaults to D ** -0.5.

    `causal` is aligned to the end: query t sees keys 0 .. S - T + t, so that the queries may be the last T of S positions. A
    query that sees no key gives zeros. Dropout acts on the probabilities. Under autocast, inputs narrower than fp64 are cast
    to its dtype, as torch's scaled_dot_product_attention does. An input whose last stride isn't 1 is copied.
    """
    check_device("attention", q=q, k=k, v=v)
    check_float("attention", q=q, k=k, v=v)
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    given = ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in (("q", q), ("k", k), ("v", v)))
    check(q.dtype == k.dtype == v.dtype, f"attention: q, k and v must share a dtype, got {given}")
    check(
        q.dim() == k.dim() == 4 and k.shape == v.shape == (*q.shape[:2], k.shape[2], q.shape[3]),
        f"attention: q must be [B, H, T, D], k and v [B, H, S, D], got {given}",
    )
    D = q.shape[-1]
    check(1 <= D <= MAX_HEAD_SIZE, f"attention: head size must be 1 to {MAX_HEAD_SIZE}, got {D}")
    check(0.0 <= dropout_p <= 1.0, f"attention: dropout_p must be from 0 to 1, got {dropout_p}")
    scale = D**-0.5 if scale is None else scale
    check(math.isfinite(scale), f"attention: scale must be finite, got {scale}")
    if scale < 0.0:
        q, scale = -q, -scale  # the kernels take scale * max(scores) for max(scale * scores)
    if q.dtype == torch.float64:
        q, scale = q * scale, 1.0  # Triton passes a float as fp32
    seeds = dropout_seed(q.device, seed) if dropout_p > 0.0 else None
    return _Attention.apply(q, k, v, seeds, causal, scale, dropout_p)
