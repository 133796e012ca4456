"""Filters beside transformers' own processors; draws beside the probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation import logits_process as hf

from fastgpt.inference.sampling import INVALID, SamplingParams, filtered, sample


def spread_logits(rows: int = 6, vocab: int = 50) -> torch.Tensor:
    logits = 3 * torch.randn(rows, vocab)
    logits[0, :5] = logits[0, 5]  # ties
    return logits


@pytest.mark.parametrize("k", [1, 3, 6, 49, 50, 500])
def test_top_k_is_transformers(k):
    logits = spread_logits()
    expected = hf.TopKLogitsWarper(k)(None, logits.clone())
    assert torch.equal(filtered(logits, SamplingParams(top_k=k)), expected)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_is_transformers(p):
    logits = spread_logits()
    expected = hf.TopPLogitsWarper(p)(None, logits.clone()) if p < 1 else logits
    assert torch.equal(filtered(logits, SamplingParams(top_p=p)), expected)
    # the smallest set whose mass reaches p
    kept = filtered(logits, SamplingParams(top_p=p)).isfinite()
    mass = torch.where(kept, logits.softmax(-1), 0.0).sum(-1)
    assert (mass >= p - 1e-6).all()


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_min_p_is_transformers(p):
    logits = spread_logits()
    assert torch.equal(filtered(logits, SamplingParams(min_p=p)), hf.MinPLogitsWarper(p)(None, logits.clone()))


def test_filters_follow_transformers_order():
    logits = spread_logits()
    expected = logits / 0.7
    for warper in (hf.TopKLogitsWarper(20), hf.TopPLogitsWarper(0.8), hf.MinPLogitsWarper(0.05)):
        expected = warper(None, expected)
    assert torch.equal(filtered(logits / 0.7, SamplingParams(0.7, 20, 0.8, 0.05)), expected)


def test_repetition_penalty_is_transformers():
    logits = spread_logits(2)
    history = torch.tensor([[0, 0, 7], [3, 4, 5]])
    seen = torch.zeros(2, 50, dtype=torch.bool).scatter(1, history, True)
    penalized = hf.RepetitionPenaltyLogitsProcessor(1.7)(history, logits.clone())
    assert torch.equal(sample(logits, SamplingParams(repetition_penalty=1.7), seen), penalized.argmax(-1))
    torch.manual_seed(1)
    expected = torch.multinomial(penalized.softmax(-1), 1)[:, 0]
    torch.manual_seed(1)
    assert torch.equal(sample(logits, SamplingParams(1.0, repetition_penalty=1.7), seen), expected)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, 4)
    drawn = sample(logits, SamplingParams(temperature=0.5), generator=torch.Generator().manual_seed(0))
    expected = (logits[0] / 0.5).softmax(-1)
    for token, p in enumerate(expected.tolist()):
        assert (drawn == token).float().mean().item() == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / 20_000))


def test_greedy_takes_the_first_of_equals():
    assert sample(torch.tensor([[1.0, 5.0, 5.0]]), SamplingParams()).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_rows_are_marked_and_leave_the_others_alone(temperature):
    good = spread_logits(6)
    params = SamplingParams(temperature)
    expected = sample(good, params, generator=torch.Generator().manual_seed(0))
    bad = good.clone()
    bad[1, 3], bad[2, 0], bad[4] = math.nan, math.inf, -math.inf
    drawn = sample(bad, params, generator=torch.Generator().manual_seed(0))
    assert drawn[[1, 2, 4]].tolist() == [INVALID] * 3
    assert torch.equal(drawn[[0, 3, 5]], expected[[0, 3, 5]])


def test_sixteen_bit_logits_are_read_in_fp32():
    logits = spread_logits().to(torch.bfloat16)
    params = SamplingParams(0.9, top_p=0.9)
    drawn = [sample(x, params, generator=torch.Generator().manual_seed(0)) for x in (logits, logits.float())]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be a number of at least 0, got -1.0"),
        ({"temperature": math.nan}, "temperature must be .*, got nan"),
        ({"top_k": 0}, "top_k must be None or a whole number of at least 1, got 0"),
        ({"top_k": 2.5}, "top_k must be .*, got 2.5"),
        ({"top_p": 1.1}, "top_p must be None or a number from 0 to 1, got 1.1"),
        ({"min_p": -0.1}, "min_p must be .*, got -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number over 0, got 0.0"),
    ],
)
def test_bad_parameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)
