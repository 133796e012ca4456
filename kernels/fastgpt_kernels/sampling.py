"""The next token of every row, drawn on the device: penalty, temperature, top-k, top-p, min-p, one draw.

    l      = penalised(logits) / temperature
    kept   = l where top-k, top-p and min-p keep the token, -inf elsewhere
    token  = argmax(kept - log(E)),  E exponential: each token with probability softmax(kept)     (Gumbel-max)

    logits             [B, V]         fp16 | bf16 | fp32 | fp64, any strides, read in fp32
    seen               [B, V]         bool | uint8: what the repetition penalty applies to
    seed, positions    [1] int64, [B] int32
    best, index        [B, splits]    fp32, int32        tokens   [B] int64

E is a pure function of (seed, row, position, token), so a row's token doesn't depend on its batch mates or on how often the host
looks, and a captured CUDA graph draws anew as the positions move on.
`draw` splits rows over the machine, `pick` takes the best of a row's parts. With filters, `sort` and `select` of `_filters.py` go
before: four launches a token instead of two, none of which walks a row of GPT-2's vocabulary in one program.

Bound by memory in `draw`: B V itemsize bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._filters import filter_limits, scores
from ._launch import cdiv, check, check_device, check_float, launch, next_power_of_2
from ._math import random_word

_SPLIT = 2048  # columns of a program of `draw`: 25 programs for GPT-2's vocabulary
STOPS = 32  # stop tokens that `pick` compares at a time


@triton.jit
def _race(
    logits_ptr, seen_ptr, at, begin, mask, V, seed, position, row, stride_column, temperature, penalty,
    limits_ptr, min_p, GREEDY: tl.constexpr,
):  # fmt: skip
    """(score, column) of the best of the columns at - begin; a score of NaN if one of them is not usable."""
    cols = at - begin
    x = tl.load(logits_ptr + at.to(tl.int64) * stride_column, mask=mask, other=float("-inf")).to(tl.float32)
    seen = 0 if seen_ptr is None else tl.load(seen_ptr + cols, mask=mask, other=0)
    l = scores(x, seen, temperature, penalty)
    if GREEDY:
        usable, score = x < float("inf"), l
    else:
        usable = l < float("inf")
        # Uniform on (0, 1) and finest near 0, where -log(1 - u) makes the rare large scores: 2^-33 is the least.
        u = (random_word(seed, cols.to(tl.int64), position, row).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
        u = tl.minimum(u, 0.99999994)
        near = u * (u * (u * (u * 0.25 + 1.0 / 3.0) + 0.5) + 1.0)
        score = l - tl.log(tl.where(u < 0.015625, near, -tl.log(1.0 - u)))
        if limits_ptr is not None:
            t, cut, top = tl.load(limits_ptr), tl.load(limits_ptr + 1), tl.load(limits_ptr + 2)
            kept = (l > t) | ((l == t) & (cols >= cut.to(tl.int32)))
            if min_p is not None:
                kept &= tl.exp(l - top) >= min_p
            score = tl.where(kept, score, float("-inf"))
    score = tl.where(usable, score, float("-inf"))  # what isn't read is -inf as well
    best = tl.max(score)
    index = tl.min(tl.where(score == best, cols, V))
    return tl.where(tl.min(usable.to(tl.int32)) == 0, float("nan"), best), index


# VECTOR elements are 16 bytes, and a row begins `begin` of them behind a 16-byte boundary. Whole vectors are read wide; what
# stands before and behind them belongs to a row's first program, a warp of it.
@triton.jit(do_not_specialize=["V", "splits"])
def _sample_draw_kernel(
    logits_ptr, seen_ptr, seed_ptr, positions_ptr, rows_ptr, limits_ptr, best_ptr, index_ptr,
    stride_row, stride_column, stride_seen, V, splits, temperature, penalty, min_p,
    SPLIT: tl.constexpr, VECTOR: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    begin = (row * stride_row % VECTOR).to(tl.int32)
    floor = (begin + V) // VECTOR * VECTOR
    logits_ptr += row * stride_row // VECTOR * VECTOR
    seen_row = None if seen_ptr is None else seen_ptr + row * stride_seen
    limits_row = None if limits_ptr is None else limits_ptr + row * 3
    seed, position = tl.load(seed_ptr), tl.load(positions_ptr + row)
    named = row if rows_ptr is None else tl.load(rows_ptr + row).to(tl.int64)
    at = split * SPLIT + tl.arange(0, SPLIT)
    best, index = _race(
        logits_ptr, seen_row, at, begin, (at >= VECTOR) & (at < floor), V, seed, position, named,
        stride_column, temperature, penalty, limits_row, min_p, GREEDY,
    )  # fmt: skip
    at = tl.arange(0, 32)
    at = tl.where(at < VECTOR, at, floor - VECTOR + at)
    edge_best, edge_index = _race(
        logits_ptr, seen_row, at, begin, (at >= begin) & (at < begin + V) & (split == 0), V, seed, position, named,
        stride_column, temperature, penalty, limits_row, min_p, GREEDY,
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
    found = None
    if temperature > 0.0 and not (top_k is top_p is min_p is None):
        logits, found = filter_limits(logits, seen, divisor, penalty, top_k, top_p)
        seen = penalty = divisor = None
    vector = 16 // logits.element_size() if logits.stride(1) == 1 and logits.data_ptr() % 16 == 0 else 1
    split = min(_SPLIT, max(next_power_of_2(V + vector), 128))
    splits = cdiv(V + vector, split)
    best, index = (torch.empty(B, splits, dtype=dtype, device=logits.device) for dtype in (torch.float32, torch.int32))
    rows = None if draws is None else draws.rows
    launch(
        _sample_draw_kernel, (B * splits,),
        logits, seen, seed, positions, rows, found, best, index, *logits.stride(), 0 if seen is None else seen.stride(0),
        V, splits, divisor, penalty, None if min_p is None else float(min_p),
        SPLIT=split, VECTOR=vector, GREEDY=temperature == 0.0, num_warps=split // 256 or 1,
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
