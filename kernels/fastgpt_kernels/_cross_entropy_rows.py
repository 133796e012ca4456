"""A row of logits: its loss and its gradient, in two walks. What cross_entropy and linear_cross_entropy both launch.

    lse        = max + log(sum(exp(logits - max)))
    loss       = lse - (1 - e) * logits[t] - e * mean(logits) + z * lse^2           0 where the target t is ignore_index
    dlogits    = (softmax(logits) * (1 + 2 z lse) - (1 - e) * onehot(t) - e / V) * scale

    logits, dlogits   [N, V]   bf16 | fp16 | fp32 | fp64    e: label_smoothing, z: z_loss
    loss, lse         [N]      fp32 (fp64 for fp64)         lse and top only where wanted
    top               [N]      bool: no logit is over the target's

One program owns one row. Each lane walks the row with 16-byte loads and keeps its own running maximum and sum (the online
softmax of https://arxiv.org/abs/1805.02867); the lanes meet once at the row's end. A second walk, served by the caches, writes
the gradient. 50257 is odd, so 16-bit rows start at any of eight offsets from a 16-byte boundary: the up to VEC - 1 elements
before the first boundary and after the last are the lanes' initial state, and everything between is whole vectors.

Bound by memory: with the gradient 2 * N * V * itemsize bytes (logits in, dlogits out), 1.65 GB or 0.55 ms at 3.0 TB/s for 8192
rows in bf16; without, half of that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch, next_power_of_2, sm_count

# With the gradient a row is read twice, and the second time should hit the L2: 32 warps of at most 32 registers run two rows
# an SM, which for GPT-2's 100 kB rows of 16-bit logits are 27 MB of an H100's 50. Rows beyond 128 kB (fp32) get four vectors
# a thread, whose 64 registers leave one row an SM: the same bytes. Two rows of 1024 16-byte loads are 32 kB in flight an SM,
# above the 20 kB that an H100 needs (25 B/ns an SM over 0.8 us).
MAX_LANES = 1024
MAX_LANES_WIDE = 4096
WIDE_ROW_BYTES = 128 * 1024


def vector(dtype: torch.dtype) -> int:
    """Elements of one 16-byte load."""
    return 16 // dtype.itemsize


def _lanes_and_warps(V: int, dtype: torch.dtype, with_grad: bool) -> tuple[int, int]:
    """A short row in one step, a long one at full width; never fewer lanes than a row's two unaligned ends need."""
    limit = MAX_LANES_WIDE if with_grad and V * dtype.itemsize > WIDE_ROW_BYTES else MAX_LANES
    elements = vector(dtype)
    lanes = min(max(next_power_of_2(cdiv(V, elements)), 2 * elements), limit)
    return lanes, min(max(lanes // 32, 1), 32)


@triton.jit
def _exp(x):
    # a third of tl.exp's instructions, which keep results below 2^-126
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _online_softmax(m, l, x):
    """Take x [LANES, VEC] into the running maximum m and the sum l of exp(x - m), both [LANES]."""
    m_new = tl.maximum(m, tl.max(x, axis=1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, l * _exp(m - m_safe) + tl.sum(_exp(x - m_safe[:, None]), axis=1)


# alignment is worked out per row, so one binary serves every size and stride
@triton.jit(
    do_not_specialize=["V", "ignore_index", "stride_logits", "stride_targets", "stride_scale", "stride_dlogits"]
)
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, scale_ptr, loss_ptr, lse_ptr, top_ptr, dlogits_ptr,
    V, ignore_index,
    stride_logits, stride_targets, stride_scale, stride_dlogits,
    ACC: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, HAS_SCALE: tl.constexpr, WITH_GRAD: tl.constexpr,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row * stride_targets)
    used = target != ignore_index
    in_range = (target >= 0) & (target < V)
    # [first, body) and what is left after body + n_body are the unaligned ends, shorter than VEC each
    first = row * stride_logits
    body = (first + (VEC - 1)) // VEC * VEC
    head = tl.minimum(body - first, V).to(tl.int32)
    n_body = (V - head) // VEC * VEC

    lane = tl.arange(0, LANES)
    cols = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
    end_cols = tl.where(lane < VEC, lane, head + n_body + lane - VEC)
    end_mask = tl.where(lane < VEC, lane < head, end_cols < V)
    x_end = tl.load(logits_ptr + first + end_cols, mask=end_mask & used, other=float("-inf")).to(ACC)
    x_target = tl.load(logits_ptr + first + target, mask=used & in_range, other=0.0).to(ACC)
    m = x_end
    l = _exp(x_end - tl.where(x_end == float("-inf"), 0.0, x_end))
    if SMOOTHING > 0.0:
        total = tl.where(end_mask & used, x_end, 0.0)
    for start in range(0, n_body, LANES * VEC):
        mask = (start + cols < n_body) & used
        x = tl.load(logits_ptr + body + start + cols, mask, float("-inf"), eviction_policy="evict_last").to(ACC)
        m, l = _online_softmax(m, l, x)
        if SMOOTHING > 0.0:
            total += tl.sum(tl.where(mask, x, 0.0), axis=1)

    m_row = tl.max(m, axis=0)
    m_row = tl.where(m_row == float("-inf"), 0.0, m_row)
    l_row = tl.where(used, tl.sum(l * _exp(m - m_row), axis=0), 1.0)
    loss = tl.log(l_row) - (x_target - m_row)
    lse = tl.log(l_row) + m_row
    if SMOOTHING > 0.0:
        loss = loss * (1.0 - SMOOTHING) + (tl.log(l_row) - (tl.sum(total, axis=0) / V - m_row)) * SMOOTHING
    if Z_LOSS > 0.0:
        loss += lse * lse * Z_LOSS
    loss = tl.where(in_range, loss, float("nan"))
    tl.store(loss_ptr + row, tl.where(used, loss, 0.0))
    if lse_ptr is not None:
        tl.store(lse_ptr + row, tl.where(used, lse, 0.0))
        tl.store(top_ptr + row, used & in_range & (x_target == m_row) & (l_row == l_row))  # no row with a NaN

    if WITH_GRAD:
        scale = tl.load(scale_ptr + row * stride_scale).to(ACC) if HAS_SCALE else tl.full((), 1.0, ACC)
        scale = tl.where(in_range, scale, float("nan"))
        # an ignored row reads as -inf throughout: finite factors make its gradient exactly 0
        factor = tl.where(used, scale / l_row, 0.0)
        if Z_LOSS > 0.0:
            factor = tl.where(used, factor * (lse * (2.0 * Z_LOSS) + 1.0), 0.0)
        smooth = 0.0
        if SMOOTHING > 0.0:
            smooth = tl.where(used, scale * SMOOTHING / V, 0.0)
        own_first = row * stride_dlogits
        own_body = (own_first + (VEC - 1)) // VEC * VEC
        for start in range(0, n_body, LANES * VEC):
            in_row = start + cols < n_body
            x = tl.load(logits_ptr + body + start + cols, in_row & used, float("-inf"), eviction_policy="evict_first")
            dx = _exp(x.to(ACC) - m_row) * factor
            if SMOOTHING > 0.0:
                dx -= smooth
            tl.store(dlogits_ptr + own_body + start + cols, dx, mask=in_row)
        dx_end = _exp(x_end - m_row) * factor - smooth
        tl.store(dlogits_ptr + own_first + end_cols, dx_end, mask=end_mask)
        # the target's own element again, after everyone's store: cheaper than a comparison for each of V
        tl.debug_barrier()
        dx_target = _exp(x_target - m_row) * factor - smooth - scale * (1.0 - SMOOTHING)
        tl.store(dlogits_ptr + own_first + target, dx_target, mask=used & in_range)


@triton.jit(do_not_specialize=["n"])
def _scale_kernel(x_ptr, scale_ptr, out_ptr, n, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    scale = tl.load(scale_ptr)
    # loss.backward() comes with 1: then a gradient that stays where it is needs no pass
    if (scale != 1.0) | (not IN_PLACE):
        n_body = n // VEC * VEC
        offsets = tl.arange(0, BLOCK)
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, n_body, tl.num_programs(0).to(tl.int64) * BLOCK):
            mask = start + offsets < n_body
            x = tl.load(x_ptr + start + offsets, mask=mask).to(scale.dtype)
            tl.store(out_ptr + start + offsets, x * scale, mask=mask)
        if tl.program_id(0) == 0:
            rest = n_body + tl.arange(0, VEC)
            x = tl.load(x_ptr + rest, mask=rest < n).to(scale.dtype)
            tl.store(out_ptr + rest, x * scale, mask=rest < n)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def launch_rows(
    logits: Tensor, targets: Tensor, row_scale: Tensor | None, loss: Tensor, dlogits: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, lse: Tensor | None = None, top: Tensor | None = None,
) -> None:  # fmt: skip
    """logits [N, V] -> loss, lse, top [N], dlogits [N, V], which may be logits itself; row_scale is [N] or one number for all."""
    N, V = logits.shape
    lanes, num_warps = _lanes_and_warps(V, logits.dtype, dlogits is not None)
    launch(
        _cross_entropy_kernel, (N,), logits, targets, row_scale, loss, lse, top, dlogits,
        V, ignore_index,
        logits.stride(0), targets.stride(0), row_scale.stride(0) if row_scale is not None and row_scale.ndim else 0,
        0 if dlogits is None else dlogits.stride(0),
        ACC=tl.float64 if loss.dtype == torch.float64 else tl.float32, LANES=lanes, VEC=vector(logits.dtype),
        HAS_SCALE=row_scale is not None, WITH_GRAD=dlogits is not None, SMOOTHING=label_smoothing, Z_LOSS=z_loss,
        num_warps=num_warps,
    )  # fmt: skip


def launch_scale(x: Tensor, scale: Tensor, out: Tensor) -> None:
    # rows may be a few elements apart; what lies between them belongs to the same storage
    n = x.numel() if x.is_contiguous() else (x.shape[0] - 1) * x.stride(0) + x.shape[1]
    block = 1024 * vector(x.dtype)
    # persistent, so that finding a scale of 1 costs a launch and not a grid of N * V / block empty programs
    programs = min(cdiv(n, block), 8 * sm_count(x.device))
    launch(
        _scale_kernel, (programs,), x, scale, out, n, IN_PLACE=out is x, BLOCK=block, VEC=vector(x.dtype), num_warps=8
    )
