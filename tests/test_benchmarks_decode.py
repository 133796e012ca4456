"""Benchmarks of decoding: what generation's providers are held to, and a token's and a sampler's own rows."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch

from benchmarks import generate, harness, models
from benchmarks.harness import Absent, Wrong
from fastgpt import quantize
from fastgpt.layers import Int8Linear


def test_a_sampler_that_does_not_reproduce_is_caught():
    case = generate.BENCHMARKS[0].cases("dry")[0]
    harness.prove(generate.prepare("fastgpt, torch sampler", case))
    model = models.spread_model("dry", torch.float32)
    unseeded = functools.partial(model.generate, **generate.SAMPLED)
    with pytest.raises(Wrong, match="the same seed gave other tokens"):
        harness.prove(generate.candidate(unseeded, model, case, check_tokens=generate.check_drawn(unseeded)))


def test_int8_tokens_are_the_quantized_models():
    """Proven against the quantized model; the tokens of weights rounded to two bits are refused."""
    case = generate.BENCHMARKS[0].cases("dry")[0]
    model = quantize(models.spread_model("dry", torch.float32))
    harness.prove(generate.candidate(model.generate, model, case))
    coarse = copy.deepcopy(model)
    for module in coarse.modules():
        if isinstance(module, Int8Linear):
            module.weight.copy_(module.weight // 64 * 64)
    with pytest.raises(Wrong, match="short of the likeliest"):
        harness.prove(generate.candidate(coarse.generate, model, case))


def test_providers_that_would_take_minutes_are_left_out_with_a_reason():
    cases = [case for case in generate.BENCHMARKS[0].cases("gpu") if case.size["batch"] == 512]
    assert [case.size["model"] for case in cases] == ["gpt2"]
    for name, (most, why) in generate.MOST_ROWS.items():
        assert name in generate.GENERATORS
        assert most < 512
        with pytest.raises(Absent, match=re.escape(why)):
            generate.prepare(name, cases[0])
