"""What sm90 adds: products of warp groups, boxes and their barriers."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from ptx_machine import machine as of_machine
from ptx_machine.batch import MachineError
from ptx_machine.instrument.programs import (
    cut,
    kinds,
    occurrences,
    on,
    run_box_matmul,
    run_matmul,
)
from ptx_machine.machine import COMPILERS, CheckError
from ptx_machine.shared_memory import COPY_UNFENCED


@pytest.fixture
def arch() -> int:
    return 90


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize(
    ("dtype", "blocks", "warps"),
    [
        (torch.bfloat16, (64, 64, 64), 4),
        (torch.float16, (128, 128, 32), 8),
        (torch.bfloat16, (64, 32, 16), 4),
        (torch.float32, (64, 64, 32), 4),
    ],
)
def test_box_matmul(arch, dtype, blocks, warps, layout):
    with on(arch) as m:
        out, exact = run_box_matmul(m, layout, dtype, blocks, warps=warps)
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert error < {torch.float32: 2e-3, torch.float16: 1e-3}.get(dtype, 8e-3), error


def test_products_that_nobody_waits_for(arch):
    def change(text):
        return re.sub(r"wgmma\.wait_group\.sync\.aligned\s+\d+", "wgmma.wait_group.sync.aligned 7", text)

    with on(arch, strict=False, change=change) as m:
        run_box_matmul(m, shape=(64, 64, 512))
    assert "asynchronous read" in kinds(m)


def test_boxes_that_nobody_waits_for(arch):
    with on(arch, strict=False, change=lambda t: re.sub(r"@!complete bra\.uni waitLoop;", "", t)) as m:
        run_box_matmul(m)
    assert "asynchronous copy" in kinds(m) or not kinds(m)  # a box may have come in time: at once, here
    with on(
        arch,
        strict=False,
        change=lambda t: re.sub(r"\n\s*mbarrier\.try_wait.*\n", "\n", t).replace("@!complete bra.uni waitLoop;", ""),
    ) as m:
        run_box_matmul(m)
    assert "asynchronous copy" in kinds(m) or "uninitialised" in kinds(m)


def test_boxes_of_fewer_bytes_than_expected(arch):
    def change(text):
        return re.sub(r"(expect_tx\S+ _, \[%r\d+\], )(\d+)", lambda m: f"{m[1]}{int(m[2]) + 16}", text)

    with on(arch, strict=False, change=change, seconds=1) as m, pytest.raises(MachineError, match=r"out of time|spin"):
        run_box_matmul(m)


def without(*barriers):
    """PTX without these bar.sync, the last one first."""

    def change(text):
        for which in barriers:
            text = cut(r"bar\.sync", which)(text)
        return text

    return change


def test_barriers_of_the_box_pipeline(arch):
    """Two neighbours at once: Triton 3.6 has a barrier on either side of expect_tx, of which one would do.

    What shows: that a product still reads the stage which a box will fill, and the epilogue's scratch.
    """
    count = occurrences(arch, lambda m: run_box_matmul(m), r"bar\.sync")
    caught = set()
    for first, second in itertools.pairwise(range(count)):
        with on(arch, strict=False, change=without(second, first)) as m:
            run_box_matmul(m)
        caught |= {f.where for f in m.errors()}
    assert len(caught) >= 2, caught


def copied(m):
    a, b = torch.randn(128, 128).bfloat16(), torch.randn(128, 64).bfloat16()
    run_matmul(m, a, b, torch.empty(128, 64), blocks=(128, 64, 64))


@pytest.mark.parametrize(("run", "found"), [(run_box_matmul, "proxy fence"), (copied, COPY_UNFENCED)])
def test_each_proxy_fence(arch, run, found):
    """In front of a box of what threads have stored, and of products of what they have copied."""
    count = occurrences(arch, run, r"fence\.proxy\.async")
    assert count or found in COMPILERS
    for which in range(count):
        with on(arch, strict=False, change=cut(r"fence\.proxy\.async", which)) as m:
            run(m)
        assert found in {f.kind for f in m.report.errors}


def test_what_the_compiler_leaves_out_hides_nothing_else(arch, monkeypatch):
    def unfenced(text):
        return re.sub(r".*fence\.proxy\.async.*\n", "\n", text)

    def unwaited(text):
        return re.sub(r"wgmma\.wait_group\.sync\.aligned\s+\d+", "wgmma.wait_group.sync.aligned 7", unfenced(text))

    monkeypatch.setattr(of_machine, "COMPILERS", {COPY_UNFENCED})
    monkeypatch.setattr(of_machine, "compilers", None)
    with pytest.raises(CheckError, match=COPY_UNFENCED), on(arch, change=unfenced) as m:
        copied(m)
    monkeypatch.setattr(of_machine, "compilers", [])
    with on(arch, change=unfenced) as m:
        copied(m)
    assert {f.kind for f in of_machine.compilers} == {COPY_UNFENCED}
    with pytest.raises(CheckError, match="asynchronous read") as error, on(arch, change=unwaited) as m:
        copied(m)
    assert COPY_UNFENCED not in str(error.value)


def test_barrier_used_before_all_know_of_it(arch):
    count = occurrences(arch, lambda m: run_box_matmul(m), r"mbarrier\.init")
    assert count

    def change(text):
        head, init, tail = re.split(r"(?s)(mbarrier\.init.*?)(?=try_wait)", text, maxsplit=1)
        return head + re.sub(r"bar\.sync\s+0;", "", init) + tail

    with on(arch, strict=False, change=change) as m:
        run_box_matmul(m)
    assert "mbarrier" in kinds(m)
