"""What sm90 adds: products of warp groups, boxes and their barriers."""

from __future__ import annotations

import re

import pytest
import torch
from ptx_machine.batch import MachineError
from ptx_machine.instrument.programs import (
    cut,
    kinds,
    occurrences,
    on,
    run_box_matmul,
    run_matmul,
)


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


def test_each_barrier_of_the_box_pipeline(arch):
    count = occurrences(arch, lambda m: run_box_matmul(m), r"bar\.sync")
    caught = 0
    for which in range(count):
        with on(arch, strict=False, change=cut(r"bar\.sync", which)) as m:
            run_box_matmul(m)
        caught += bool(m.report.errors)
    print(f"{caught} of {count} deleted barriers show")
    assert caught >= 2


def test_each_proxy_fence(arch):
    """A left operand made by threads in shared memory."""

    def run(m):
        a, b = torch.randn(128, 128).bfloat16(), torch.randn(128, 64).bfloat16()
        out = torch.empty(128, 64)
        run_matmul(m, a, b, out, blocks=(128, 64, 64))
        return out, a.double() @ b.double()

    count = occurrences(arch, run, r"fence\.proxy\.async")
    assert count
    for which in range(count):
        with on(arch, strict=False, change=cut(r"fence\.proxy\.async", which)) as m:
            run(m)
        assert "proxy fence" in kinds(m)


def test_barrier_used_before_all_know_of_it(arch):
    count = occurrences(arch, lambda m: run_box_matmul(m), r"mbarrier\.init")
    assert count

    def change(text):
        head, init, tail = re.split(r"(?s)(mbarrier\.init.*?)(?=try_wait)", text, maxsplit=1)
        return head + re.sub(r"bar\.sync\s+0;", "", init) + tail

    with on(arch, strict=False, change=change) as m:
        run_box_matmul(m)
    assert "mbarrier" in kinds(m)
