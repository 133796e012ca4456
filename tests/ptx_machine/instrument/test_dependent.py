"""Dependent launches: what an earlier grid may still write or read is not for a thread that hasn't waited."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from ptx_machine.instrument.programs import cut, kinds, on
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@pytest.fixture
def arch() -> int:
    return 90


@triton.jit
def scale_kernel(x, weight, out, BLOCK: tl.constexpr):
    gdc_launch_dependents()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weight + i)
    gdc_wait()
    tl.store(out + i, tl.load(x + i) * w)


@triton.jit
def add_one_kernel(x, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i) + 1)


def chain(m, dependent=True):
    """y = (x + 1) * a * b by three grids; returns (y, expected)."""
    x, a, b = (torch.randn(512) for _ in range(3))
    want = (x + 1) * a * b
    between, y = torch.empty(512), torch.empty(512)
    m.run(add_one_kernel, (2,), x, BLOCK=256)
    m.run(scale_kernel, (2,), x, a, between, BLOCK=256, launch_pdl=dependent)
    m.run(scale_kernel, (2,), between, b, y, BLOCK=256, launch_pdl=dependent)
    return y, want


def test_a_chain_of_grids_that_wait(arch):
    with on(arch) as m:
        y, want = chain(m)
    assert torch.equal(y, want)


WAIT = r"griddepcontrol\.wait"


@pytest.mark.parametrize("dependent", [True, False])
def test_without_its_wait(arch, dependent):
    with on(arch, strict=False, change=lambda text: cut(WAIT, 0)(text) if "wait" in text else text) as m:
        chain(m, dependent)
    assert kinds(m) == ({"dependent launch"} if dependent else set())
    if dependent:
        assert any("read by CTA" in f.detail for f in m.report.errors)
        assert any("ends without griddepcontrol.wait" in f.detail for f in m.report.errors)


def wait_last(text):
    """The wait behind every load."""
    found = re.search(rf".*{WAIT}.*\n", text)
    if found is None:
        return text
    text = text[: found.start()] + text[found.end() :]
    return re.sub(r"(\n\s*ret;)", "\n" + found[0] + r"\1", text, count=1)


def test_a_load_ahead_of_the_wait(arch):
    with on(arch, strict=False, change=wait_last) as m:
        chain(m)
    assert kinds(m) == {"dependent launch"}
    assert all("before its griddepcontrol.wait" in f.detail for f in m.report.errors)


@triton.jit
def overwrite_kernel(x, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        tl.store(x + i, i)
    gdc_wait()
    if not EARLY:
        tl.store(x + i, i)


@pytest.mark.parametrize("early", [True, False])
def test_a_store_to_what_a_grid_before_reads(arch, early):
    """Two grids before: the one between doesn't touch it, and may not have waited when this one starts."""
    with on(arch, strict=False) as m:
        x, a, out = (torch.zeros(512) for _ in range(3))
        m.run(scale_kernel, (2,), x, a, out, BLOCK=256, launch_pdl=True)
        m.run(scale_kernel, (2,), out, a, torch.empty(512), BLOCK=256, launch_pdl=True)
        m.run(overwrite_kernel, (2,), x, BLOCK=256, EARLY=early, launch_pdl=True)
    assert kinds(m) == ({"dependent launch"} if early else set())
    assert all("a grid before reads it" in f.detail for f in m.report.errors)


@triton.jit
def prefetch_kernel(x, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    if SIZE == 4096:
        asm: tl.constexpr = "cp.async.bulk.prefetch.L2.global [$1], 4096; mov.b32 $0, 0;"
    elif SIZE == 4112:
        asm: tl.constexpr = "cp.async.bulk.prefetch.L2.global [$1], 4112; mov.b32 $0, 0;"
    else:
        asm: tl.constexpr = "cp.async.bulk.prefetch.L2.global [$1], 8; mov.b32 $0, 0;"
    zero = tl.inline_asm_elementwise(asm, "=r,l", [x], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(out + tl.arange(0, BLOCK), 1 + zero)


@pytest.mark.parametrize(("size", "finding"), [(4096, None), (4112, "out of bounds"), (8, "misaligned")])
def test_a_prefetch_is_checked_for_its_bounds_and_does_nothing_else(arch, size, finding):
    with on(arch, strict=False) as m:
        x, out = torch.empty(1024), torch.empty(128, dtype=torch.int32)
        m.run(prefetch_kernel, (1,), x, out, SIZE=size, BLOCK=128)
    assert kinds(m) == ({finding} if finding else set())
    assert out.eq(1).all()
