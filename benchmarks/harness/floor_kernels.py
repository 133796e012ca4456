"""Triton kernels that measure a GPU: a read of everything, the smallest kernel, and barriers among all programs.

A barrier adds one to a counter and waits until as many have come as there are programs, times the turn: the counter only grows
within a launch, so that nobody has to put it back. All programs must run at once: the launch is cooperative, one program a
multiprocessor. In Triton's interpreter, which runs programs one after another, only a single program gets through.

    triton            tl.atomic_add to arrive and, adding zero with acquire semantics, to look
    assembly          one thread looks with relaxed loads, one fence behind them; fewer instructions a look
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BARRIERS = ("triton", "assembly")
BLOCK = 256
STREAM_BLOCK = 8192


@triton.jit
def _wait(counter_ptr, target, ASSEMBLY: tl.constexpr):
    tl.debug_barrier()
    if ASSEMBLY:
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred other, early;
            .reg .u32 thread, seen;
            mov.u32 thread, %tid.x;
            setp.ne.u32 other, thread, 0;
            @other bra DONE_${:uid};
            red.release.gpu.global.add.u32 [$1], 1;
            LOOK_${:uid}:
            ld.relaxed.gpu.global.u32 seen, [$1];
            setp.lt.u32 early, seen, $2;
            @early bra LOOK_${:uid};
            fence.acq_rel.gpu;
            DONE_${:uid}:
            mov.u32 $0, 0;
            }
            """,
            "=r,l,r",
            [counter_ptr, target],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
        while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
            pass
    tl.debug_barrier()


@triton.jit
def _barriers_kernel(counter_ptr, programs, turns, ASSEMBLY: tl.constexpr):
    target = 0
    for _ in range(turns):
        target += programs
        _wait(counter_ptr, target, ASSEMBLY)


@triton.jit
def _ring_kernel(x_ptr, y_ptr, counter_ptr, programs, turns, ASSEMBLY: tl.constexpr, BLOCK: tl.constexpr):
    """Each turn, twice: take the neighbour's values plus one. Plain loads, so that a missing invalidation shows."""
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    next_one = (tl.program_id(0) + 1) % programs * BLOCK + tl.arange(0, BLOCK)
    target = 0
    for _ in range(turns):
        tl.store(y_ptr + own, tl.load(x_ptr + next_one) + 1)
        target += programs
        _wait(counter_ptr, target, ASSEMBLY)
        tl.store(x_ptr + own, tl.load(y_ptr + next_one) + 1)
        target += programs
        _wait(counter_ptr, target, ASSEMBLY)


@triton.jit
def _tiny_kernel(x_ptr, DEPENDENT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) + 1)


@triton.jit
def _read_kernel(x_ptr, out_ptr, N, programs, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(first, N, programs.to(tl.int64) * BLOCK):
        offsets = i + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + offsets, mask=offsets < N, other=0.0, eviction_policy="evict_first").to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def read_all(x: Tensor, per_multiprocessor: int) -> Tensor:
    """Partial sums of x [N], one of each program."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count if x.is_cuda else 1
    programs = per_multiprocessor * multiprocessors
    out = torch.empty(programs, device=x.device)
    _read_kernel[(programs,)](x, out, x.numel(), programs, BLOCK=STREAM_BLOCK, num_warps=8)
    return out


def tiny(x: Tensor, grid: int, dependent: bool) -> None:
    """Add one to the first grid * BLOCK elements of x."""
    options = {"launch_pdl": True} if dependent else {}
    _tiny_kernel[(grid,)](x, DEPENDENT=dependent, BLOCK=BLOCK, **options)


def barriers(kind: str, programs: int, turns: int) -> None:
    """`turns` barriers among `programs` programs of 256 threads."""
    counter = torch.zeros(1, dtype=torch.int32, device=_device())
    _barriers_kernel[(programs,)](
        counter, programs, turns, ASSEMBLY=kind == "assembly", num_warps=8, launch_cooperative_grid=True
    )


def barrier_orders_memory(kind: str, programs: int, turns: int) -> bool:
    """Whether a program sees behind each barrier what its neighbour stored before it."""
    start = torch.arange(programs * BLOCK, dtype=torch.int32, device=_device())
    x, y, counter = start.clone(), torch.zeros_like(start), torch.zeros(1, dtype=torch.int32, device=_device())
    _ring_kernel[(programs,)](
        x,
        y,
        counter,
        programs,
        turns,
        ASSEMBLY=kind == "assembly",
        BLOCK=BLOCK,
        num_warps=8,
        launch_cooperative_grid=True,
    )
    expected = start.view(programs, BLOCK).roll(-2 * turns, 0) + 2 * turns
    return torch.equal(x, expected.flatten())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
