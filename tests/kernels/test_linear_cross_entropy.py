"""linear_cross_entropy against float64: chunks of rows, tied and frozen weights, and what it keeps."""

from __future__ import annotations

import math

import pytest
import torch
from cross_entropy_problems import DTYPES, LAYOUTS, REDUCTIONS, assert_linear_cross_entropy, kernels, some_targets

from fastgpt import reference


@pytest.fixture
def two_rows_a_chunk(monkeypatch):
    monkeypatch.setattr(kernels, "_chunk_bytes", lambda device: 1)
    monkeypatch.setattr(kernels, "CHUNK_MULTIPLE", 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("N", "C", "V", "bias"), [(1, 1, 1, False), (5, 63, 257, True), (4, 257, 7, False)])
@pytest.mark.usefixtures("two_rows_a_chunk")
def test_linear(N, C, V, bias, reduction, dtype, device):
    x, weight = torch.randn(N, C, device=device).to(dtype), torch.randn(V, C, device=device).to(dtype)
    bias = torch.randn(V, device=device).to(dtype) if bias else None
    grad = torch.randn((N,) if reduction == "none" else (), device=device, dtype=torch.float64)
    assert_linear_cross_entropy(x, weight, bias, some_targets(N, V, device, ignored=N // 4), reduction, grad)


@pytest.mark.parametrize("layout", ["transposed", "every other row", "one row expanded", "offset by one"])
def test_linear_layouts(layout, device):
    x, weight = (LAYOUTS[layout](torch.randn(n, 12, device=device)) for n in (3, 31))
    assert_linear_cross_entropy(x, weight, None, some_targets(3, 31, device))


def test_linear_frozen_and_tied(device):
    targets = some_targets(5, 11, device)
    x, weight = torch.randn(5, 8, device=device), torch.randn(11, 8, device=device)
    for leaf, other in ((x, weight), (weight, x)):
        leaf.requires_grad_()
        other.requires_grad_(False)
        kernels.linear_cross_entropy(x, weight, targets).backward()
        assert leaf.grad is not None
        assert other.grad is None
        leaf.grad = None
    gradients = []
    for op in (kernels.linear_cross_entropy, reference.linear_cross_entropy):
        table = weight.detach().clone().requires_grad_()
        op(torch.nn.functional.embedding(targets.flip(0), table), table, targets).backward()
        gradients.append(table.grad)
    torch.testing.assert_close(*gradients)


def test_linear_keeps_no_large_logits():
    """At GPT-2's sizes and beyond, a chunk is two gigabytes at most and none is much smaller than the others."""
    for N in (1, 1000, 8192, 65536, 1_000_000):
        for V, dtype in ((50257, torch.bfloat16), (50257, torch.float32), (200_000, torch.bfloat16)):
            rows = kernels._rows_per_chunk(N, V, 768, dtype, torch.device("cpu"))
            assert rows <= N
            assert rows * V * dtype.itemsize <= kernels.CHUNK_BYTES + 128 * V * dtype.itemsize
            last = N % rows or rows
            assert rows - last <= 128 * math.ceil(N / rows)


@pytest.mark.gpu
def test_memory_of_linear(device):
    """The peak over the inputs and the fp32 dweight is a chunk of logits, however many rows there are."""
    x = torch.randn(65536, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50257, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = some_targets(65536, 50257, device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels.linear_cross_entropy(x, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 1.3 * kernels.CHUNK_BYTES
