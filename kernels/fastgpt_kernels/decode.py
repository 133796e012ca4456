"""Decode attention: a few new queries against a long cache, split over the keys so that one row of the batch fills a GPU.

    split      lse_s = log2(sum_j exp2(s2_j))                 out_s = sum_j exp2(s2_j - lse_s) v_j       over its keys j
    combine    w_s = exp2(lse_s - max_s lse_s)                out = sum_s w_s out_s / sum_s w_s
               s2 = log2(e) * D ** -0.5 * q k^T

    q, out             [B, H, T, D]       bf16 | fp16 | fp32 | fp64     T is small; memory of out is [B, T, H, D]
    k_cache, v_cache   [B, H, S, D]       like q; S is the capacity     any strides with a unit last one (else copied)
    lengths            [B]                int32 on the device           positions that row b's cache holds
    first              [B]                int32 on the device, or None  the first of them that row b's queries see
    out_s, lse_s       [B, H, T, splits]  fp32 (fp64), out_s with D     splits = ceil(S / SPLIT_KEYS)

Query t of row b sees keys first[b] .. lengths[b] - T + t. One program owns SPLIT_KEYS keys of one head; a second launch owns
one query each and adds its splits up in their order. The grid depends on the capacity and the kernels read the length, so a
step can be captured in a CUDA graph once and replayed as the cache grows; programs behind the length or before `first` write
zeros. A split has a fixed size rather than a fixed share, so that a row's result, to the bit, depends on neither its batch
mates nor the capacity; it is shorter for the widest heads in fp32 and fp64, of which fewer keys fit a program. The first launch
is also that of decode_token, which combines the splits itself.

Bound by memory: 2 B H length D * itemsize bytes over the HBM rate, plus an eighth of an itemsize-2 cache's in partial results
at D = 64 that stay in L2. A single query takes sums of fp32 products instead of `tl.dot`, whose smallest tile is 16 queries.

Source: Dao et al., 2023, https://pytorch.org/blog/flash-decoding/
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._heads import add_dot, dot_heads, head_constants, load_head, scale_head, store_head, unit_last, zero_head
from ._launch import cdiv, check, check_device, check_float, launch, next_power_of_2, register

MAX_HEAD_SIZE = 256
LOG2_E = tl.constexpr(1.4426950408889634)

# Keys of one program. At D = 64 they are four 16-byte loads a thread for keys and values each, all in flight at once, and GPT-2's
# 12 heads at 1024 positions make 192 programs for the 132 SMs of an H100. `python -m benchmarks.sweep` re-derives it.
SPLIT_KEYS = 64

# Queries of one program where there are several: the least that `tl.dot` takes.
QUERY_TILE = 16

# Shared memory that a program has on the smallest GPU, an RTX's.
SHARED_MEMORY = 101_376

# Splits that the combining program loads at once.
COMBINE_SPLITS = 16


@triton.jit
def _score_keys(q, k, ACC: tl.constexpr):
    """[1, keys] products of one query with each key."""
    scores = tl.sum(k[0].to(ACC) * q[0].to(ACC), 1)
    if len(k) == 2:
        scores += tl.sum(k[1].to(ACC) * q[1].to(ACC), 1)
    return scores[None, :]


@triton.jit
def _add_weighted(acc, p, v, ACC: tl.constexpr):
    """acc [1, D] + the values v weighed by p [1, keys]."""
    first = acc[0] + tl.sum(tl.trans(p) * v[0].to(ACC), 0)[None, :]
    if len(v) == 1:
        return (first,)
    else:
        return first, acc[1] + tl.sum(tl.trans(p) * v[1].to(ACC), 0)[None, :]


@triton.jit
def _in_steps(stride, STEP: tl.constexpr):
    """stride, a multiple of STEP, which the compiler learns here: it specialises for multiples of 16 alone."""
    if STEP == 1:
        return stride
    else:
        return stride // STEP * STEP


@triton.jit(do_not_specialize=["T", "S"])
def _decode_split_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, first_ptr, part_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_lengths,
    stride_first, stride_lb, stride_lh, stride_lt, stride_ls,
    H, T, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, NEW: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    splits = tl.cdiv(S, BLOCK_N)
    tiles = tl.cdiv(T, BLOCK_T)
    split = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits % tiles
    head = tl.program_id(0) // splits // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = split * BLOCK_N + tl.arange(0, BLOCK_N)
    # parts lie like lse, with D elements for each of its one
    at = b * stride_lb + h * stride_lh + split * stride_ls
    lse_ptrs = lse_ptr + at + rows.to(tl.int64) * stride_lt
    part_ptr += at * D
    length = tl.load(lengths_ptr + b * stride_lengths) + NEW
    end = tl.minimum(length, S)
    seen = split * BLOCK_N < end
    if first_ptr is not None:
        first = tl.load(first_ptr + b * stride_first)
        seen = seen & ((split + 1) * BLOCK_N > first)
    if not seen:
        tl.store(lse_ptrs, tl.full([BLOCK_T], float("-inf"), ACC), mask=rows < T)
        store_head(part_ptr, rows, stride_lt * D, T, zero_head(BLOCK_T, BLOCK_D, BLOCK_E, ACC), D)
        return

    k_ptr += b * _in_steps(stride_kb, STEP) + h * _in_steps(stride_kh, STEP)
    v_ptr += b * _in_steps(stride_vb, STEP) + h * _in_steps(stride_vh, STEP)
    k = load_head(k_ptr, cols, _in_steps(stride_ks, STEP), end, D, BLOCK_D, BLOCK_E, True)
    v = load_head(v_ptr, cols, _in_steps(stride_vs, STEP), end, D, BLOCK_D, BLOCK_E, True)
    if BLOCK_T == 1:
        # Behind a barrier, or ptxas multiplies each piece of k as it comes and asks for the next one after that.
        tl.debug_barrier()
    q = load_head(q_ptr + b * stride_qb + h * stride_qh, rows, stride_qt, T, D, BLOCK_D, BLOCK_E, True)

    if BLOCK_T == 1:
        scores = _score_keys(q, k, ACC)
    else:
        scores = dot_heads(q, k, PRECISION, ACC)
    visible = (cols[None, :] < end) & (cols[None, :] <= length - T + rows[:, None])
    if first_ptr is not None:
        visible = visible & (cols[None, :] >= first)
    scores = tl.where(visible, scores * (LOG2_E * D**-0.5), float("-inf"))
    m = tl.max(scores, 1)
    m = tl.where(m == float("-inf"), 0.0, m)
    p = tl.exp2(scores - m[:, None])
    l = tl.sum(p, 1)
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    part = zero_head(BLOCK_T, BLOCK_D, BLOCK_E, ACC)
    if BLOCK_T == 1:
        part = _add_weighted(part, p, v, ACC)
    else:
        part = add_dot(part, p, v, PRECISION, ACC)
    tl.store(lse_ptrs, tl.where(empty, float("-inf"), m + tl.log2(l)), mask=rows < T)
    store_head(part_ptr, rows, stride_lt * D, T, scale_head(part, (1.0 / l)[:, None]), D)


@triton.jit(do_not_specialize=["T", "S"])
def _decode_combine_kernel(
    part_ptr, lse_ptr, lengths_ptr, first_ptr, out_ptr, stride_lengths, stride_first, stride_ob, stride_oh, stride_ot, H, T, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) // T
    rows = tl.program_id(0) % T + tl.arange(0, 1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    used = tl.cdiv(tl.minimum(tl.load(lengths_ptr + b * stride_lengths), S), BLOCK_N)
    begin = 0
    if first_ptr is not None:
        begin = tl.maximum(tl.load(first_ptr + b * stride_first), 0) // BLOCK_N
    row = tl.program_id(0).to(tl.int64) * tl.cdiv(S, BLOCK_N)

    m = tl.full([1], float("-inf"), ACC)
    for start in range(begin, used, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        lse = tl.load(lse_ptr + row + splits, mask=splits < used, other=float("-inf"))
        m = tl.maximum(m, tl.max(lse, 0))
    m = tl.where(m == float("-inf"), 0.0, m)
    total = tl.zeros([1], ACC)
    out = zero_head(1, BLOCK_D, BLOCK_E, ACC)
    for start in range(begin, used, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        lse = tl.load(lse_ptr + row + splits, mask=splits < used, other=float("-inf"))
        weights = tl.exp2(lse - m)
        total += tl.sum(weights, 0)
        parts = load_head(part_ptr, row + splits, D, row + used, D, BLOCK_D, BLOCK_E, True)
        out = _add_weighted(out, weights[None, :], parts, ACC)
    out = scale_head(out, (1.0 / tl.where(total == 0.0, 1.0, total))[:, None])
    store_head(out_ptr + b * stride_ob + h * stride_oh, rows, stride_ot, T, out, D)


def _split_keys(row_bytes: int, queries: int) -> int:
    """SPLIT_KEYS, or fewer of the widest heads in 32 and 64 bits, `row_bytes` of a tile each.

    One query has its keys in registers, 64 KB at most; several have keys and values in shared memory, for their products.
    """
    keys = SPLIT_KEYS
    while keys > 16 and (
        keys * row_bytes > 65536 or (queries > 1 and (2 * keys + QUERY_TILE) * row_bytes > SHARED_MEMORY)
    ):
        keys //= 2
    return keys


def _step(*tensors: Tensor) -> int:
    """What divides all strides and addresses, up to 16 bytes, in elements; 1 where the compiler knows as much of the strides."""
    strides = [stride for t in tensors for stride, size in zip(t.stride()[:3], t.shape[:3], strict=True) if size > 1]
    if all(stride % 16 == 0 for stride in strides):
        return 1
    itemsize = tensors[0].itemsize
    return math.gcd(16 // itemsize, *strides, *(t.data_ptr() // itemsize for t in tensors))


def _split_warps(tile_bytes: int) -> int:
    """So that the keys of a program, and so its values, are at most 32 registers a thread where 16 warps are enough."""
    return min(max(next_power_of_2(tile_bytes) // 4096, 4), 16)


def attend_splits(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, parts: Tensor, lse: Tensor, split_keys: int,
    first: Tensor | None = None, new: int = 0, pdl: bool = False,
) -> None:  # fmt: skip
    """The first of the two launches: parts and lse [B, H, T, splits] of q [B, H, T, D], all with unit last strides.

    lse has any strides, and parts, whose shape isn't looked at, D times those. A split of `split_keys` keys without a visible one
    gives zeros and -Inf. Row b's cache holds lengths[b] + `new` positions. pdl: see decode_token.
    """
    (B, H, T, D), S, block_t = q.shape, k_cache.shape[2], 1 if q.shape[2] == 1 else QUERY_TILE
    # Of split heads in 16 bits ptxas would rather spill an address there than fit fewer programs.
    spills = block_t == 1 and first is not None and 64 < D <= 96 and q.dtype.itemsize == 2
    launch(
        _decode_split_kernel, (B * H * cdiv(T, block_t) * cdiv(S, split_keys),),
        q, k_cache, v_cache, lengths, first, parts, lse,
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], lengths.stride(0),
        0 if first is None else first.stride(0), *lse.stride(), H, T, S,
        BLOCK_T=block_t, BLOCK_N=split_keys, NEW=new, STEP=_step(k_cache, v_cache), PDL=pdl, **head_constants(q),
        num_warps=_split_warps(split_keys * D * k_cache.itemsize), maxnreg=128 if spills else None,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _decode_fake(q, k_cache, v_cache, lengths, first):
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


@register(
    "_decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? first) -> Tensor", _decode_fake
)
def decode_attention_fwd(q, k_cache, v_cache, lengths, first):
    """q [B, H, T, D], caches [B, H, S, D], lengths and first [B] -> [B, H, T, D] in [B, T, H, D] memory and q's dtype."""
    B, H, T, D = q.shape
    S = k_cache.shape[2]
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    q, k_cache, v_cache = unit_last(q.to(k_cache.dtype)), unit_last(k_cache), unit_last(v_cache)
    head = head_constants(q)
    split_keys = _split_keys((head["BLOCK_D"] + head["BLOCK_E"]) * q.itemsize, T)
    splits = cdiv(S, split_keys)
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    parts = torch.empty(B, H, T, splits, D, dtype=statistics, device=q.device)
    lse = torch.empty(B, H, T, splits, dtype=statistics, device=q.device)
    attend_splits(q, k_cache, v_cache, lengths, parts, lse, split_keys, first)
    del head["PRECISION"]
    launch(
        _decode_combine_kernel,
        (B * H * T,),
        *(parts, lse, lengths, first, out, lengths.stride(0), 0 if first is None else first.stride(0)),
        *(*out.stride()[:3], H, T, S),
        BLOCK_N=split_keys,
        BLOCK_S=COMBINE_SPLITS,
        **head,
        num_warps=4,
    )
    return out


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, first: Tensor | None = None
) -> Tensor:
    """A few new queries against a cache. q [B, H, T, D], caches [B, H, S, D], lengths and first int32 [B] -> [B, H, T, D].

    Row b's cache holds lengths[b] positions, the last T of which are the queries' own; query t sees keys
    first[b] .. lengths[b] - T + t, from 0 where `first` is None: what pads a row on its left lies before it. What lies behind
    lengths[b] is never read into the result, NaN included; what lies before `first` counts for nothing, but a NaN there may
    show. A query that sees no key gives zeros. There is no gradient. Under autocast the result has its dtype; the caches are
    read as they are stored, since to cast them would cost more than the op. Inputs whose last stride isn't 1 are copied.
    """
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    check_device("decode_attention", **tensors, lengths=lengths, first=first)
    check_float("decode_attention", **tensors)
    autocast = q.device.type != "meta" and torch.is_autocast_enabled(q.device.type)
    if autocast and q.dtype != torch.float64:
        q = q.to(torch.get_autocast_dtype(q.device.type))
    given = ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in tensors.items())
    check(
        k_cache.dtype == v_cache.dtype and (autocast or q.dtype == k_cache.dtype),
        f"decode_attention: q, k_cache and v_cache must share a dtype, got {given}",
    )
    check(
        q.dim() == k_cache.dim() == 4
        and k_cache.shape == v_cache.shape == (*q.shape[:2], k_cache.shape[2], q.shape[3]),
        f"decode_attention: q must be [B, H, T, D], k_cache and v_cache [B, H, S, D], got {given}",
    )
    check(
        1 <= q.shape[3] <= MAX_HEAD_SIZE, f"decode_attention: head size must be 1 to {MAX_HEAD_SIZE}, got {q.shape[3]}"
    )
    for name, rows in (("lengths", lengths), ("first", first)):
        if rows is not None:
            check(
                rows.dtype == torch.int32 and rows.shape == q.shape[:1],
                f"decode_attention: {name} must be int32 of shape {tuple(q.shape[:1])}, "
                f"got {rows.dtype} {tuple(rows.shape)}",
            )
    check(
        not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())),
        "decode_attention has no gradient: call it under torch.no_grad(), or use attention",
    )
    return decode_attention_fwd(q, k_cache, v_cache, lengths, first)
