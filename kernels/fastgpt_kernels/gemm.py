"""Matrix products whose epilogues do the memory-bound work of a feed-forward layer.

    gemm_activation   pre = a b + bias, out = activation(pre)       a linear layer; pre is stored where asked for
    gemm_residual     out = pre + a b + bias                        a linear layer and the sum with what passed it by
    gemm_gradient     out = (a b) * activation'(pre)                the gradient of its input, through the activation before it
                      sums = column sums of out                     and that of the bias in pre

    a, b              [M, K], [K, N]     bf16 | fp16 | fp32 | fp64, any strides
    pre, out          [M, N]             like a, contiguous; of gemm_residual a's dtype or wider
    bias, sums        [N]                a's dtype or wider
    partial           [P, N]             fp32 (fp64), one row of each row of tiles

A program owns an output tile and all of K. A second kernel adds up partial sums in an order that the shapes decide: no atomics.
Tiles go GROUP_M down before one to the right, so that both operands are in L2 still when read again.

Where there are asynchronous tensor cores and the tensor memory accelerator (sm90, sm100), and base and strides of every
operand are multiples of 16 bytes, tiles move through tensor descriptors and the kernel is persistent: as many programs as fit,
the loop over a program's tiles flattened with the loop over K, so that the next tile's loads fly during this one's epilogue.
Elsewhere a program reads through plain pointers and owns one tile.

Bound by tensor cores: 2 M N K FLOPs over their rate. An epilogue that moves pre beside out adds 2 M N elements of traffic:
at K = 768 memory is then busy for 78% of the products' time, and GELU's instructions are issued for 40% of it, its
derivative's for 70%. With fp32 residuals in and out at K = 3072 memory is busy for 70%. There two programs of 128 x 128 share
a multiprocessor, one's epilogue under the other's products. PARTS cuts the epilogue's columns, to save registers and the
shared memory that its stores pass through.

A product without such an epilogue is torch's, by cuBLAS.

Source: https://github.com/triton-lang/triton/blob/main/python/tutorials/09-persistent-matmul.py
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._launch import arch, asynchronous, cdiv, launch, register, sm_count, tf32
from ._math import activation as _activation
from ._math import activation_grad
from ._rows import column_sums

# 8 x 128 rows of a and the columns beside them are a few MB of 16-bit data at GPT-2's widths: well inside any L2.
GROUP_M = 8

Pair = tuple[Tensor, Tensor]


class Blocks(NamedTuple):
    """A tile and its step along K, warps, pipeline stages, parts of the epilogue, programs a multiprocessor has room for."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    parts: int = 1
    programs: int = 1
    maxnreg: int | None = None


UNALIGNED = Blocks(128, 64, 32, warps=8, stages=3, parts=2)  # columns off 16-byte boundaries: loaded one by one


def gemm_blocks(M: int, N: int, dtype: torch.dtype, capability: int, sms: int, aligned: bool, epilogue: str) -> Blocks:
    """The largest tile of a short list that gives every multiprocessor one. epilogue: an activation, "residual" or "gradient".

    Accumulators take 64 registers a thread where two programs of eight warps are to fit, else 128; the lists hold what
    compiles without spills for each architecture (python -m fastgpt_kernels.aot).
    """
    if dtype == torch.float64:
        return Blocks(32, 64, 16, warps=4, stages=3, parts=2)
    if dtype == torch.float32 and not tf32(dtype):
        # A step takes over 1000 clocks of FMAs: one tile ahead is enough. Left alone, ptxas takes too few registers and spills.
        # So does Triton 3.6's with erf's polynomial, unless that goes by halves.
        return Blocks(64, 64, 32, warps=8, stages=2, parts=2 if epilogue == "gelu" else 1, maxnreg=96)
    parts = 4 if epilogue in ("gradient", "residual", "gelu") else 2  # another tile in registers, erf's polynomial
    if dtype == torch.float32:
        choices = [Blocks(128, 128, 32, warps=8, stages=3, parts=parts), Blocks(64, 64, 32, warps=4, stages=3)]
        if capability // 10 == 10 and parts == 4:
            choices[0] = choices[0]._replace(maxnreg=255)  # one fits, by its shared memory; left alone, 3.6 spills
    elif M <= 32:  # the weight is all the traffic: narrow tiles for many programs, a deep pipeline for loads in flight
        choices = [Blocks(16 if M <= 16 else 32, 32, 64, warps=4, stages=8, programs=3)]
    elif not aligned:
        choices = [UNALIGNED]
    elif asynchronous(capability, dtype):
        shared = Blocks(128, 128, 64, warps=8, stages=3, parts=parts, programs=2, maxnreg=128)
        if capability >= 100:  # accumulators in tensor memory leave the registers to four warps
            shared = shared._replace(warps=4, maxnreg=None)
        choices = [shared, Blocks(64, 64, 64, warps=4, stages=4, programs=3)]
    else:  # 64 x 64 a warp needs the fewest reads of shared memory, and all 255 registers
        warps = 8 if capability >= 120 or (capability > 80 and epilogue == "gradient") else 4
        choices = [Blocks(128, 128, 32, warps, stages=4, parts=4), Blocks(64, 64, 64, warps=4, stages=3)]
    return next((b for b in choices if cdiv(M, b.m) * cdiv(N, b.n) >= sms), choices[-1])


@triton.jit
def _tile(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of output tile `index`."""
    group = index // (GROUP_M * tiles_n)
    rows = min(tiles_m - group * GROUP_M, GROUP_M)
    within = index % (GROUP_M * tiles_n)
    return group * GROUP_M + within % rows, within // rows


@triton.jit
def _load(
    x,
    i,
    j,
    I,
    J,
    stride_i,
    stride_j,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Tile [BLOCK_I, BLOCK_J] at (i, j) of x [I, J], zero outside it; a descriptor may describe x.T instead."""
    if DESCRIPTOR:
        if TRANSPOSED:
            return x.load([j, i]).T
        else:
            return x.load([i, j])
    else:
        rows, cols = i + tl.arange(0, BLOCK_I), j + tl.arange(0, BLOCK_J)
        offsets = rows.to(tl.int64)[:, None] * stride_i + cols.to(tl.int64)[None, :] * stride_j
        return tl.load(x + offsets, mask=(rows < I)[:, None] & (cols < J)[None, :], other=0.0)


@triton.jit
def _store(x, tile, i, j, I, J, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """Write a tile at (i, j) of the contiguous x [I, J]."""
    if DESCRIPTOR:
        x.store([i, j], tile.to(x.dtype))
    else:
        rows, cols = i + tl.arange(0, BLOCK_I), j + tl.arange(0, BLOCK_J)
        offsets = rows.to(tl.int64)[:, None] * J + cols[None, :]
        tl.store(x + offsets, tile.to(x.dtype.element_ty), mask=(rows < I)[:, None] & (cols < J)[None, :])


@triton.jit
def through_activation(dy, x, ACTIVATION: tl.constexpr):
    """dy * ACTIVATION'(x)."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, dy)  # as torch: no product, which would make NaN of an infinite dy
    else:
        return dy * activation_grad(x, ACTIVATION)


@triton.jit
def _halves(x):
    """Left and right half of the tile x."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _quarters(x):
    """Four parts of the columns of the tile x, from the left."""
    left, right = _halves(x)
    left0, left1 = _halves(left)
    right0, right1 = _halves(right)
    return left0, left1, right0, right1


@triton.jit(do_not_specialize=["M"])
def _gemm_kernel(
    a, b, bias_ptr, pre, out, sums_ptr,
    M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr, READ_PRE: tl.constexpr, HAS_SUMS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    PART_N: tl.constexpr = BLOCK_N // PARTS
    tl.assume(K > 0)  # spares the flattened loop a second epilogue
    start, stop, step = tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)
    if not DESCRIPTORS:  # its one tile; a loop that might go on would hold registers for the next
        stop, step = start + 1, 1
    for index in tl.range(start, stop, step, flatten=DESCRIPTORS):
        tile_m, tile_n = _tile(index, tiles_m, tiles_n, GROUP_M)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for k in tl.range(0, K, BLOCK_K):
            a_tile = _load(a, m, k, M, K, stride_am, stride_ak, BLOCK_M, BLOCK_K, DESCRIPTORS, A_TRANSPOSED)
            b_tile = _load(b, k, n, K, N, stride_bk, stride_bn, BLOCK_K, BLOCK_N, DESCRIPTORS, B_TRANSPOSED)
            acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        if PARTS == 2:
            parts = _halves(acc)
        elif PARTS == 4:
            parts = _quarters(acc)
        elif PARTS == 8:
            left, right = _halves(acc)
            p0, p1, p2, p3 = _quarters(left)
            p4, p5, p6, p7 = _quarters(right)
            parts = (p0, p1, p2, p3, p4, p5, p6, p7)
        else:
            parts = (acc,)
        for part in tl.static_range(PARTS):
            tile = parts[part]
            first = n + part * PART_N
            cols = first + tl.arange(0, PART_N)
            if HAS_BIAS:
                tile += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(ACC)[None, :]
            if SAVE_PRE:
                _store(pre, tile, m, first, M, N, BLOCK_M, PART_N, DESCRIPTORS)
            if READ_PRE:
                # not through a descriptor: its load would be waited for on the spot, this one is asked for a part ahead
                if part == 0 or not DESCRIPTORS:
                    x = _load(pre, m, first, M, N, N, 1, BLOCK_M, PART_N, False, False)
                if ACTIVATION is None:
                    tile += x.to(ACC)
                else:
                    tile = through_activation(tile, x.to(ACC), ACTIVATION)
                if DESCRIPTORS and part + 1 < PARTS:
                    x = _load(pre, m, first + PART_N, M, N, N, 1, BLOCK_M, PART_N, False, False)
            else:
                tile = _activation(tile, ACTIVATION)
            if HAS_SUMS:
                inside = (m + tl.arange(0, BLOCK_M) < M)[:, None]  # an infinite b makes NaN of the rows behind a's last
                sums = tl.sum(tl.where(inside, tile, 0.0), axis=0)
                tl.store(sums_ptr + tile_m.to(tl.int64) * N + cols, sums, mask=cols < N)
            _store(out, tile, m, first, M, N, BLOCK_M, PART_N, DESCRIPTORS)


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _orientation(x: Tensor) -> bool | None:
    """Whether a descriptor of x must be of x.T; None where neither has rows of unit stride on 16-byte boundaries."""
    if x.data_ptr() % 16 == 0 and x.numel() > 0:
        for transposed, rows in ((False, x), (True, x.t())):
            if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] and rows.stride(0) * rows.itemsize % 16 == 0:
                return transposed
    return None


def _describe(x: Tensor, block_rows: int, block_cols: int, transposed: bool | None = False) -> TensorDescriptor:
    if transposed:
        return TensorDescriptor.from_tensor(x.t(), [block_cols, block_rows])
    return TensorDescriptor.from_tensor(x, [block_rows, block_cols])


def _gemm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    pre: Tensor | None,
    activation: str | None,
    reads: bool = False,
    sums: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """-> out [M, N] in `dtype` or a's, partial column sums [P, N] ([0, 0] unless `sums`).

    Writes pre; or `reads` it, for the activation's gradient or, without one, to add it.
    """
    (M, K), N, device = a.shape, b.shape[1], a.device
    out = torch.empty((M, N), device=device, dtype=dtype or a.dtype)
    capability, sms = arch(device), sm_count(device)
    a_transposed, b_transposed = _orientation(a), _orientation(b)
    aligned = a_transposed is not None and b_transposed is not None and _orientation(out) is False
    descriptors = aligned and asynchronous(capability, a.dtype)
    epilogue = activation or "residual"
    blocks = gemm_blocks(M, N, a.dtype, capability, sms, aligned, "gradient" if reads and activation else epilogue)
    if out.itemsize > a.itemsize:  # whose stores pass through shared memory too: no more of it
        blocks = blocks._replace(parts=2 * blocks.parts)
    tiles_m, tiles_n, part = cdiv(M, blocks.m), cdiv(N, blocks.n), blocks.n // blocks.parts
    wide = torch.promote_types(a.dtype, torch.float32)
    partial = torch.empty((tiles_m, N) if sums else (0, 0), device=device, dtype=wide)
    operands: tuple[Any, ...] = (a, b, bias, pre, out)
    if descriptors:
        described = (_describe(a, blocks.m, blocks.k, a_transposed), _describe(b, blocks.k, blocks.n, b_transposed))
        saved = pre if pre is None or reads else _describe(pre, blocks.m, part)
        operands = (*described, bias, saved, _describe(out, blocks.m, part))
    launch(
        _gemm_kernel,
        (min(tiles_m * tiles_n, sms * blocks.programs) if descriptors else tiles_m * tiles_n,),
        *operands, partial, M, N, K, *a.stride(), *b.stride(),
        ACTIVATION=activation, HAS_BIAS=bias is not None, SAVE_PRE=pre is not None and not reads, READ_PRE=reads,
        HAS_SUMS=sums, ACC=_accumulator(a.dtype), PRECISION="tf32" if tf32(a.dtype) else "ieee",
        DESCRIPTORS=descriptors, A_TRANSPOSED=bool(a_transposed), B_TRANSPOSED=bool(b_transposed),
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_K=blocks.k, PARTS=blocks.parts, GROUP_M=GROUP_M,
        num_warps=blocks.warps, num_stages=blocks.stages, maxnreg=blocks.maxnreg,
    )  # fmt: skip
    return out, partial


def _fake(a: Tensor, b: Tensor, second: Any) -> Pair:
    return a.new_empty((a.shape[0], b.shape[1])), a.new_empty(second)


@register(
    "_gemm_activation(Tensor a, Tensor b, Tensor? bias, str activation, bool save_pre) -> (Tensor, Tensor)",
    fake=lambda a, b, bias, activation, save_pre: _fake(a, b, (a.shape[0], b.shape[1]) if save_pre else 0),
)
def gemm_activation(a: Tensor, b: Tensor, bias: Tensor | None, activation: str, save_pre: bool) -> Pair:
    """a [M, K], b [K, N] -> out [M, N], and pre [M, N] or, unless save_pre, an empty tensor."""
    pre = torch.empty((a.shape[0], b.shape[1]) if save_pre else 0, device=a.device, dtype=a.dtype)
    out, _ = _gemm(a, b, bias, pre if save_pre else None, activation)
    return out, pre


@register(
    "_gemm_residual(Tensor a, Tensor b, Tensor? bias, Tensor residual) -> Tensor",
    fake=lambda a, b, bias, residual: torch.empty_like(residual, memory_format=torch.contiguous_format),
)
def gemm_residual(a: Tensor, b: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """a [M, K], b [K, N], contiguous residual [M, N] -> residual + a b + bias, in the residual's dtype."""
    return _gemm(a, b, bias, residual, None, reads=True, dtype=residual.dtype)[0]


@register(
    "_gemm_gradient(Tensor a, Tensor b, Tensor pre, str activation, ScalarType? sums) -> (Tensor, Tensor)",
    fake=lambda a, b, pre, activation, sums: (_fake(a, b, 0)[0], a.new_empty(b.shape[1] if sums else 0, dtype=sums)),
)
def gemm_gradient(a: Tensor, b: Tensor, pre: Tensor, activation: str, sums: torch.dtype | None) -> Pair:
    """a [M, K], b [K, N], pre [M, N] -> out [M, N], sums [N] in the dtype that is asked for, or an empty tensor."""
    out, partial = _gemm(a, b, None, pre, activation, reads=True, sums=sums is not None)
    total = a.new_empty(partial.shape[1], dtype=sums)
    column_sums(partial, total)
    return out, total
