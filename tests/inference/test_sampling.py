"""Filters beside transformers' own processors; draws beside the probabilities."""

from __future__ import annotations

import math
from dataclasses import astuple
from fractions import Fraction

import numpy as np
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
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"top_k": 2.5}, "top_k must be .*, got 2.5"),
        ({"top_p": 1.1}, "top_p must be None or a number from 0 to 1, got 1.1"),
        ({"min_p": -0.1}, "min_p must be .*, got -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number over 0, got 0.0"),
    ],
)
def test_bad_parameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def exact_scores(logits: torch.Tensor, seen: torch.Tensor, temperature: float, penalty: float) -> torch.Tensor:
    """Penalty and temperature in Python's fractions, the row's maximum off: what the draw is to see, in float64."""
    rows = []
    for row, marks in zip(logits.tolist(), seen.tolist(), strict=True):
        p, t = Fraction(penalty), Fraction(temperature)
        scores = [
            Fraction(x) * (1 if not mark else p if x < 0 else 1 / p) / t for x, mark in zip(row, marks, strict=True)
        ]
        rows.append([float(max(x - max(scores), Fraction(-(10**300)))) for x in scores])
    return torch.tensor(rows, dtype=torch.float64)


EXTREMES = [(1e-38, 1.0), (1e-300, 1.0), (5e-324, 1.0), (0.5, 1e-38), (1e-38, 1e-38), (1.0, 1e38), (1e-30, 1e300)]


@pytest.mark.parametrize(("temperature", "penalty"), EXTREMES)
def test_extreme_temperatures_and_penalties_choose_as_exact_arithmetic(temperature, penalty):
    logits = spread_logits(8, 20)
    logits[1] = -logits[1].abs() - 1.0  # all seen and negative
    logits[2, 3:6] = logits[2].max() + 1.0  # ties
    logits[3] = -logits[3].abs() - 1.0
    seen = torch.rand(8, 20) < 0.3
    seen[1], seen[:, 7] = True, True
    probabilities = exact_scores(logits, seen, temperature, penalty).softmax(-1)
    for seed in range(5):
        drawn = sample(
            logits, SamplingParams(temperature, repetition_penalty=penalty), seen, torch.Generator().manual_seed(seed)
        )
        assert (probabilities.gather(1, drawn[:, None]) > 1e-6).all()
    greedy = sample(logits, SamplingParams(repetition_penalty=penalty), seen)
    assert torch.equal(greedy, exact_scores(logits, seen, 1.0, penalty).argmax(-1))


@pytest.mark.parametrize(("temperature", "penalty"), [*EXTREMES, (1.0, 1e-300)])
def test_extremes_keep_filters_and_marks_of_unusable_rows(temperature, penalty):
    logits = spread_logits(5, 20)
    logits[0, 3], logits[1, 0], logits[3] = math.nan, math.inf, -math.inf
    seen = torch.rand(5, 20) < 0.3
    for filters in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}):
        drawn = sample(logits, SamplingParams(temperature, **filters, repetition_penalty=penalty), seen)
        assert drawn[[0, 1, 3]].tolist() == [INVALID] * 3
        assert (drawn[[2, 4]] >= 0).all()


def test_a_division_that_overflows_is_marked_before_the_draw():
    drawn = sample(torch.tensor([[3e38, 1.0], [2.0, 1.0]]), SamplingParams(0.5))
    assert drawn[0] == INVALID
    assert drawn[1] >= 0


def test_numbers_may_come_as_numpys_or_as_tensors():
    params = SamplingParams(torch.tensor(0.5), np.int64(3), np.float32(0.5), torch.tensor(0.25), np.float64(1.5))
    assert params == SamplingParams(0.5, 3, 0.5, 0.25, 1.5)
    assert {type(value) for value in astuple(params)} == {int, float}
