"""The fused sampler's filters, penalty and temperature beside the reference's."""

from __future__ import annotations

import sys
import unittest.mock

import pytest
import torch
from layouts import LAYOUTS
from mutants import mutants
from sampled_draws import (
    FILTERS,
    compare_draws,
    compare_filters,
    kept_logits,
    module,
    noise_arguments,
    penalised,
    shorter_lists,
)

from fastgpt.inference.sampling import INVALID, SamplingParams, filtered, sample
from fastgpt_kernels.sampling import sample_tokens

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_the_references_tokens(name, dtype, device):
    compare_filters(module, (3 * torch.randn(2, 101, device=device)).to(dtype), **FILTERS[name])


@pytest.mark.parametrize("columns", [128, 512], ids=lambda n: f"{n} together")
@pytest.mark.parametrize("name", FILTERS)
def test_filters_over_several_lists(name, columns, device):
    logits = 3 * torch.randn(2, 700, device=device)
    logits[1, :] = (logits[1] / 4).round()  # equals in every list
    logits[1, ::7] = -torch.inf
    with shorter_lists(module, 128, columns):
        compare_filters(module, logits, **FILTERS[name])


def test_lists_of_nothing_and_of_the_least(device):
    logits = torch.full((2, 600), -torch.inf, device=device)
    logits[0, 300:310] = torch.arange(10.0, device=device)
    logits[1, :128], logits[1, 256:384] = 1.0, 2.0
    with shorter_lists(module, 128, 512):
        for filters in ({"top_k": 4}, {"top_k": 20}, {"top_p": 0.5}, {"top_k": 200, "top_p": 0.99}):
            compare_filters(module, logits, **filters)


def test_filters_of_the_whole_vocabulary(device):
    """GPT-2's: 25 lists. Rounded as bf16 is, so that equals are in many of them."""
    compare_filters(module, (3 * torch.randn(1, 50257, device=device)).bfloat16().float(), top_k=300, top_p=0.9)


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.3, 0.999, 0.9999999])
def test_top_p_near_its_ends(p, device):
    compare_filters(module, (3 * torch.randn(1, 37)).to(device), top_p=p)  # the same draw everywhere, clear of any sum


@pytest.mark.parametrize("k", [1, 2, 36])
def test_top_k_near_its_ends(k, device):
    compare_filters(module, 3 * torch.randn(1, 37, device=device), top_k=k)


EXTREMES = {
    "equal": [2.5] * 16,
    "zeros of both signs": [0.0, -0.0] * 8,
    "two values": [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0],
    "far apart": [3e38, -3e38, 1.0, 0.0, -1.0, 1e38, 2e38, -1e38],
    "close to zero": [1e-45, 3e-45, 1e-30, 1e-38, -1e-45, 0.0, 1e-20, -1e-10],
    "neighbours": [1.0, 1.0 + 2**-23, 1.0 + 2**-22, 1.0 - 2**-24, 1.0, 1.0 + 2**-23, 0.5, 2.0],
    "few finite": [-torch.inf] * 6 + [1.0, 2.0],
    "one token": [3.0],
}


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.25, "min_p": 0.5}], ids=str)
@pytest.mark.parametrize("name", EXTREMES)
def test_ties_and_extremes(name, filters, device):
    compare_filters(module, torch.tensor([EXTREMES[name]], device=device), **filters)


@pytest.mark.parametrize("columns", [128, 256, 2048])
def test_a_tie_over_several_lists_is_cut_from_the_front(columns, device):
    logits = torch.full((1, 512), -1.0, device=device)
    logits[0, 100] = 2.0
    with shorter_lists(module, 128, columns):
        kept = kept_logits(module, logits, top_p=0.5)[0].isfinite().nonzero()[:, 0].tolist()
    # exp(2) + n exp(-1) must reach half of exp(2) + 511 exp(-1), in exact arithmetic
    assert kept == [100, *range(512 - 246, 512)]


def test_a_tie_is_cut_within_a_list_in_steps(device):
    logits = torch.full((1, 600), -1.0, device=device)
    logits[0, 100] = 2.0
    with unittest.mock.patch("fastgpt_kernels._filters._CHUNK", 128):
        compare_filters(module, logits, top_p=0.2)
        compare_filters(module, logits, top_p=0.9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_penalty_and_temperature_of_any_layout(layout, device):
    logits = LAYOUTS[layout](3 * torch.randn(3, 66))
    seen = torch.rand(3, 66) < 0.3
    expected = filtered(penalised(logits, seen, 0.7, 1.3), SamplingParams(1.0, top_k=9))
    on_device = LAYOUTS[layout](logits.to(device))
    seen_there = LAYOUTS["padded rows"](seen.to(device))
    assert torch.equal(kept_logits(module, on_device, seen_there.view(torch.uint8), 0.7, 1.3, top_k=9), expected)
    seed, positions = noise_arguments(5, 3, device)
    for options in ({}, {"temperature": 0.7}):
        plain = sample_tokens(logits.contiguous().to(device), seed, positions, **options)
        assert torch.equal(sample_tokens(on_device, seed, positions, **options), plain)
        both = {"repetition_penalty": 1.3, "seen": seen_there, **options}
        x = penalised(logits, seen, options.get("temperature", 1.0), 1.3).to(device)
        again = sample_tokens(x, seed, positions, temperature=1.0 if options else 0.0)
        assert torch.equal(sample_tokens(on_device, seed, positions, **both), again)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [1, 3, 64, 101, 5000])
def test_greedy_is_argmax(V, dtype, device):
    logits = torch.randn(3, V, device=device).to(dtype)
    logits[1, V // 2 :] = 5.0  # the first of equals
    tokens = sample_tokens(logits, *noise_arguments(0, 3, device), top_k=2)
    assert torch.equal(tokens.cpu(), logits.float().cpu().argmax(-1))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9}], ids=str)
def test_unusable_rows_are_marked_and_leave_the_others_alone(options, device):
    logits = torch.randn(6, 70, device=device)
    arguments = noise_arguments(1, 6, device)
    expected = sample_tokens(logits, *arguments, **options)
    broken = logits.clone()
    broken[0, 3], broken[1, 69], broken[3, 0], broken[4] = torch.nan, torch.inf, torch.nan, -torch.inf
    broken[2, :60], expected[[0, 1, 3, 4]] = -torch.inf, INVALID
    tokens = sample_tokens(broken, *arguments, **options)
    assert tokens[2] >= 60
    expected[2] = tokens[2]
    assert torch.equal(tokens, expected)
    torchs = sample(broken, SamplingParams(**{"temperature": 0.0, **options}))
    assert torch.equal(tokens == INVALID, torchs == INVALID)


def test_a_large_vocabulary(device, monkeypatch):
    if device.type == "cpu":  # the interpreter pays by the step
        monkeypatch.setattr("fastgpt_kernels._filters._LIST", 2**16)
        monkeypatch.setattr(module, "_SPLIT", 2**17)
    logits = torch.randn(1, 1_000_000, device=device)
    seed, positions = noise_arguments(1, 1, device)
    token = sample_tokens(logits, seed, positions, temperature=1.0, top_k=1)
    assert token.item() == logits.cpu().argmax().item() == sample_tokens(logits, seed, positions).item()


MUTANTS = {
    "one more than k": ("k = top_k.to(tl.float32)", "k = top_k.to(tl.float32) + 1.0"),
    "p of what top-k dropped as well": ("lists, t, top, LISTS, LIST)\n ", "lists, tl.min(lows), top, LISTS, LIST)\n "),
    "equals never cut": ("tl.where(left < 0, rank, 0)", "rank * 0"),
    "equals cut from a list's end": ("tl.cumsum(tie, axis=0, reverse=True)", "tl.cumsum(tie, axis=0)"),
    "equals cut from the last list": ("tl.cumsum(ties, axis=0, reverse=True)", "tl.cumsum(ties, axis=0)"),
    "equals of later groups forgotten": ("left -= tl.sum(ties)", "left -= tl.sum(ties) * 0"),
    "equals of a list's later steps forgotten": ("rank -= tl.sum(tie)", "rank -= tl.sum(tie) * 0"),
    "the cut ignored": ("(cols >= cut.to(tl.int32))", "(cols >= 0)"),
    "not sorted": ("tl.where((x > other) ==", "tl.where((x > x) =="),
    "only the first group searched": ("total += tl.sum(weight", "total += (first == 0) * tl.sum(weight"),
    "a list's last token never found": ("count += (l >= tried).to(tl.int32)", "count += 0"),
    "each list's mass beside its own largest": ("weight *= tl.exp(", "weight *= 1.0 + 0.0 * tl.exp("),
    "mass of the next token as well": ("n * LIST + count - 1, mask", "n * LIST + count, mask"),
    "mass over t forgotten": ("over = tl.maximum(over,", "over = tl.minimum(over,"),
    "min-p of the mass": ("kept &= tl.exp(l - top) >= min_p", "kept &= tl.exp(l) >= min_p"),
    "penalty for the others": ("tl.where(seen != 0,", "tl.where(seen == 0,"),
    "penalty for one sign": ("tl.where(x < 0.0, x * penalty,", "tl.where(x < 0.0, x,"),
    "no temperature": ("x = tl.math.div_rn(x, temperature)", "x = x + 0.0"),
    "rows draw alike": ("position, row).to(tl.float32)", "position, row * 0).to(tl.float32)"),
    "steps draw alike": ("position, row).to(tl.float32)", "position * 0, row).to(tl.float32)"),
    "noise of the wrong sign": ("score = l - tl.log(", "score = l + tl.log("),
    "the rare end of the noise lost": ("near = u * (", "near = 1.0 + u * ("),
    "last of equals": ("tl.min(tl.where(score == best, cols, V))", "tl.max(tl.where(score == best, cols, -1))"),
    "edges not read": ("& (split == 0)", "& (split < 0)"),
    "NaN unseen": (
        "tl.where(tl.min(usable.to(tl.int32)) == 0, float",
        "tl.where(tl.min(usable.to(tl.int32)) == 2, float",
    ),
    "padding drawn": ("mask=inside, other=float", "mask=inside, other=-float"),
}


def small_problem(ours, device):
    torch.manual_seed(1)
    compare_filters(ours, torch.randn(1, 37, device=device), top_k=9)
    compare_filters(ours, torch.randn(1, 37, device=device), top_k=20, top_p=0.5)
    compare_filters(ours, torch.tensor([EXTREMES["equal"]], device=device), top_k=3)
    compare_filters(ours, torch.tensor([EXTREMES["two values"]], device=device), top_p=0.5)
    compare_filters(ours, torch.tensor([[0.0, 0.5, 0.5, 0.5, 2.0, 0.5]], device=device), top_p=0.8)
    compare_filters(ours, 3.0 + torch.randn(1, 37, device=device), min_p=0.5)
    arguments = noise_arguments(0, 2, device)
    logits = torch.tensor([[1.0, 4.0, 4.0, 2.0, -1.0], [1.0, 0.0, torch.nan, 2.0, 3.0]], device=device)
    assert ours.sample_tokens(logits, *arguments).tolist() == [1, INVALID]
    logits, seen = torch.randn(1, 37), torch.rand(1, 37) < 0.5
    kept = kept_logits(ours, logits.to(device), seen.to(device).view(torch.uint8), 0.7, 1.8, top_k=30)
    assert torch.equal(kept, filtered(penalised(logits, seen, 0.7, 1.8), SamplingParams(top_k=30)))
    with (
        shorter_lists(ours, 128, 256),
        unittest.mock.patch.object(sys.modules[ours.filter_limits.__module__], "_CHUNK", 64),
    ):
        logits = torch.full((1, 600), -1.0, device=device)
        logits[0, 300:400], logits[0, 100] = 1.0, 4.0
        compare_filters(ours, logits, top_k=2)
        for p in (0.2, 0.55, 0.95):
            compare_filters(ours, logits, top_p=p)
    compare_draws(ours, torch.tensor([[0.0, 0.5, 0.5, 0.5, 2.0, 0.5]]).expand(8, 6), device, temperature=1.0, top_p=0.8)
    compare_draws(ours, 3.0 + torch.randn(4, 37), device, temperature=1.0, min_p=0.5)
    compare_draws(ours, torch.randn(5, 37), device, temperature=0.5)
    compare_draws(ours, torch.zeros(1, 400), device, temperature=1.0)  # only the noise decides


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, device):
    with pytest.raises(AssertionError):
        small_problem(mutants(("_filters", "sampling"), *MUTANTS[name])[-1], device)


def test_the_mutants_problem_is_solved(device):
    small_problem(module, device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FILTERS)
def test_filters_at_gpt2s_vocabulary(name, device):
    logits = 3 * torch.randn(64, 50257, device=device)
    if name == "top-p":  # rows in which the rounding of an fp32 sum can't decide over a token
        sums = logits.double().sort(-1).values.softmax(-1).cumsum(-1)
        logits = logits[(sums - 0.1).abs().amin(-1) > 2e-6]
    assert len(logits) >= 8
    compare_filters(module, logits[:8], **FILTERS[name])
