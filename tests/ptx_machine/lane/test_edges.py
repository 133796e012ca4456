"""Where the compiler may fuse what the interpreter keeps apart: edges of the numbers, compiled."""

from __future__ import annotations

import pytest
import torch
from ptx_machine.lane.precision import PRECISIONS, compare, randn, results

import fastgpt_kernels as kernels
from fastgpt import reference


@pytest.mark.one_of("attention of large scores")
@pytest.mark.parametrize("factor", [100, 1000])
@pytest.mark.parametrize(("length", "causal"), [(140, True), (65, False)])
def test_attention_of_large_scores_in_fp32(arch, factor, length, causal):
    """Where one key takes all, and where two nearly tie: the backward's p is the forward's."""
    q, k, v = (randn(1, 2, length, 64) for _ in range(3))
    inputs = [q * factor, k * factor, v]

    def plain(q, k, v):
        return reference.attention(q, k, v, causal)

    compare(arch, PRECISIONS["fp32"], kernels.attention, plain, inputs, causal=causal)


@pytest.mark.parametrize("rows", [1, 64])
def test_a_norm_of_one_column_has_no_gradient(arch, rows):
    inputs = [randn(rows, 1), randn(1), randn(1)]
    with PRECISIONS["fp32"].machine(arch):
        y, dx, dweight, dbias = results(kernels.layer_norm, inputs, torch.float32)
    assert not dx.any()
    assert not dweight.any()
    exact = results(reference.layer_norm, inputs, torch.float64)
    torch.testing.assert_close(y.double(), exact[0])
    torch.testing.assert_close(dbias.double(), exact[3], rtol=1e-6, atol=1e-6)
