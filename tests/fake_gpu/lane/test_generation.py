"""Generation of every kind: the host looks once in 16 tokens, and uploads the prompt alone."""

from __future__ import annotations

import pytest
import torch
from fake_gpu.budgets import GENERATION
from fake_gpu.device import h100
from fake_gpu.scenario import ids, model
from fake_gpu.trace import watching

from fastgpt import generate, quantize, use_backend

RAGGED = [[5, 6, 7], [9], [1, 2, 3, 4]]
SAMPLED = {"temperature": 0.8, "top_k": 50}

# kind, prompts, tokens, options
CALLS = {
    "greedy": ("greedy", [[1] * 300], 40, {}),
    "greedy with stop tokens": ("greedy, stop tokens", [[1] * 30], 40, {"stop_tokens": [7]}),
    "greedy, ragged": ("greedy", RAGGED, 33, {}),
    "greedy, 9 rows": ("greedy", [[1]] * 9, 33, {}),
    "fused": ("fused sampling", RAGGED, 33, {**SAMPLED, "sampler": "fused", "repetition_penalty": 1.2}),
    "fused with stop tokens": ("fused sampling", [[1]], 33, {**SAMPLED, "sampler": "fused", "stop_tokens": [7]}),
    "torch": ("torch's sampler", [[1] * 30], 33, SAMPLED),
    "torch, all filters": (
        "torch's sampler, penalty",
        [[1] * 30] * 3,
        33,
        {**SAMPLED, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2},
    ),
    "torch, 9 rows": ("torch's sampler", [[1]] * 9, 33, SAMPLED),
    "torch, stop tokens": ("torch's sampler, stop tokens", [[1] * 30], 33, {**SAMPLED, "stop_tokens": [7]}),
    "logprobs": ("logprobs", RAGGED, 33, {"logprobs": True}),
    "no cache": ("no cache", [[1] * 4], 6, {"use_cache": False}),
    "past the context": ("past the context", [[1] * 1020], 12, {}),
    "lookup": ("prompt lookup", [[1, 2, 3, 1, 2, 3, 1, 2]], 20, {"lookup": 4}),
    "prefill in chunks": ("greedy", [[1] * 900] * 64, 17, {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call(name):
    kind, prompts, count, options = CALLS[name]
    with h100():
        net = model()
        with watching() as seen:
            done = generate(net, prompts, count, **options)
        assert [len(completion.tokens) for completion in done] == [count] * len(prompts)
        GENERATION[kind].check(seen, count)


def test_a_second_call_captures_nothing_new():
    with h100():
        net = model()
        generate(net, [[1, 2]], 20)
        with watching() as seen:
            generate(net, [[3, 4, 5]], 20)
        assert seen.captures == 0
        assert seen.replays == 19


@pytest.mark.parametrize("B", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 64])
def test_an_engine_of_any_batch_makes_the_tokens(B):
    with h100():
        net = model()
        with watching() as seen:
            generate(net, [[1, 2]] * B, 18)
        assert seen.replays >= 17
        GENERATION["greedy"].check(seen, 18)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(dtype):
    with h100():
        net = model(getattr(torch, dtype))
        with watching() as seen:
            generate(net, [[1, 2]], 18)
        GENERATION["greedy"].check(seen, 18)


@pytest.mark.parametrize(("dtype", "backend"), [("bfloat16", "reference"), ("float64", "auto")])
def test_without_kernels_too_the_host_stays_out(dtype, backend):
    """The engine's token is torch's own ops then, and a graph holds them."""
    with h100(), use_backend(backend):
        net = model(getattr(torch, dtype))
        with watching() as seen:
            generate(net, [[1, 2, 3]], 18)
        assert not seen.kernels
        GENERATION["greedy"].check(seen, 18)


def test_under_autocast_the_modules_make_the_tokens():
    with h100():
        net = model(torch.float32)
        with watching() as seen, torch.autocast("cuda", torch.bfloat16):
            generate(net, [[1, 2, 3], [4]], 33)
        GENERATION["modules"].check(seen, 33)


def test_int8_weights():
    with h100():
        net = quantize(model())
        with watching() as seen:
            generate(net, [[1, 2, 3]], 20)
        GENERATION["greedy"].check(seen, 20)
        with watching() as seen:  # more rows than the fused kernels take
            generate(net, [[1]] * 9, 33)
        GENERATION["modules"].check(seen, 33)


def test_a_stream_reads_each_token():
    with h100():
        net = model()
        with watching() as seen:
            steps = sum(1 for _ in generate(net, [[1, 2]], 12, stream=True))
        assert steps == 12
        GENERATION["streamed"].check(seen, 12)


def test_ids_on_the_device_come_back_there():
    with h100():
        net = model()
        with watching() as seen:
            out = net.generate(ids(2, 4), 20)
        assert (out.shape, out.device.type) == ((2, 24), "cuda")
        budget = GENERATION["greedy"]
        budget._replace(reads=budget.reads + 1, pinned=budget.pinned + 1).check(
            seen, 20
        )  # the prompt down, the tokens up
