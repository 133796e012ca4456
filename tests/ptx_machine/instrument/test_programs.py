"""Control, scans, shuffles and atomics against torch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from ptx_machine.instrument.programs import (
    kinds,
    on,
)


@triton.jit
def multiply_add(a0, b0, a1, b1):
    return a0 * a1, b0 * a1 + b1


@triton.jit
def scan_kernel(x, y, sums, linear, reverse, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    v, w = tl.load(x + at), tl.load(y + at)
    tl.store(sums + at, tl.cumsum(v, 1))
    _, h = tl.associative_scan((v, w), 0, multiply_add)
    tl.store(linear + at, h)
    tl.store(reverse + at, tl.cumsum(v, 1, reverse=True))


def test_scans(arch):
    x, y = torch.rand(32, 64), torch.randn(32, 64)
    with on(arch) as m:
        sums, linear, reverse = (torch.empty_like(x) for _ in range(3))
        m.run(scan_kernel, (1,), x, y, sums, linear, reverse, M=32, N=64)
    torch.testing.assert_close(sums, x.cumsum(1))
    torch.testing.assert_close(reverse, x.flip(1).cumsum(1).flip(1))
    h, want = torch.zeros(64), []
    for t in range(32):
        h = h * x[t] + y[t]
        want.append(h)
    torch.testing.assert_close(linear, torch.stack(want))


@triton.jit
def shuffle_kernel(x, index, turned, gathered, sorted_, woven, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    v = tl.load(x + i[:, None] * N + j[None, :])
    tl.store(turned + j[:, None] * M + i[None, :], tl.trans(v) + tl.arange(0, N)[:, None])
    tl.store(gathered + i[:, None] * N + j[None, :], tl.gather(v, tl.load(index + i[:, None] * N + j[None, :]), 1))
    tl.store(sorted_ + i[:, None] * N + j[None, :], tl.sort(v, 1))
    a, b = tl.split(tl.reshape(v, (M, N // 2, 2)))
    tl.store(woven + i[:, None] * N + j[None, :], tl.reshape(tl.join(b, a), (M, N)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shuffles(arch, dtype):
    x, index = torch.randn(32, 64).to(dtype), torch.randint(64, (32, 64), dtype=torch.int32)
    with on(arch) as m:
        turned, gathered, sorted_, woven = torch.empty(64, 32, dtype=dtype), *(torch.empty_like(x) for _ in range(3))
        m.run(shuffle_kernel, (1,), x, index, turned, gathered, sorted_, woven, M=32, N=64)
    assert torch.equal(turned, (x.t() + torch.arange(64)[:, None]).to(dtype))
    assert torch.equal(gathered, x.gather(1, index.long()))
    assert torch.equal(sorted_, x.sort(1).values)
    assert torch.equal(woven, x.view(32, 32, 2).flip(2).reshape(32, 64))


@triton.jit
def atomics_kernel(x, total, count, top, swapped, bins, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0)
    tl.atomic_add(total, tl.sum(v, 0))
    tl.atomic_add(count + v % 7, 1, mask=i < n)
    tl.atomic_max(top, tl.max(v, 0))
    tl.atomic_cas(swapped, 0, tl.program_id(0) + 1)
    tl.atomic_add(bins + tl.arange(0, 16), tl.histogram(v % 16, 16))


def test_atomics(arch):
    x = torch.randint(0, 100, (1024,), dtype=torch.int32)
    with on(arch) as m:
        total, top, swapped, count, bins = (torch.zeros(k, dtype=torch.int32) for k in (1, 1, 1, 7, 16))
        m.run(atomics_kernel, (8,), x, total, count, top, swapped, bins, 1024, BLOCK=128)
    assert total.item() == x.sum()
    assert top.item() == x.max()
    assert swapped.item() == 1
    assert torch.equal(count.long(), torch.bincount(x % 7, minlength=7))
    assert torch.equal(bins.long(), torch.bincount(x % 16, minlength=16))


@triton.jit
def control_kernel(x, out, limit):
    row = tl.program_id(0)
    if row % 3 == 2:
        return
    n = tl.load(x + row)
    steps = 0
    while n != 1:
        if n % 2 == 0:
            n = n // 2
        else:
            n = 3 * n + 1
        steps += 1
    for i in range(steps):
        if i > limit:
            steps += 1
    tl.store(out + row, steps)


def test_control_flow(arch):
    x = torch.arange(1, 50, dtype=torch.int32)
    with on(arch) as m:
        out = torch.zeros(49, dtype=torch.int32)
        m.run(control_kernel, (49,), x, out, 10)

    def collatz(n):
        return 0 if n == 1 else 1 + collatz(n // 2 if n % 2 == 0 else 3 * n + 1)

    steps = [collatz(n) for n in range(1, 50)]
    assert out.tolist() == [0 if i % 3 == 2 else s + max(s - 11, 0) for i, s in enumerate(steps)]


@triton.jit
def grid_barrier_kernel(x, out, counter, programs, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    me = tl.program_id(0)
    tl.store(x + me * BLOCK + i, i + me)
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < programs:
        pass
    tl.debug_barrier()
    tl.store(out + me * BLOCK + i, tl.load(x + (me + 1) % programs * BLOCK + i))


def run_grid_barrier(m):
    x, out, counter = (
        torch.empty(8, 128, dtype=torch.int32),
        torch.empty(8, 128, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
    )
    m.run(grid_barrier_kernel, (8,), x, out, counter, 8, BLOCK=128, launch_cooperative_grid=True)
    return x, out


def test_grid_barrier(arch):
    with on(arch) as m:
        x, out = run_grid_barrier(m)
    assert torch.equal(out, x.roll(-1, 0))


def test_grid_barrier_without_release(arch):
    with on(arch, strict=False, change=lambda t: t.replace(".release.", ".relaxed.")) as m:
        run_grid_barrier(m)
    assert kinds(m) == {"global race"}
