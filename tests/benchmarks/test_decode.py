"""Benchmarks of decoding: what generation's providers are held to, and a token's and a sampler's own rows."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re

import pytest
import torch

from benchmarks import sweep
from benchmarks.harness import measure, op
from benchmarks.harness.measure import Absent, Wrong
from benchmarks.models import generate, providers
from benchmarks.ops import decode_token, sampling
from fastgpt import KVCache, quantize
from fastgpt.layers import Int8Linear
from fastgpt_kernels import _launch


def test_a_sampler_that_does_not_reproduce_is_caught():
    case = generate.BENCHMARKS[0].cases("dry")[0]
    measure.prove(generate.prepare("fastgpt, torch sampler", case))
    model = providers.spread_model("dry", torch.float32)
    unseeded = functools.partial(model.generate, **generate.SAMPLED)
    with pytest.raises(Wrong, match="the same seed gave other tokens"):
        measure.prove(generate.candidate(unseeded, model, case, check_tokens=generate.check_drawn(unseeded)))


def test_int8_tokens_are_the_quantized_models():
    """Proven against the quantized model; the tokens of weights rounded to two bits are refused."""
    case = generate.BENCHMARKS[0].cases("dry")[0]
    model = quantize(providers.spread_model("dry", torch.float32))
    measure.prove(generate.candidate(model.generate, model, case))
    coarse = copy.deepcopy(model)
    for module in coarse.modules():
        if isinstance(module, Int8Linear):
            module.weight.copy_(module.weight // 64 * 64)
    with pytest.raises(Wrong, match="short of the likeliest"):
        measure.prove(generate.candidate(coarse.generate, model, case))


def test_what_rounds_by_itself_has_a_slack_of_its_own(monkeypatch):
    """CTranslate2 gets the exact weights, and is judged by the rounded ones with more room than fastgpt has."""
    case = dataclasses.replace(generate.BENCHMARKS[0].cases("dry")[0], dtype="int8")
    given = []

    def peer(model, case):
        given.append(model)
        return generate.on_kernels(model.generate)  # of weights that aren't rounded at all

    monkeypatch.setitem(generate.GENERATORS, generate.CTRANSLATE2, peer)
    measure.prove(generate.prepare(generate.CTRANSLATE2, case))
    assert not any(isinstance(module, Int8Linear) for module in given[0].modules())
    model = quantize(given[0])
    coarse = copy.deepcopy(model)
    for module in coarse.modules():
        if isinstance(module, Int8Linear):
            module.weight.copy_(module.weight // 64 * 64)
    check = functools.partial(providers.check_greedy, slack=generate.ROUNDED_SLACK)
    with pytest.raises(Wrong, match="short of the likeliest"):
        measure.prove(generate.candidate(coarse.generate, model, case, check_tokens=check))


def test_a_cpus_floors_count_the_bytes_of_rounded_weights():
    fp32, bf16, int8, int4 = generate.BENCHMARKS[0].cases("cpu")
    assert [case.dtype for case in (fp32, bf16, int8, int4)] == ["float32", "bfloat16", "int8", "int4"]
    # 124M parameters but the 1024 positions, 32 times; 12 layers' keys and values in fp32 for each token behind the first
    weights, cached = 32 * (124_439_808 - 1024 * 768), 2 * 12 * 768 * 4 * sum(range(65, 96))
    assert fp32.work.read == 4 * weights + cached
    assert int8.work.read == weights + cached
    assert int4.work.read == 0.625 * weights + cached


def test_providers_that_would_take_minutes_are_left_out_with_a_reason():
    cases = [case for case in generate.BENCHMARKS[0].cases("gpu") if case.size["batch"] == 512]
    assert [case.size["model"] for case in cases] == ["gpt2"]
    for name, (most, why) in generate.MOST_ROWS.items():
        assert name in generate.GENERATORS
        assert most < 512
        with pytest.raises(Absent, match=re.escape(why)):
            generate.prepare(name, cases[0])


def single(scale="dry"):
    return decode_token.TOKEN.benchmark.cases(scale)[0]


@pytest.mark.parametrize("name", ["torch", "cuBLAS and SDPA"])
def test_a_tokens_peers_are_right(name):
    measure.prove(decode_token.TOKEN.benchmark.providers[name](single()))


def test_a_plain_token_is_the_models_own():
    """The plain step, its weights those of a float64 model, gives that model's logits behind the same cache."""
    model = providers.build("dry", torch.float64).eval()
    prompt = torch.randint(model.config.vocab_size, (3, 7))
    cache = KVCache(model.config, 3, 8, torch.float64)
    blocks = []
    for block in model.trf_blocks:
        att, (up, _, down) = block.att, block.ff.layers
        qkv = [
            torch.cat(p) for p in zip(*((m.weight, m.bias) for m in (att.W_query, att.W_key, att.W_value)), strict=True)
        ]
        out, up, down = ((m.weight, m.bias) for m in (att.out_proj, up, down))
        blocks += [block.norm1.scale, block.norm1.shift, *qkv, *out, block.norm2.scale, block.norm2.shift, *up, *down]
    with torch.no_grad():
        model(prompt[:, :6], cache=cache)
        positions, final = torch.full((3,), 6, dtype=torch.int32), model.final_norm
        state = cache.keys, cache.values, model.tok_emb.weight, model.pos_emb.weight, final.scale, final.shift
        ours = decode_token.plain(prompt[:, 6], positions, *state, *blocks)
        theirs = model(prompt)[:, 6]
    torch.testing.assert_close(ours, theirs)


def test_work_of_a_token():
    """GPT-2 124M's blocks and head, counted by hand in facts of its architecture: 14.2 MB a block, 77.2 MB of head."""
    first, _, _ = decode_token.TOKEN.benchmark.cases("gpu")
    cache = 2 * 4 * 1024 * 768 * 2
    assert first.work.read == pytest.approx(4 * 14.18e6 + 77.19e6 + cache, rel=1e-3)
    wide = sampling.DRAW.benchmark.cases("gpu")[1]
    assert wide.work.read == 8 * 50257 * 2


def test_draws_that_are_none_are_caught():
    case = dataclasses.replace(sampling.FILTERED.benchmark.cases("dry")[0], size={"B": 64, "V": 500})
    peer = lambda function: sampling.FILTERED.candidate(function, case)  # noqa: E731
    measure.prove(peer(functools.partial(sampling.torch_sampler, **sampling.FILTERED.options)))
    for wrong, match in (
        (lambda logits, *_: logits.argmax(-1), "the most likely ones"),
        (lambda logits, *_: logits.argmin(-1), "the filters drop"),
        (lambda logits, *_: logits.argmax(-1) - 1000, "expected 64 ids under 500"),
    ):
        with pytest.raises(Wrong, match=match):
            peer(wrong)


@pytest.mark.parametrize("name", ["token-rows", "token-project-rows", "sample-list"])
def test_a_constant_of_decoding_reaches_its_kernel(name):
    """A launch is recorded with what the constant says."""
    constant = sweep.constants()[name]
    case = constant.cases("gpu")[0]
    seen = []
    for candidate in constant.candidates[:2]:
        with constant.replaced(candidate), _launch.record(90) as launches:
            op.call_on_meta(constant.op, case)
        seen.append([(launch.grid, launch.kwargs) for launch in launches])
    assert seen[0] != seen[1]
