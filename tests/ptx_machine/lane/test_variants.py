"""What ops take beside their tensors, on the machine: a norm's dtype, each token's position, smoothing and z-loss, statistics."""

from __future__ import annotations

import functools

import pytest
import torch
from ptx_machine.lane.precision import PRECISIONS, compare, randn

import fastgpt_kernels as kernels
from fastgpt import reference

PRECISION = pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])


@pytest.mark.one_of("norm beside its input")
@PRECISION
def test_a_norm_in_bf16_beside_its_input(arch, precision):
    def of(module):
        def norm(x, weight, bias):
            return module.add_layer_norm(
                None, x, weight, bias, dtype=None if x.dtype == torch.float64 else torch.bfloat16
            )

        return norm

    compare(arch, PRECISIONS[precision], of(kernels), of(reference), [randn(37, 768), randn(768), randn(768)])


@pytest.mark.one_of("mlp beside its residual")
@pytest.mark.parametrize("rows", [390, 401])
@PRECISION
def test_an_mlp_beside_its_residual(arch, precision, rows):
    """Of a large tile for each multiprocessor, which the machine has four of, the last product adds residuals in fp32."""

    def of(module):
        def mlp(x, w1, b1, w2, b2, residual):
            wide = residual if residual.dtype == torch.float64 else residual.float()
            return module.mlp(x, w1, b1, w2, b2, residual=wide)

        return mlp

    w1, w2 = randn(128, 64, scale=0.1), randn(64, 128, scale=0.1)
    inputs = [randn(rows, 64), w1, randn(128), w2, randn(64), randn(rows, 64)]
    compare(arch, PRECISIONS[precision], of(kernels), of(reference), inputs)


@pytest.mark.one_of("embedding positions")
@PRECISION
def test_embedding_at_given_positions(arch, precision):
    idx, positions = torch.randint(40, (2, 33)), torch.randint(36, (2, 33), dtype=torch.int32)
    plain = functools.partial(reference.embedding, positions=positions)
    inputs = [idx, randn(40, 768), randn(36, 768)]
    compare(arch, PRECISIONS[precision], kernels.embedding, plain, inputs, positions=positions)


@pytest.mark.one_of("losses")
@PRECISION
def test_smoothed_cross_entropy_with_z_loss(arch, precision):
    targets = torch.randint(1003, (7,))
    targets[2] = -100
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    plain = functools.partial(reference.cross_entropy, **options)
    compare(arch, PRECISIONS[precision], kernels.cross_entropy, plain, [randn(7, 1003), targets], **options)


@pytest.mark.one_of("statistics")
@PRECISION
def test_statistics_of_a_linear_cross_entropy(arch, precision):
    x, weight = (randn(n, 32).to(PRECISIONS[precision].dtype) for n in (9, 500))
    targets = (x @ weight.T).argmax(1)
    targets[::2] = 3
    with PRECISIONS[precision].machine(arch):
        _, lse, top = kernels.linear_cross_entropy_with_statistics(x, weight, targets)
    logits = (x @ weight.T).float()
    torch.testing.assert_close(lse, logits.logsumexp(1))
    assert torch.equal(top, logits.gather(1, targets[:, None])[:, 0] == logits.amax(1))
