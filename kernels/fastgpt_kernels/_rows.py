"""What the row-wise kernels share: how they see their input, how they cut it, and how they add up column sums."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch, next_power_of_2


def as_rows(x: Tensor) -> Tensor:
    """x [..., N] -> [M, N] with unit stride along N: a view wherever one exists, else a copy."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x.reshape(-1 if x.numel() else x.shape[:-1].numel(), x.shape[-1])


def row_tile(width: int, itemsize: int, lane_columns: int) -> tuple[int, int, int]:
    """Rows of a tile, columns of a chunk, warps.

    A row is read in chunks of one 16-byte load a lane and belongs to as few warps, at most 16, as keep it to `lane_columns`
    columns a lane. Where that is one warp, sums over the row are shuffles and need no barrier.
    """
    vector = 32 * max(16 // itemsize, 1)  # what a warp reads in one instruction
    warps = 1
    while warps < 16 and cdiv(width, warps * vector) * vector > 32 * lane_columns:
        warps *= 2
    num_warps = max(warps, 4)
    chunk = min(warps * vector, next_power_of_2(width))
    return num_warps * vector // chunk, chunk, num_warps


def column_tile(width: int, itemsize: int, num_warps: int, loads: int) -> tuple[int, int]:
    """Rows and columns of a tile for ops that don't reduce over a row: what one warp reads wide, with `loads` loads a lane."""
    vector = 32 * max(16 // itemsize, 1)
    columns = min(vector, next_power_of_2(width))
    return loads * num_warps * vector // columns, columns


def keep_scale(dropout_p: float) -> float:
    """What dropout multiplies the elements by that it keeps."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


@triton.jit(do_not_specialize=["P"])
def _column_sums_kernel(
    a_ptr, b_ptr, sum_a_ptr, sum_b_ptr,
    P, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = a_ptr.dtype.element_ty
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum_a = tl.zeros((BLOCK_P, BLOCK_N), acc_dtype)
    sum_b = tl.zeros((BLOCK_P, BLOCK_N), acc_dtype)
    for p in range(0, P, BLOCK_P):
        rows = p + tl.arange(0, BLOCK_P).to(tl.int64)[:, None]
        offsets, mask = rows * N + cols, (rows < P) & (cols < N)
        sum_a += tl.load(a_ptr + offsets, mask=mask, other=0.0)
        if b_ptr is not None:
            sum_b += tl.load(b_ptr + offsets, mask=mask, other=0.0)
    tl.store(sum_a_ptr + cols, tl.sum(sum_a, axis=0), mask=cols < N)
    if b_ptr is not None:
        tl.store(sum_b_ptr + cols, tl.sum(sum_b, axis=0), mask=cols < N)


def column_sums(a: Tensor, sum_a: Tensor, b: Tensor | None = None, sum_b: Tensor | None = None) -> None:
    """Partial sums a, b [P, N] -> sum_a, sum_b [N], always in the same order: the second stage of deterministic gradients."""
    P, N = a.shape
    launch(  # a sector of 32 bytes of each row a program: 96 of them at GPT-2's 768 columns
        _column_sums_kernel, (cdiv(N, 8),),
        a, b, sum_a, sum_b, P, N=N, BLOCK_P=512, BLOCK_N=8, num_warps=8,
    )  # fmt: skip
