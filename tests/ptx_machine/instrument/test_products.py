"""Tensor cores and pipelines against float64, and what their checkers say of a missing wait or fence."""

from __future__ import annotations

import re

import pytest
import torch
import triton.language as tl
from ptx_machine.instrument.programs import (
    cut,
    kinds,
    occurrences,
    on,
    run_matmul,
    run_pipeline,
    run_reduction,
)


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.bfloat16, "ieee"),
        (torch.float16, "ieee"),
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.float64, "ieee"),
        (torch.int8, "ieee"),
    ],
)
def test_matmul(arch, dtype, precision, layout):
    M, N, K = 96, 80, 100
    a = (torch.randn(M, K) * (30 if dtype == torch.int8 else 1)).to(dtype)
    b = (torch.randn(K, N) * (30 if dtype == torch.int8 else 1)).to(dtype)
    exact = a.double() @ b.double()
    a = a.t().contiguous().t() if layout[0] == "t" else a
    b = b.t().contiguous().t() if layout[1] == "t" else b
    wide = {torch.float64: torch.float64, torch.int8: torch.int32}.get(dtype, torch.float32)
    acc = {torch.float64: tl.float64, torch.int8: tl.int32}.get(dtype, tl.float32)
    with on(arch) as m:
        out = torch.empty(M, N, dtype=wide)
        small = dtype in (torch.float64,)
        run_matmul(m, a, b, out, precision=precision, acc=acc, blocks=(32, 32, 16) if small else (64, 64, 32))
    error = (out.double() - exact).abs().max().item()
    assert error <= {torch.float64: 1e-12, torch.int8: 0.0}.get(dtype, 6e-2 if precision == "tf32" else 2e-5), error
    if precision == "tf32":
        assert error > 1e-4  # it does round


@pytest.mark.parametrize("warps", [1, 2, 8])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_matmul_pipelines(arch, warps, stages):
    a, b = torch.randn(128, 256).bfloat16(), torch.randn(256, 64).bfloat16()
    with on(arch) as m:
        out = torch.empty(128, 64)
        run_matmul(m, a, b, out, warps, stages)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("run", [run_pipeline, run_reduction])
def test_each_barrier_is_needed_or_redundant(arch, run):
    """With one bar.sync less there is a race, unless it stood next to another or protects nothing."""
    count = occurrences(arch, run, r"bar\.sync")
    caught = 0
    for which in range(count):
        with on(arch, strict=False, change=cut(r"bar\.sync", which)) as m:
            run(m)
        assert kinds(m) <= {"shared race", "asynchronous copy", "uninitialised"}
        caught += bool(m.errors())
    print(f"{run.__name__}: {caught} of {count} deleted barriers show")
    assert caught >= count // 2


def test_each_wait_is_needed(arch):
    count = occurrences(arch, run_pipeline, r"cp\.async\.wait_group")
    assert count >= 2
    caught = 0
    for which in range(count):
        with on(arch, strict=False, change=cut(r"cp\.async\.wait_group", which)) as m:
            run_pipeline(m)
        caught += bool({"asynchronous copy", "uninitialised", "shared race"} & kinds(m))
    assert caught >= count - 1  # the last one may have nothing to wait for


def test_wait_for_too_few(arch):
    def change(text):
        return re.sub(r"(cp\.async\.wait_group\s+)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 2}", text)

    with on(arch, strict=False, change=change) as m:
        run_pipeline(m)
    assert "asynchronous copy" in kinds(m) or "uninitialised" in kinds(m)
