"""Where top-k and top-p cut each row of logits: lists sorted over the whole machine, then one search in them a row.

    l       = penalised(logits) / temperature
    kept    = l where l > t, or l == t from column `cut` on; with min-p, of those the ones with exp(l - top) >= min_p

    logits    [B, V]             fp16 | bf16 | fp32 | fp64, any strides, read in fp32
    scores    [B, lists, LIST]   fp32   l in the order of the row, -inf behind it
    ordered   [B, lists, LIST]   fp32   the same, descending in each list
    sums      [B, lists, LIST]   fp32   running sums of exp(l - the list's largest) in that order
    ends      [B, lists, 2]      fp32   the largest l of a list, +inf where one is NaN or +inf; the smallest finite one
    limits    [B, 3]             fp32   t, cut, top: what `draw` knows a row's kept tokens by

`sort` gives a list to a program, which sorts it in registers: 25 programs a row of GPT-2's vocabulary. `select` gives a row to a
program, which doesn't walk it: how many tokens of a list are over a threshold is a binary search of 12 loads, and what they weigh
is the running sum there. A step of its search tries eight thresholds in every list: the largest l that may be the answer, which
ends the search if it is; six that cut the interval into equal parts; and one that halves it as a set of floats, which bounds the
steps at 33 whatever the logits are. Sums have a fixed order, so that results repeat bit by bit.

Predicted for an H100 at batch 1, not measured: `sort` 3 to 4 us, bound by comparisons; `select` about 1 us a step, bound by
latency. From some 100 rows on, where a row to a multiprocessor fills the machine, sorting is more work than it saves.
Sources: searching thresholds, several a step, instead of sorting a row,
https://github.com/flashinfer-ai/flashinfer/blob/main/include/flashinfer/sampling.cuh; the sort in registers,
https://github.com/triton-lang/triton/blob/main/python/triton/language/standard.py.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch, next_power_of_2

_LIST = 2048  # columns of a list: longer ones take more rounds to sort, more of them more searches
_TOGETHER = 65536  # columns whose lists `select` searches together: all of GPT-2's vocabulary
_CHUNK = 1024  # columns of a step through the one list in which equals are told apart
_TRIED = tl.constexpr(8)  # thresholds a step of the search


@triton.jit
def scores(x, seen, temperature, penalty):
    """Logits x as the filters see them."""
    x = x.to(tl.float32)
    if penalty is not None:
        x = tl.where(seen != 0, tl.where(x < 0.0, x * penalty, tl.math.div_rn(x, penalty)), x)
    if temperature is not None:
        x = tl.math.div_rn(x, temperature)
    return x


@triton.jit
def _descending(x, LOG: tl.constexpr):
    """x [2**LOG] in descending order, by a bitonic sort. Without NaN: of it any mixture comes out."""
    N: tl.constexpr = 2**LOG
    i = tl.arange(0, N)
    for run in tl.static_range(1, LOG + 1):
        for step in tl.static_range(run):
            bits = tl.reshape(x.to(tl.int32, bitcast=True), (N // 2 ** (run - step), 2, 2 ** (run - step - 1)))
            # the other of each two elements a stride apart; int64 for the interpreter, in whose numpy no sum is cut to 32 bits
            other = tl.sum(bits, axis=1, keep_dims=True).to(tl.int64) - bits.to(tl.int64)
            other = tl.reshape(other.to(tl.int32), (N,)).to(tl.float32, bitcast=True)
            # runs of 2**run descend and ascend in turn; the last, which is all of x, descends
            x = tl.where((x > other) == ((((i >> run) ^ (i >> (run - step - 1))) & 1) != 0), other, x)
    return x


@triton.jit(do_not_specialize=["V", "lists"])
def _sample_sort_kernel(
    logits_ptr, seen_ptr, scores_ptr, ordered_ptr, sums_ptr, ends_ptr, stride_row, stride_column, stride_seen, V, lists,
    temperature, penalty, LOG_LIST: tl.constexpr,
):  # fmt: skip
    LIST: tl.constexpr = 2**LOG_LIST
    row, n = (tl.program_id(0) // lists).to(tl.int64), tl.program_id(0) % lists
    number, cols = row * lists + n, n * LIST + tl.arange(0, LIST)
    at = number * LIST + tl.arange(0, LIST)
    inside = cols < V
    x = tl.load(logits_ptr + row * stride_row + cols.to(tl.int64) * stride_column, mask=inside, other=float("-inf"))
    seen = 0 if seen_ptr is None else tl.load(seen_ptr + row * stride_seen + cols, mask=inside, other=0)
    l = scores(x, seen, temperature, penalty)
    tl.store(scores_ptr + at, l)
    top = tl.max(l)
    usable = tl.min((l < float("inf")).to(tl.int32)) != 0  # neither NaN nor +inf
    tl.store(ends_ptr + 2 * number, tl.where(usable, top, float("inf")))
    tl.store(ends_ptr + 2 * number + 1, tl.min(tl.where(l == float("-inf"), float("inf"), l)))
    if ordered_ptr is not None:
        l = _descending(l, LOG_LIST)
        tl.store(ordered_ptr + at, l)
        if sums_ptr is not None:
            weight = tl.exp(l - tl.where(top > float("-inf"), top, 0.0))
            tl.store(sums_ptr + at, tl.cumsum(weight, axis=0))


@triton.jit
def _middle(low, high):
    """Half way between two finite floats in the order of floats, rounded down: low itself if there's none between."""
    a, b = low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True)
    a, b = a ^ ((a >> 31) & 0x7FFFFFFF), b ^ ((b >> 31) & 0x7FFFFFFF)
    mid = (a >> 1) + (b >> 1) + (a & b & 1)
    return (mid ^ ((mid >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _find(
    ordered_ptr, sums_ptr, ends_ptr, first, lists, tried, top,
    LISTS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """[LISTS, T] of the lists from `first` on: how many l >= tried [1, T] each has, their weight, and the largest of the others.

    A token weighs exp(l - top), or 1 without `sums`.
    """
    n = first + tl.arange(0, LISTS)[:, None]
    there = n < lists
    ordered_ptr += n * LIST
    count = tl.zeros((LISTS, tried.shape[1]), tl.int32)
    half = LIST // 2
    while half > 0:
        l = tl.load(ordered_ptr + count + (half - 1), mask=there, other=float("-inf"))
        count += tl.where(l >= tried, half, 0)
        half //= 2
    l = tl.load(ordered_ptr + count, mask=there, other=float("-inf"))  # count is LIST - 1 at most
    count += (l >= tried).to(tl.int32)
    below = tl.load(ordered_ptr + count, mask=there & (count < LIST), other=float("-inf"))
    weight = count.to(tl.float32)
    if sums_ptr is not None:
        weight = tl.load(sums_ptr + n * LIST + count - 1, mask=there & (count > 0), other=0.0)
        weight *= tl.exp(tl.load(ends_ptr + 2 * n, mask=there, other=float("-inf")) - top)
    return count, weight, below


@triton.jit
def _search(
    ordered_ptr, sums_ptr, ends_ptr, lists, low, top, target,
    LISTS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """(t, high, weight from high on): the largest t, from `low` on, such that the tokens l >= t weigh at least `target`.

    By `sums`, t is a token's and those of [t, high) are all equal to it; without, t may lie between two and only t is set.
    """
    i = tl.arange(0, _TRIED)[None, :]
    part = (i - 1).to(tl.float32) * (1.0 / (_TRIED - 1))
    # t is in [low, most], of which `most` is the largest token under `high`
    most, high, over, searching = top, float("inf"), 0.0, True
    while searching:
        tried = tl.where(i == 1, _middle(low, most), tl.minimum(low * (1.0 - part) + most * part, most))
        tried = tl.where(i == 0, most, tried)
        total, below = tl.zeros((1, _TRIED), tl.float32), tl.full((1, _TRIED), float("-inf"), tl.float32)
        for first in range(0, lists, LISTS):
            _count, weight, rest = _find(ordered_ptr, sums_ptr, ends_ptr, first, lists, tried, top, LISTS, LIST)
            total += tl.sum(weight, axis=0, keep_dims=True)
            below = tl.maximum(below, tl.max(rest, axis=0, keep_dims=True))
        low = tl.maximum(low, tl.max(tl.where(total >= target, tried, float("-inf"))))
        short = tried > low  # also where rounding makes its total larger than that of low
        high = tl.minimum(high, tl.min(tl.where(short, tried, float("inf"))))
        most = tl.minimum(most, tl.min(tl.where(short, below, float("inf"))))
        over = tl.maximum(over, tl.max(tl.where(short, total, 0.0)))
        searching = most > low
        if sums_ptr is None:
            searching = searching & (tl.max((total == target).to(tl.int32)) == 0)
    return low, high, over


@triton.jit
def _weigh(ordered_ptr, sums_ptr, ends_ptr, lists, t, top, LISTS: tl.constexpr, LIST: tl.constexpr):
    """What the tokens l >= t of a row weigh."""
    mass, tried = 0.0, tl.zeros((1, 1), tl.float32) + t
    for first in range(0, lists, LISTS):
        _count, weight, _below = _find(ordered_ptr, sums_ptr, ends_ptr, first, lists, tried, top, LISTS, LIST)
        mass += tl.sum(weight)
    return mass


@triton.jit
def _place(ordered_ptr, ends_ptr, lists, t, high, room, LISTS: tl.constexpr, LIST: tl.constexpr):
    """(list, rank from its end) of the first of the last `room` tokens of [t, high); rank 0 where there are no more."""
    which, rank, left = 0, 0, room
    at = tl.arange(0, 2)[None, :]
    for group in range(tl.cdiv(lists, LISTS) - 1, -1, -1):
        first = group * LISTS
        tried = tl.where(at == 0, t, high)
        count, _weight, _below = _find(ordered_ptr, None, ends_ptr, first, lists, tried, t, LISTS, LIST)
        ties = tl.sum(tl.where(at == 0, count, -count), axis=1)
        behind = tl.cumsum(ties, axis=0, reverse=True)
        here = (behind >= left) & (behind - ties < left)
        which = tl.maximum(which, tl.max(tl.where(here, first + tl.arange(0, LISTS), 0)))
        rank = tl.maximum(rank, tl.max(tl.where(here, left - behind + ties, 0)))
        left -= tl.sum(ties)
    return which, tl.where(left < 0, rank, 0)


@triton.jit(do_not_specialize=["V", "lists", "top_k"])
def _sample_select_kernel(
    scores_ptr, ordered_ptr, sums_ptr, ends_ptr, limits_ptr, V, lists, top_k, top_p,
    LISTS: tl.constexpr, LIST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, LISTS)
    ends_ptr += row * lists * 2
    tops, lows = tl.full((LISTS,), float("-inf"), tl.float32), tl.full((LISTS,), float("inf"), tl.float32)
    for first in range(0, lists, LISTS):
        there = first + i < lists
        tops = tl.maximum(tops, tl.load(ends_ptr + (first + i) * 2, mask=there, other=float("-inf")))
        lows = tl.minimum(lows, tl.load(ends_ptr + (first + i) * 2 + 1, mask=there, other=float("inf")))
    top, t, cut = tl.max(tops), float("-inf"), 0.0
    if ordered_ptr is not None:
        usable = (top > float("-inf")) & (top < float("inf"))
        if usable:  # `draw` sees by itself where a row isn't
            ordered_ptr += row * lists * LIST
            t = tl.min(lows)
            if top_k is not None:
                k = top_k.to(tl.float32)
                t, high, over = _search(ordered_ptr, None, ends_ptr, lists, t, top, k, LISTS, LIST)
            if top_p is not None:
                sums_ptr += row * lists * LIST
                target = top_p * _weigh(ordered_ptr, sums_ptr, ends_ptr, lists, t, top, LISTS, LIST)
                t, high, over = _search(ordered_ptr, sums_ptr, ends_ptr, lists, t, top, target, LISTS, LIST)
                # A token stays while those before it hold less than p; of equals the last one of the vocabulary is the first.
                room = tl.minimum(tl.math.ceil(tl.math.div_rn(target - over, tl.exp(t - top))), V.to(tl.float32))
                room = tl.maximum(room.to(tl.int32), 1)
                n, rank = _place(ordered_ptr, ends_ptr, lists, t, high, room, LISTS, LIST)
                if rank > 0:
                    scores_ptr += row * lists * LIST
                    for part in range(LIST // CHUNK - 1, -1, -1):
                        cols = n * LIST + part * CHUNK + tl.arange(0, CHUNK)
                        tie = (tl.load(scores_ptr + cols) == t).to(tl.int32)
                        here = (tie == 1) & (tl.cumsum(tie, axis=0, reverse=True) == rank)
                        cut = tl.maximum(cut, tl.max(tl.where(here, cols, 0)).to(tl.float32))
                        rank -= tl.sum(tie)
    tl.store(limits_ptr + row * 3, t)
    tl.store(limits_ptr + row * 3 + 1, cut)
    tl.store(limits_ptr + row * 3 + 2, top)


def filter_limits(
    logits: Tensor,
    seen: Tensor | None,
    temperature: float | None,
    penalty: float | None,
    top_k: int | None,
    top_p: float | None,
) -> tuple[Tensor, Tensor]:
    """(l fp32 [B, V] in padded rows, limits fp32 [B, 3]; see above) of logits [B, V]; None for what doesn't apply."""
    B, V = logits.shape
    length = min(_LIST, max(next_power_of_2(V), 128))
    lists = cdiv(V, length)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    l, ends, limits = empty(B, lists * length), empty(B, lists, 2), empty(B, 3)
    ordered = None if top_k is top_p is None else torch.empty_like(l)  # min-p needs `top` alone
    sums = None if top_p is None else torch.empty_like(l)
    launch(
        _sample_sort_kernel, (B * lists,),
        logits, seen, l, ordered, sums, ends, *logits.stride(), 0 if seen is None else seen.stride(0),
        V, lists, temperature, penalty, LOG_LIST=length.bit_length() - 1, num_warps=length // 256 or 1,
    )  # fmt: skip
    launch(
        _sample_select_kernel, (B,),
        l, ordered, sums, ends, limits, V, lists, top_k, None if top_p is None else float(top_p),
        LISTS=min(max(_TOGETHER // length, 1), next_power_of_2(lists)), LIST=length, CHUNK=min(length, _CHUNK),
        num_warps=min(length // 256 or 1, 8), maxnreg=128,  # without a limit ptxas spills to fit more programs than there are
    )  # fmt: skip
    return l[:, :V], limits
