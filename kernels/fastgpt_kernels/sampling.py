"""The next token of every row, drawn on the device: penalty, temperature, top-k, top-p, min-p, one draw.

    l      = penalised(logits) / temperature
    kept   = l where top-k, top-p and min-p keep the token, -inf elsewhere
    token  = argmax(kept - log(E)),  E exponential: each token with probability softmax(kept)     (Gumbel-max)

    logits             [B, V]         fp16 | bf16 | fp32 | fp64, any strides, read in fp32
    seen               [B, V]         bool | uint8: what the repetition penalty applies to
    seed, positions    [1] int64, [B] int32
    kept               [B, padded V]  fp32        best, index   [B, splits]  fp32, int32        tokens   [B] int64

E is a pure function of (seed, row, position, token), so a row's token doesn't depend on its batch mates or on how often the host
looks, and a captured CUDA graph draws anew as the positions move on.
`filter` (left out without filters) gives a row to one program, which walks it in chunks that stay in L2: once to compute l, then
to search the thresholds of top-k and top-p, four tried a walk. Three cut the interval into equal parts: four to six walks find
the 50th of 50,257 logits, and some ten where p = 0.9 cuts a flat distribution. The fourth halves it as a set of floats, which
bounds the walks at 33 whatever the logits are. Sums have a fixed order and grow with the set, so that a search is consistent
and repeats bit by bit. `draw` splits rows over the machine, `pick` takes the best of a row's parts.

Bound by memory in `draw` (B V itemsize bytes), by one multiprocessor's share of L2 in `filter`: 200 KB a walk at V = 50,257.
Source of searching thresholds, several a walk, instead of sorting:
https://github.com/flashinfer-ai/flashinfer/blob/main/include/flashinfer/sampling.cuh
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, check, check_device, check_float, launch, next_power_of_2
from ._math import random_word

# Columns of a step of `filter`: 8 a thread of 16 warps, whose sums over four thresholds then fit in 128 registers a thread.
_CHUNK = 4096
_SPLIT = 2048  # columns of a program of `draw`: 25 programs for GPT-2's vocabulary
STOPS = 32  # stop tokens that `pick` compares at a time
_THRESHOLDS = tl.constexpr(4)  # that a walk tries


@triton.jit
def _scores(x, seen, temperature, penalty):
    """Logits x as the filters see them."""
    x = x.to(tl.float32)
    if penalty is not None:
        x = tl.where(seen != 0, tl.where(x < 0.0, x * penalty, tl.math.div_rn(x, penalty)), x)
    if temperature is not None:
        x = tl.math.div_rn(x, temperature)
    return x


@triton.jit
def _middle(low, high):
    """Half way between two finite floats in the order of floats, rounded down: low itself if there's none between."""
    a, b = low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True)
    a, b = a ^ ((a >> 31) & 0x7FFFFFFF), b ^ ((b >> 31) & 0x7FFFFFFF)
    mid = (a >> 1) + (b >> 1) + (a & b & 1)
    return (mid ^ ((mid >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _threshold(row_ptr, V, low, top, target, CHUNK: tl.constexpr, MASS: tl.constexpr):
    """(t, weight over t, tokens at t): the largest t, from `low` on, such that the tokens l >= t weigh at least `target`.

    A token weighs exp(l - top) with MASS, else 1: then t may lie between two logits, and only t is set.
    """
    cols = tl.arange(0, CHUNK)[None, :]
    part = (tl.arange(0, _THRESHOLDS)[:, None] + 1).to(tl.float32) * (1.0 / _THRESHOLDS)
    # t is in [low, high)
    high = top + tl.maximum(tl.abs(top) * 1e-6, 1e-30)
    over, ties, searching = 0.0, 0, True
    while searching:
        tried = tl.where(part < 1.0, low * (1.0 - part) + high * part, _middle(low, high))
        weight = tl.zeros((_THRESHOLDS, CHUNK), tl.float32)
        least, most = tl.full((1, CHUNK), float("inf"), tl.float32), tl.full((1, CHUNK), float("-inf"), tl.float32)
        count = tl.zeros((1, CHUNK), tl.int32)
        for start in range(0, V, CHUNK):
            l = tl.load(row_ptr + start + cols)
            weight += tl.where(l >= tried, tl.exp(l - top) if MASS else 1.0, 0.0)
            within = (l >= low) & (l < high)
            least = tl.minimum(least, tl.where(within, l, float("inf")))
            most = tl.maximum(most, tl.where(within, l, float("-inf")))
            count += within.to(tl.int32)
        total = tl.sum(weight, axis=1, keep_dims=True)
        enough, exact = total >= target, total == target
        smallest = tl.min(least)
        if smallest >= tl.max(most):  # one value is left
            low, ties, searching = smallest, tl.sum(count), False
        else:
            low = tl.maximum(low, tl.max(tl.where(enough, tried, float("-inf"))))
            high = tl.minimum(high, tl.min(tl.where(enough, float("inf"), tried)))
            over = tl.maximum(over, tl.max(tl.where(enough, 0.0, total)))
            if not MASS:
                searching = tl.max(exact.to(tl.int32)) == 0
                low = tl.maximum(low, tl.max(tl.where(exact, tried, float("-inf"))))
    return low, over, ties


@triton.jit
def _cut(row_ptr, V, t, n, CHUNK: tl.constexpr):
    """The column from which on n tokens have l == t, of more that have."""
    cut = 0
    for chunk in range(tl.cdiv(V, CHUNK) - 1, -1, -1):
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        tie = (tl.load(row_ptr + cols) == t).to(tl.int32)
        rank = tl.cumsum(tie, axis=0, reverse=True)
        cut = tl.maximum(cut, tl.max(tl.where((tie == 1) & (rank == n), cols, 0)))
        n -= tl.sum(tie)
    return cut


@triton.jit(do_not_specialize=["V", "top_k"])
def _sample_filter_kernel(
    logits_ptr, seen_ptr, kept_ptr, stride_row, stride_column, stride_seen, stride_kept,
    V, temperature, penalty, top_k, top_p, min_p, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    kept_ptr += row * stride_kept
    cols = tl.arange(0, CHUNK)
    top, low = tl.full((CHUNK,), float("-inf"), tl.float32), tl.full((CHUNK,), float("inf"), tl.float32)
    bad = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, V, CHUNK):
        inside = start + cols < V
        x = tl.load(logits_ptr + (start + cols).to(tl.int64) * stride_column, mask=inside, other=float("-inf"))
        seen = 0 if seen_ptr is None else tl.load(seen_ptr + row * stride_seen + start + cols, mask=inside, other=0)
        l = _scores(x, seen, temperature, penalty)
        tl.store(kept_ptr + start + cols, l)
        bad |= (l < float("inf")).to(tl.int32) ^ 1  # NaN or +inf
        top = tl.maximum(top, l)
        low = tl.minimum(low, tl.where(l == float("-inf"), float("inf"), l))
    top, t, cut = tl.max(top), tl.min(low), 0
    tl.debug_barrier()  # other threads read what was written
    if (tl.max(bad) == 0) & (top > float("-inf")):  # an unusable row stays as it is, for `draw` to see
        if top_k is not None:
            t, _, _ = _threshold(kept_ptr, V, t, top, top_k.to(tl.float32), CHUNK, False)
        if top_p is not None:
            mass = tl.zeros((CHUNK,), tl.float32)
            for start in range(0, V, CHUNK):
                l = tl.load(kept_ptr + start + cols)
                mass += tl.where(l >= t, tl.exp(l - top), 0.0)
            target = tl.sum(mass) * top_p
            t, over, ties = _threshold(kept_ptr, V, t, top, target, CHUNK, True)
            # A token stays while those before it hold less than p; of equals the last one of the vocabulary is the first.
            room = tl.minimum(tl.math.ceil(tl.math.div_rn(target - over, tl.exp(t - top))), ties.to(tl.float32))
            room = tl.maximum(room.to(tl.int32), 1)
            if room < ties:
                cut = _cut(kept_ptr, V, t, room, CHUNK)
        for start in range(0, V, CHUNK):
            l = tl.load(kept_ptr + start + cols)
            keep = (l > t) | ((l == t) & (start + cols >= cut))
            if min_p is not None:
                keep &= tl.exp(l - top) >= min_p
            tl.store(kept_ptr + start + cols, tl.where(keep, l, float("-inf")))


@triton.jit
def _race(
    logits_ptr, seen_ptr, at, begin, mask, V, seed, position, row, stride_column, temperature, penalty,
    GREEDY: tl.constexpr,
):  # fmt: skip
    """(score, column) of the best of the columns at - begin; a score of NaN if one of them is not usable."""
    cols = at - begin
    x = tl.load(logits_ptr + at.to(tl.int64) * stride_column, mask=mask, other=float("-inf")).to(tl.float32)
    seen = 0 if seen_ptr is None else tl.load(seen_ptr + cols, mask=mask, other=0)
    l = _scores(x, seen, temperature, penalty)
    if GREEDY:
        usable, score = x < float("inf"), l
    else:
        usable = l < float("inf")
        # Uniform on (0, 1) and finest near 0, where -log(1 - u) makes the rare large scores: 2^-33 is the least.
        u = (random_word(seed, cols.to(tl.int64), position, row).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
        u = tl.minimum(u, 0.99999994)
        near = u * (u * (u * (u * 0.25 + 1.0 / 3.0) + 0.5) + 1.0)
        score = l - tl.log(tl.where(u < 0.015625, near, -tl.log(1.0 - u)))
    score = tl.where(usable, score, float("-inf"))  # what isn't read is -inf as well
    best = tl.max(score)
    index = tl.min(tl.where(score == best, cols, V))
    return tl.where(tl.min(usable.to(tl.int32)) == 0, float("nan"), best), index


# VECTOR elements are 16 bytes, and a row begins `begin` of them behind a 16-byte boundary. Whole vectors are read wide; what
# stands before and behind them belongs to a row's first program, a warp of it.
@triton.jit(do_not_specialize=["V", "splits"])
def _sample_draw_kernel(
    logits_ptr, seen_ptr, seed_ptr, positions_ptr, rows_ptr, best_ptr, index_ptr,
    stride_row, stride_column, stride_seen, V, splits, temperature, penalty,
    SPLIT: tl.constexpr, VECTOR: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    begin = (row * stride_row % VECTOR).to(tl.int32)
    floor = (begin + V) // VECTOR * VECTOR
    logits_ptr += row * stride_row // VECTOR * VECTOR
    seen_row = None if seen_ptr is None else seen_ptr + row * stride_seen
    seed, position = tl.load(seed_ptr), tl.load(positions_ptr + row)
    named = row if rows_ptr is None else tl.load(rows_ptr + row).to(tl.int64)
    at = split * SPLIT + tl.arange(0, SPLIT)
    best, index = _race(
        logits_ptr, seen_row, at, begin, (at >= VECTOR) & (at < floor), V, seed, position, named,
        stride_column, temperature, penalty, GREEDY,
    )  # fmt: skip
    at = tl.arange(0, 32)
    at = tl.where(at < VECTOR, at, floor - VECTOR + at)
    edge_best, edge_index = _race(
        logits_ptr, seen_row, at, begin, (at >= begin) & (at < begin + V) & (split == 0), V, seed, position, named,
        stride_column, temperature, penalty, GREEDY,
    )  # fmt: skip
    first = (edge_best > best) | ((edge_best == best) & (edge_index < index)) | (edge_best != edge_best)
    tl.store(best_ptr + tl.program_id(0), tl.where(first & (best == best), edge_best, best))
    tl.store(index_ptr + tl.program_id(0), tl.where(first, edge_index, index))


@triton.jit(do_not_specialize=["splits", "stops"])
def _sample_pick_kernel(
    best_ptr, index_ptr, tokens_ptr, splits, positions_ptr, seen_ptr, stops_ptr, ended_ptr, drawn_ptr, stride_seen,
    stops, BLOCK: tl.constexpr, STOPS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    best = tl.load(best_ptr + row * splits + i, mask=i < splits, other=float("-inf"))
    index = tl.load(index_ptr + row * splits + i, mask=i < splits, other=0)
    top = tl.max(tl.where(best == best, best, float("-inf")))
    token = tl.min(tl.where(best == top, index, 2147483647))
    usable = (tl.max((best != best).to(tl.int32)) == 0) & (top > float("-inf"))
    token = tl.where(usable, token, -1).to(tl.int64)
    tl.store(tokens_ptr + row, token)
    if drawn_ptr is not None:
        position, ended = tl.load(positions_ptr + row), tl.load(ended_ptr + row)
        stopped = (token < 0).to(tl.int32)
        for start in range(0, stops, STOPS):
            stopped |= tl.max((tl.load(stops_ptr + start + tl.arange(0, STOPS)) == token).to(tl.int32))
        tl.store(drawn_ptr + position % KEPT * tl.num_programs(0) + row, tl.where(ended != 0, -2, token))
        tl.store(ended_ptr + row, ended | stopped.to(tl.uint8))
        tl.store(positions_ptr + row, position + 1)
        if seen_ptr is not None:
            tl.store(seen_ptr + row * stride_seen + token, 1, mask=token >= 0)


def _expect(name: str, t: Tensor, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    wanted, got = f"{dtype} {list(size)} with unit last stride", f"{t.dtype} {list(t.shape)} with strides {t.stride()}"
    fits = t.dtype == dtype and t.shape == size and (t.stride(-1) == 1 or t.numel() <= 1)
    check(fits, f"sample_tokens: {name} must be {wanted}, got {got}")


def filter_logits(logits: Tensor, seen: Tensor | None, temperature, penalty, top_k, top_p, min_p) -> Tensor:
    """fp32 [B, V] in padded rows: penalised logits over the temperature, -Inf where dropped; None for what doesn't apply."""
    B, V = logits.shape
    chunk = min(_CHUNK, max(next_power_of_2(V), 128))
    kept = torch.empty(B, cdiv(V, chunk) * chunk, device=logits.device)
    launch(
        _sample_filter_kernel, (B,),
        logits, seen, kept, *logits.stride(), 0 if seen is None else seen.stride(0), kept.stride(0),
        V, temperature, penalty, top_k, *(None if p is None else float(p) for p in (top_p, min_p)),
        CHUNK=chunk, num_warps=max(chunk // 256, 1),
    )  # fmt: skip
    return kept[:, :V]


class Draws(NamedTuple):
    """What the rows of a generation draw with and what they have drawn, all on the device; `draw_tokens` moves it on.

    seed [1] int64. rows [B] int32: each row's number in its generation, which its draws belong to wherever it stands in a batch.
    positions [B] int32: how many tokens each has drawn. stops int64 [n], n a multiple of STOPS: the ids that end a row, filled up
    with -1. ended [B] uint8. tokens [B] int64: the newest. drawn [K, B] int64: token p of a row at p % K; -2 behind its end.
    seen [B, V] uint8: the tokens that the repetition penalty applies to, or None.
    """

    seed: Tensor
    rows: Tensor
    positions: Tensor
    stops: Tensor
    ended: Tensor
    tokens: Tensor
    drawn: Tensor
    seen: Tensor | None


def draw_tokens(
    logits: Tensor,
    draws: Draws,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """`sample_tokens` in place: logits [B, V] -> draws.tokens, int64 [B]; positions, drawn, ended and seen follow."""
    B, kept, stops = logits.shape[0], draws.drawn.shape[0], draws.stops.shape[0]
    for name, dtype, size in (
        ("rows", torch.int32, (B,)),
        ("ended", torch.uint8, (B,)),
        ("tokens", torch.int64, (B,)),
        ("drawn", torch.int64, (kept, B)),
        ("stops", torch.int64, (stops,)),
    ):
        _expect(name, getattr(draws, name), dtype, size)
    check(draws.drawn.is_contiguous(), f"draw_tokens: drawn must be contiguous, got strides {draws.drawn.stride()}")
    check(stops % STOPS == 0, f"draw_tokens: stops must be a multiple of {STOPS} long, got {stops}")
    settings = temperature, top_k, top_p, min_p, repetition_penalty
    return _draw(logits, draws.seed, draws.positions, *settings, draws.seen, draws)


def sample_tokens(
    logits: Tensor,
    seed: Tensor,
    positions: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    """Choose one token a row: logits [B, V] -> int64 [B], -1 where a row's logits are NaN, +Inf or all -Inf. No gradient.

    logits have any strides; seed int64 [1] and positions int32 [B] are on the device: a position is any number that is new each
    step. temperature 0 takes the most likely token, the first of equals, without filters. top_k keeps all that tie with the
    k-th; where top_p cuts through equals, it keeps the last ones of the vocabulary. repetition_penalty divides the positive
    logits of the tokens in `seen` (bool or uint8 [B, V], unit last stride) and multiplies the negative ones. The host reads
    nothing, and a CUDA graph may capture it. Raises ValueError for other shapes, dtypes or values.
    """
    return _draw(logits, seed, positions, temperature, top_k, top_p, min_p, repetition_penalty, seen, None)


def _draw(
    logits: Tensor, seed, positions, temperature, top_k, top_p, min_p, repetition_penalty, seen, draws: Draws | None
) -> Tensor:
    check_device("sample_tokens", logits=logits, seed=seed, positions=positions, seen=seen)
    check_float("sample_tokens", logits=logits)
    sized = logits.dim() == 2 and 1 <= logits.shape[1] <= 2**24  # tokens are counted in fp32
    check(sized, f"sample_tokens: logits must be [B, V] with V of 1 to 2**24, got {list(logits.shape)}")
    B, V = logits.shape
    _expect("seed", seed, torch.int64, (1,))
    _expect("positions", positions, torch.int32, (B,))
    if seen is not None:
        seen = seen.view(torch.uint8) if seen.dtype == torch.bool else seen
        _expect("seen", seen, torch.uint8, (B, V))
    check(0.0 <= temperature < float("inf"), f"sample_tokens: temperature must be 0 or more, got {temperature}")
    check(top_k is None or top_k >= 1, f"sample_tokens: top_k must be None or at least 1, got {top_k}")
    check(top_p is None or 0.0 <= top_p <= 1.0, f"sample_tokens: top_p must be None or 0 to 1, got {top_p}")
    check(min_p is None or 0.0 <= min_p <= 1.0, f"sample_tokens: min_p must be None or 0 to 1, got {min_p}")
    usable = 0.0 < repetition_penalty < float("inf")
    check(usable, f"sample_tokens: repetition_penalty must be over 0, got {repetition_penalty}")
    penalty = None if seen is None or repetition_penalty == 1.0 else float(repetition_penalty)  # None: left out
    marked = seen = None if penalty is None else seen
    divisor = None if temperature in (0.0, 1.0) else float(temperature)
    top_k, top_p = None if top_k is None or top_k >= V else top_k, None if top_p is None or top_p >= 1.0 else top_p
    if temperature > 0.0 and not (top_k is top_p is min_p is None):
        logits = filter_logits(logits, seen, divisor, penalty, top_k, top_p, min_p)
        seen = penalty = divisor = None
    vector = 16 // logits.element_size() if logits.stride(1) == 1 and logits.data_ptr() % 16 == 0 else 1
    split = min(_SPLIT, max(next_power_of_2(V + vector), 128))
    splits = cdiv(V + vector, split)
    best, index = (torch.empty(B, splits, dtype=dtype, device=logits.device) for dtype in (torch.float32, torch.int32))
    rows = None if draws is None else draws.rows
    launch(
        _sample_draw_kernel, (B * splits,),
        logits, seen, seed, positions, rows, best, index, *logits.stride(), 0 if seen is None else seen.stride(0),
        V, splits, divisor, penalty, SPLIT=split, VECTOR=vector, GREEDY=temperature == 0.0, num_warps=split // 256 or 1,
    )  # fmt: skip
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device) if draws is None else draws.tokens
    place = (None,) * 5 if draws is None else (positions, marked, draws.stops, draws.ended, draws.drawn)
    launch(
        _sample_pick_kernel, (B,),
        best, index, tokens, splits, *place, 0 if marked is None else marked.stride(0),
        0 if draws is None else draws.stops.shape[0], BLOCK=next_power_of_2(splits), STOPS=STOPS,
        KEPT=1 if draws is None else draws.drawn.shape[0], num_warps=1 if splits <= 256 else 4,
    )  # fmt: skip
    return tokens
