"""The fused sampler's filters, penalty and temperature beside the reference's."""

from __future__ import annotations

import pytest
import torch
from layouts import LAYOUTS
from mutants import mutant
from sampled_draws import FILTERS, compare_draws, compare_filters, module, noise_arguments, penalised

from fastgpt.inference.sampling import INVALID, SamplingParams, filtered, sample
from fastgpt_kernels.sampling import filter_logits, sample_tokens

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_the_references_tokens(name, dtype, device):
    compare_filters(module, (3 * torch.randn(2, 101, device=device)).to(dtype), **FILTERS[name])


@pytest.mark.parametrize("name", ["top-k", "all"])
def test_filters_over_several_chunks(name, device, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 256)
    compare_filters(module, 3 * torch.randn(2, 1000, device=device), **FILTERS[name])


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


def test_a_tie_over_several_chunks_is_cut_from_the_front(device, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 128)
    logits = torch.full((1, 512), -1.0, device=device)
    logits[0, 100] = 2.0
    kept = filter_logits(logits, None, None, None, None, 0.5, None)[0].isfinite().nonzero()[:, 0].tolist()
    # exp(2) + n exp(-1) must reach half of exp(2) + 511 exp(-1), in exact arithmetic
    assert kept == [100, *range(512 - 246, 512)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_penalty_and_temperature_of_any_layout(layout, device):
    logits = LAYOUTS[layout](3 * torch.randn(3, 66))
    seen = torch.rand(3, 66) < 0.3
    expected = filtered(penalised(logits, seen, 0.7, 1.3), SamplingParams(1.0, top_k=9))
    on_device = LAYOUTS[layout](logits.to(device))
    seen_there = LAYOUTS["padded rows"](seen.to(device))
    kept = filter_logits(on_device, seen_there.view(torch.uint8), 0.7, 1.3, 9, None, None)
    assert torch.equal(kept.cpu(), expected)
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
        monkeypatch.setattr(module, "_CHUNK", 2**16)
        monkeypatch.setattr(module, "_SPLIT", 2**17)
    logits = torch.randn(1, 1_000_000, device=device)
    seed, positions = noise_arguments(1, 1, device)
    token = sample_tokens(logits, seed, positions, temperature=1.0, top_k=1)
    assert token.item() == logits.cpu().argmax().item() == sample_tokens(logits, seed, positions).item()


MUTANTS = {
    "one more than k": ("top_k.to(tl.float32), CHUNK", "top_k.to(tl.float32) + 1.0, CHUNK"),
    "p of what top-k dropped as well": ("mass += tl.where(l >= t, tl.exp(l - top), 0.0)", "mass += tl.exp(l - top)"),
    "equals never cut": ("if room < ties:", "if room < 0:"),
    "equals cut from the end": ("tl.cumsum(tie, axis=0, reverse=True)", "tl.cumsum(tie, axis=0)"),
    "tokens at the interval's end lost": ("within = (l >= low)", "within = (l > low)"),
    "mass over t forgotten": ("over = tl.maximum(over,", "over = tl.minimum(over,"),
    "min-p of the mass": ("keep &= tl.exp(l - top) >= min_p", "keep &= tl.exp(l) >= min_p"),
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
    kept = ours.filter_logits(logits.to(device), seen.to(device).view(torch.uint8), 0.7, 1.8, 30, None, None)
    assert torch.equal(kept.cpu(), filtered(penalised(logits, seen, 0.7, 1.8), SamplingParams(top_k=30)))
    compare_draws(ours, torch.randn(5, 37), device, temperature=0.5)
    compare_draws(ours, torch.zeros(1, 400), device, temperature=1.0)  # only the noise decides


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, device):
    with pytest.raises(AssertionError):
        small_problem(mutant("sampling", *MUTANTS[name]), device)


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
