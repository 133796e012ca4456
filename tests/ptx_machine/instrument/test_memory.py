"""Checkers of memory, each on a bug planted for it."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from ptx_machine.batch import MachineError
from ptx_machine.instrument.programs import (
    kinds,
    on,
    run_reduction,
)


@triton.jit
def swap_kernel(x, out, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + i, tl.load(x + BLOCK - 1 - i))


@pytest.mark.parametrize("barrier", [False, True])
def test_store_then_load_of_others(arch, barrier):
    with on(arch, strict=False) as m:
        x, out = torch.empty(256, dtype=torch.int32), torch.empty(256, dtype=torch.int32)
        m.run(swap_kernel, (1,), x, out, BLOCK=256, BARRIER=barrier)
    assert kinds(m) == (set() if barrier else {"global race"})


@triton.jit
def tail_kernel(x, out, n, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n) if MASK_LOAD else tl.load(x + i)
    if MASK_STORE:
        tl.store(out + i, v, mask=i < n)
    else:
        tl.store(out + i, v)


@pytest.mark.parametrize(("load", "store"), [(True, True), (False, True), (True, False)])
def test_out_of_bounds(arch, load, store):
    x, guard = torch.randn(1000), torch.zeros(4096)
    with on(arch, strict=False) as m:
        out = torch.empty(1000)
        m.run(tail_kernel, (4,), x, out, 1000, BLOCK=256, MASK_LOAD=load, MASK_STORE=store)
    assert kinds(m) == (set() if load and store else {"out of bounds"})
    assert torch.equal(out, x)
    assert guard.eq(0).all()
    for finding in m.report.errors:
        assert finding.count == 24 // (4 if finding.where.find("v4") > 0 else 1) or finding.count in (24, 12, 6)


@triton.jit
def same_address_kernel(out, SAME: tl.constexpr):
    tl.store(out + (0 if SAME else tl.program_id(0)), tl.program_id(0))


@pytest.mark.parametrize("same", [True, False])
def test_programs_that_write_one_address(arch, same):
    with on(arch, strict=False) as m:
        out = torch.empty(4, dtype=torch.int32)
        m.run(same_address_kernel, (4,), out, SAME=same)
    assert kinds(m) == ({"global write race"} if same else set())


@triton.jit
def in_place_kernel(x, n, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i + SHIFT, mask=i + SHIFT < n, other=0), mask=i < n)


@pytest.mark.parametrize("shift", [0, 1])
def test_in_place(arch, shift):
    x = torch.randn(1024)
    with on(arch, strict=False) as m:
        m.run(in_place_kernel, (4,), x, 1024, BLOCK=256, SHIFT=shift)
    assert kinds(m) == ({"global race"} if shift else set())


def test_uninitialised_input(arch):
    with on(arch, strict=False) as m:
        x, out = torch.empty(1000), torch.empty(1000)
        m.run(tail_kernel, (4,), x, out, 1000, BLOCK=256, MASK_LOAD=True, MASK_STORE=True)
        assert out.isnan().all()
        assert {f.kind for f in m.report.findings.values()} == {"uninitialised"}
        m.report.findings.clear()
        x.zero_()
        m.run(tail_kernel, (4,), x, out, 1000, BLOCK=256, MASK_LOAD=True, MASK_STORE=True)
        assert not m.report.findings


def test_misaligned_vector(arch):
    x = torch.randn(1024)
    with on(arch, strict=False, change=lambda t: re.sub(r"(ld\.global\.v4\S* .*\+) 0 \]", r"\1 4 ]", t)) as m:
        out = torch.empty(1000)
        m.run(tail_kernel, (1,), x, out, 512, BLOCK=512, MASK_LOAD=True, MASK_STORE=True)
    assert kinds(m) == {"misaligned"}


def test_divergent_barrier(arch):
    def change(text):
        at = re.search(r"^\s*bar\.sync\s+0;\n", text, re.M)
        extra = "{ .reg .pred q; .reg .b32 t; mov.u32 t, %tid.x; setp.lt.u32 q, t, 40; @q bar.sync 0; }\n"
        return text[: at.start()] + extra + text[at.end() :]

    with on(arch, strict=False, change=change) as m, pytest.raises(MachineError, match="deadlock"):
        run_reduction(m)
    assert "barrier" in kinds(m)


def test_shared_out_of_bounds(arch):
    def change(text):
        return re.sub(r"(st\.shared\S*\s+\[\s*%r\d+\s*\+\s*)(\d+)", r"\g<1>100000", text, count=1)

    with on(arch, strict=False, change=change) as m:
        run_reduction(m)
    assert "out of bounds" in kinds(m)
