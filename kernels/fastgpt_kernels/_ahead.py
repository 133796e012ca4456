"""Weights that stream ahead: while one kernel of a token runs, L2 fetches what the kernels after the next will read.

A token's matrices are one stream of bytes in the order in which its kernels read them, and from the head the stream goes on with
the next token's first layer. Each kernel asks for as many bytes as it reads itself, `distance` further on in the stream, so that
memory is busy through launches and waits: a token's bound is then the larger of the weights' time and the chain of latencies, and
not their sum. What a kernel asks for is cut into pieces, of which each of its last programs asks for one, by one instruction of
one thread (cp.async.bulk.prefetch.L2, sm90 and later). The answer goes to nobody: what comes late is only read from memory then.

    pieces     [n, 2]   int64: address and bytes, multiples of 16; those of all kernels in turn
    counts              how many of them each kernel has

Source: https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-prefetch
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv

# How far ahead, in bytes. An H100 reads 8 MB in 2.5 us, which is what a launch, a wait and an empty queue of loads take together,
# and its L2 has room for six times that. Never more than half of the L2.
AHEAD_BYTES = 8 << 20

LEAST_PIECE = 1024  # bytes; a program asks for no less


class Ahead(NamedTuple):
    """What each kernel of a token asks for; valid as long as no weight is replaced."""

    pieces: Tensor
    counts: tuple[int, ...]

    def of(self, kernel: int) -> tuple[Tensor, int]:
        """The pieces of one kernel from its first on, and their number."""
        return self.pieces[sum(self.counts[:kernel]) :], self.counts[kernel]


def plan(kernels: Sequence[tuple[Sequence[Tensor], int]], distance: int, device: torch.device) -> Ahead | None:
    """Of (matrices, programs) of a token's kernels in turn; None for a distance of 0.

    A kernel asks for the bytes that are `distance` behind those of its own matrices, less what is its own still. Matrices are
    contiguous. A distance over half of the stream is as half of it.
    """
    ends = list(accumulate(sum(m.numel() * m.itemsize for m in matrices) for matrices, _ in kernels))
    distance = min(distance, ends[-1] // 2)
    if distance <= 0:
        return None
    stream = [(m.data_ptr(), m.numel() * m.itemsize) for matrices, _ in kernels for m in matrices]
    pieces, counts = [], []
    for (_, programs), begin, end in zip(kernels, [0, *ends], ends, strict=False):
        first = max(begin + distance, end)
        found = _cut(stream, first, end + distance - first, programs)
        pieces += found
        counts.append(len(found))
    return Ahead(torch.tensor(pieces, dtype=torch.int64).to(device), tuple(counts))


def _cut(stream: Sequence[tuple[int, int]], begin: int, size: int, programs: int) -> list[tuple[int, int]]:
    """`size` bytes from `begin` on of the stream, which goes round, as at most `programs` pieces, each within one matrix."""
    step = max(cdiv(cdiv(size, max(programs - len(stream), 1)), 16) * 16, LEAST_PIECE)
    found: list[tuple[int, int]] = []
    total = sum(length for _, length in stream)
    at = 0
    for address, length in (*stream, *stream):
        low, high = max(begin - at, 0), min(begin + size - at, length)
        for first in range(low, high, step):
            start, stop = address + first, address + min(first + step, high)
            start, stop = cdiv(start, 16) * 16, stop // 16 * 16
            if stop > start:
                found.append((start, stop - start))
        at += length
    assert begin + size <= 2 * total
    return found[-programs:]


@triton.jit
def load_piece(pieces_ptr, count):
    """Address and bytes of this program's piece of a kernel's `count`; 0 bytes where it has none."""
    if pieces_ptr is None:
        return 0, 0
    else:
        piece = tl.program_id(0) - tl.num_programs(0) + count
        address = tl.load(pieces_ptr + 2 * piece, mask=piece >= 0, other=0)
        return address, tl.load(pieces_ptr + 2 * piece + 1, mask=piece >= 0, other=0).to(tl.int32)


@triton.jit
def ask_ahead(pieces_ptr, address, size):
    """Have L2 fetch the piece; without pieces, nothing at all."""
    if pieces_ptr is not None:
        tl.inline_asm_elementwise(
            """{
            .reg .pred asks;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 asks, thread, 0;
            setp.ne.and.u32 asks, $2, 0, asks;
            @asks cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [address, size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
