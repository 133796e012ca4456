"""What one more token costs as the context grows: with the KV cache it reads a longer cache, without it computes everything."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness.measure import OURS, Benchmark, Candidate, Case, Work, device
from benchmarks.harness.op import interpreting
from benchmarks.models.generate import generation_work, weight_bytes
from benchmarks.models.providers import check_greedy, config, on_kernels, spread_model
from benchmarks.models.token import engine
from fastgpt import GPTModel, KVCache
from fastgpt.info import kv_cache_bytes

CONTEXTS = {"gpu": (16, 64, 256, 512, 1000), "cpu": (64, 128, 256, 512, 1000), "dry": (2, 4)}


def cases(scale: str) -> Iterator[Case]:
    model = "dry" if scale == "dry" else "gpt2"
    dtype = torch.bfloat16 if scale == "gpu" else torch.float32
    shape, itemsize = config(model), dtype.itemsize
    position = kv_cache_bytes(shape, itemsize) / shape.context_length
    for context in CONTEXTS[scale]:
        flops = generation_work(shape, 1, 1, 1, itemsize, itemsize).flops
        work = Work(flops, weight_bytes(shape, itemsize) + context * position, position)
        size = {"model": model, "context": context}
        yield Case("next_token", size, "", str(dtype).removeprefix("torch."), work, 1, "tokens", grows="context")


def prepare(step: Callable[[GPTModel, Tensor], Callable[[Tensor], Tensor]], case: Case) -> Candidate:
    """A sample is one new token behind a context that is there already."""
    model = spread_model(case.size["model"], case.torch_dtype)
    context = torch.randint(model.config.vocab_size, (1, case.size["context"]), device=device())
    last = context[:, -1:].clone()
    take = on_kernels(on_kernels(step)(model, context))

    def run() -> Tensor:
        return take(last)

    def refresh() -> None:
        last.copy_(torch.randint(model.config.vocab_size, last.shape))

    def check(token: Tensor) -> None:
        prompt = torch.cat((context[:, :-1], last), dim=1)
        check_greedy(model, prompt, torch.cat((prompt, token), dim=1), 1, case)

    return Candidate(run, check, refresh)


@torch.no_grad()
def cached(model: GPTModel, context: Tensor) -> Callable[[Tensor], Tensor]:
    if device().type == "cuda" or interpreting():
        burst, _ = engine(model, context[:, :-1], 1)
        return lambda last: burst(last[0])[None].to(last.device)
    cache = KVCache(model.config, 1, dtype=model.tok_emb.weight.dtype, device=model.device)
    held = context.shape[1] - 1
    if held:
        model(context[:, :-1], cache)

    @torch.no_grad()
    def next_token(last: Tensor) -> Tensor:
        cache.truncate(held)
        return model(last, cache)[:, -1].argmax(-1, keepdim=True)

    return next_token


def uncached(model: GPTModel, context: Tensor) -> Callable[[Tensor], Tensor]:
    at = torch.tensor([context.shape[1] - 1], device=model.device)

    @torch.no_grad()
    def next_token(last: Tensor) -> Tensor:
        prompt = torch.cat((context[:, :-1], last), dim=1)
        return model(prompt, logits_at=at)[:, -1].argmax(-1, keepdim=True)

    return next_token


PROVIDERS = {OURS: functools.partial(prepare, cached), "fastgpt, no cache": functools.partial(prepare, uncached)}
BENCHMARKS = (Benchmark("next_token", "decode", lambda scale: list(cases(scale)), PROVIDERS, rounds=9),)
