"""Which queries see which keys, and which probabilities dropout keeps: what attention's forward and backward kernels agree on.

Query t of row b sees keys first[b, t] .. S - T + t with `causal`, where `first` is 0 unless it is given, and all S without.
`first` doesn't decrease along T. So the queries of a tile see a range of keys whose ends are ragged and whose middle is whole,
and the keys of a tile are seen by such a range of queries: only the ragged tiles need a mask, and none outside is looked at.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import philox

# Queries that `query_range` compares at once: four loads a thread of eight warps.
SEARCH = tl.constexpr(1024)


@triton.jit
def visible(rows, cols, first, T, S, CAUSAL: tl.constexpr, HAS_FIRST: tl.constexpr):
    """Whether queries `rows` < T, whose first keys are `first`, see keys `cols`; shaped to broadcast."""
    if CAUSAL:
        seen = cols <= rows + (S - T)
    else:
        seen = cols < S
    if HAS_FIRST:
        seen = seen & (cols >= first)
    return seen


@triton.jit
def first_keys(first_ptr, rows, T):
    """first[rows], or 0 where there is none."""
    if first_ptr is None:
        return 0
    else:
        return tl.load(first_ptr + tl.minimum(rows, T - 1))


@triton.jit
def key_range(first_ptr, row, rows_end, T, S, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """(begin, whole, ragged, end): queries row .. rows_end - 1 see no key outside begin .. end - 1, all of whole .. ragged - 1.

    All but `end` are multiples of BLOCK, or `end`.
    """
    begin, whole, ragged, end = 0, 0, S // BLOCK * BLOCK, S
    if CAUSAL:
        ragged = tl.minimum(tl.maximum(row + 1 + S - T, 0), S) // BLOCK * BLOCK
        end = tl.maximum(tl.minimum(rows_end, T) + S - T, 0)
    if first_ptr is not None:
        low = tl.maximum(tl.load(first_ptr + row), 0)
        high = tl.maximum(tl.load(first_ptr + tl.minimum(rows_end, T) - 1), 0)
        begin = tl.minimum(low // BLOCK * BLOCK, end)
        whole = tl.minimum(tl.cdiv(high, BLOCK) * BLOCK, end)
        ragged = tl.maximum(ragged, whole)
    return begin, whole, ragged, end


@triton.jit
def query_range(first_ptr, col, cols_end, T, S, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """(begin, whole, ragged, end) in tiles of BLOCK queries: those that see any of keys col .. cols_end - 1, and those whose
    queries see all of them."""
    tiles = tl.cdiv(T, BLOCK)
    begin, whole, ragged, end = 0, 0, tiles, tiles
    if CAUSAL:
        begin = tl.maximum(col + T - S, 0) // BLOCK
        whole = tl.minimum(tl.cdiv(tl.maximum(cols_end - 1 + T - S, 0), BLOCK), tiles)
    if first_ptr is not None:
        # how many queries' first keys are no later than the tile's first, and than its last
        all_keys, any_key = begin * BLOCK, begin * BLOCK
        found = SEARCH
        while found == SEARCH:
            at = any_key + tl.arange(0, SEARCH)
            first = tl.load(first_ptr + at, mask=at < T, other=2147483647)
            all_keys += tl.sum((first <= col).to(tl.int32), 0)
            found = tl.sum((first < cols_end).to(tl.int32), 0)
            any_key += found
        end = tl.cdiv(any_key, BLOCK)
        whole = tl.minimum(whole, end)
        ragged = tl.maximum(all_keys // BLOCK, whole)
    return begin, whole, ragged, end


@triton.jit
def _pair(i):
    """The number of the pair (i, i + 8), i & 8 == 0, that row or column i is of: in a form that the compiler sees through."""
    return ((i & -16) + (i & 7) * 2) >> 1


@triton.jit
def keep(seed, head, row, col, kept, ROWS: tl.constexpr, COLS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which probabilities of queries row .. row + ROWS - 1 and keys col .. col + COLS - 1 dropout keeps: [ROWS, COLS], or its
    transpose. row and col are multiples of ROWS and COLS; kept is the share that is.

    Philox gives 128 bits, eight halves of 16, and they go to queries (r, r + 8) x keys (c, c + 8, c + 16, c + 24): tensor cores
    leave all eight in one thread in a tile of queries by keys, which so calls it once for eight, and four of them in its
    transpose. The counter is the query's number, the key's and the head's; what a tile adds to them stands apart from what a
    thread does, so that the compiler sees which calls are the same.
    """
    i, j = tl.arange(0, ROWS), tl.arange(0, COLS)
    c0 = row // 2 + _pair(i)
    if COLS < 32:  # half of a block of 32 keys, which has four such halves by turns
        c1 = (col >> 5) * 8 + (j & 7)
        j += col & 16
    else:
        c1 = (col >> 5) * 8 + ((j >> 5) * 8 + (j & 7))
    if TRANSPOSED:
        i, c0, j, c1 = i[None, :], c0[None, :], j[:, None], c1[:, None]
    else:
        i, c0, j, c1 = i[:, None], c0[:, None], j[None, :], c1[None, :]
    zero = (c0 + c1) * 0
    w0, w1, w2, w3 = philox(seed, c0 + zero, c1 + zero, head + zero, zero)
    upper, right = (i & 8) != 0, (j & 16) != 0
    word = tl.where(upper, tl.where(right, w3, w2), tl.where(right, w1, w0))
    # The half, and behind it the other one, which decides nothing: a shift alone would make the compiler multiply anew.
    half = tl.where((j & 8) != 0, word, (word << 16) | (word >> 16))
    dropped = tl.minimum((1.0 - kept) * 65536.0, 65535.0).to(tl.uint32) << 16
    return half >= dropped


def kept_share(dropout_p: float) -> float:
    """1 - dropout_p as it is with 16 random bits an element: what is kept is scaled by the inverse of this."""
    return 1.0 - round(dropout_p * 65536) / 65536


@triton.jit
def keep_scale(kept, ACC: tl.constexpr):
    """1 / kept, and 0 where nothing is."""
    return tl.where(kept > 0.0, 1.0 / tl.cast(tl.maximum(kept, 1e-5), ACC), 0.0)
