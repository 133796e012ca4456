"""The fused sampler on the machine: what its filters keep, and that the token drawn is the reference's."""

from __future__ import annotations

import pytest
import torch
from ptx_machine.machine import machine
from sampled_draws import compare_draws, compare_filters, module, shorter_lists

ARCHS = (80, 90)
FILTERS = ({"top_k": 20}, {"top_p": 0.7}, {"top_k": 100, "top_p": 0.6, "min_p": 0.01})


def logits_with_ties(V: int) -> torch.Tensor:
    """Rounded as bf16 is, and coarser: equals in every list, and a list of nothing but -inf."""
    logits = torch.stack([2 * torch.randn(V), torch.randn(V).round()])
    logits[0, 128:256] = -torch.inf
    return logits.bfloat16()


@pytest.mark.one_of("sampler filters")
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(("columns", "together"), [(128, 256), (512, 1024)])
@pytest.mark.parametrize("arch", ARCHS)
def test_filters(arch, columns, together, filters):
    with machine(arch), shorter_lists(module, columns, together):
        compare_filters(module, logits_with_ties(700), **filters)


@pytest.mark.one_of("sampler draws")
@pytest.mark.parametrize("options", [{}, *FILTERS], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_draws(arch, options):
    seen = {"seen": torch.rand(2, 300) < 0.3, "repetition_penalty": 1.3} if options else {}
    with machine(arch), shorter_lists(module, 128, 512):
        compare_draws(module, logits_with_ties(300), torch.device("cpu"), temperature=0.9, **options, **seen)


@pytest.mark.parametrize("arch", ARCHS)
def test_filters_of_the_whole_vocabulary(arch):
    """In production's lists: a sort over eight warps, and a threshold that cuts through equals of many lists."""
    with machine(arch):
        compare_filters(module, (3 * torch.randn(1, 50257)).bfloat16(), top_k=3000, top_p=0.8)
