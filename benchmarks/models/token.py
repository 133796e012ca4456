"""What one token costs at a given context: the decode engine in each of its designs, beside a CUDA graph of cuBLAS and SDPA.

A sample is a burst of tokens of one row, each chosen on the device and read by the next, behind a context that is in the cache
already; the host looks once, at the end. What comes back is checked token by token. The floor reads every weight a token, and
the keys and values of the positions before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness.measure import INT8, OURS, Absent, Benchmark, Candidate, Case, Work, device
from benchmarks.harness.op import interpreting
from benchmarks.models.generate import check_design, weight_bytes
from benchmarks.models.graphed import GraphedLoop
from benchmarks.models.providers import check_greedy, on_kernels, spread_model
from benchmarks.models.providers import config as shape
from fastgpt import GPTModel, ops
from fastgpt.inference import engine as engines
from fastgpt.inference.batch import prefill
from fastgpt.inference.sampling import Sampler, SamplingParams
from fastgpt.info import forward_flops_per_token, kv_cache_bytes
from fastgpt.quantization import quantize

Burst = Callable[[Tensor], Tensor]  # the newest token [1] -> the tokens behind it [TOKENS]

TOKENS = {"gpu": 64, "dry": 2}
MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
SIZES = {
    "gpu": [(model, context) for model in MODELS for context in (0, 256, 1024 - TOKENS["gpu"])],
    "cpu": [],  # the engine is a GPU's
    "dry": [("dry", 3)],
}


def cases(scale: str) -> Iterator[Case]:
    for model, context in SIZES[scale]:
        tokens, config = TOKENS[scale], shape(model)
        dtype = torch.bfloat16 if scale == "gpu" else torch.float32
        position = kv_cache_bytes(config, dtype.itemsize) / config.context_length
        cached = position * sum(context + 1 + i for i in range(tokens))
        read = tokens * weight_bytes(config, dtype.itemsize) + cached
        work = Work(tokens * forward_flops_per_token(config), read, tokens * position)
        size = {"model": model, "context": context, "tokens": tokens}
        yield Case("token", size, "", str(dtype).removeprefix("torch."), work, tokens, "tokens")


def prepare(make: Callable[[GPTModel, Tensor, int], tuple[Burst, GPTModel]], case: Case) -> Candidate:
    if device().type != "cuda" and not interpreting():
        raise Absent("the engine is a GPU's")
    model = spread_model(case.size["model"], case.torch_dtype)
    context = torch.randint(model.config.vocab_size, (1, case.size["context"]), device=device())
    newest = torch.zeros(1, dtype=torch.int64, device=device())
    burst, judge = on_kernels(make)(model, context, case.size["tokens"])

    def refresh() -> None:
        newest.copy_(torch.randint(model.config.vocab_size, newest.shape))

    def check(tokens: Tensor) -> None:
        prompt = torch.cat((context, newest[None]), dim=1)
        check_greedy(judge, prompt, torch.cat((prompt, tokens[None].to(prompt)), dim=1), case.size["tokens"], case)

    return Candidate(functools.partial(on_kernels(burst), newest), check, refresh)


@torch.no_grad()
def engine(model: GPTModel, context: Tensor, tokens: int, design: str | None = None) -> tuple[Burst, GPTModel]:
    """As `generate` runs it, without its bookkeeping."""
    held = context.shape[1]
    made = model.decode_engine(1, held + tokens, design)
    if isinstance(made, str):
        raise Absent(made)
    if held:
        prefill(model, made.cache, context.tolist())
    kernels = ops.sampler_kernels("fused", made.device, made.logits.dtype)
    sampler = Sampler(SamplingParams(), [[0]], model.config.vocab_size, made.device, None, kernels, kept=tokens)
    loop = made.loop(sampler, [0])

    @torch.no_grad()
    def burst(newest: Tensor) -> Tensor:
        made.cache.truncate(held)
        made.begin()
        made.tokens.copy_(newest)
        return torch.tensor(made.run(loop, sampler, tokens).tokens())[:, 0]

    return burst, model


def of_design(name: str) -> Callable[[GPTModel, Tensor, int], tuple[Burst, GPTModel]]:
    """The engine in one of its designs."""

    def make(model: GPTModel, context: Tensor, tokens: int) -> tuple[Burst, GPTModel]:
        check_design(name)
        return engine(model, context, tokens, name)

    return make


def int8(model: GPTModel, context: Tensor, tokens: int) -> tuple[Burst, GPTModel]:
    return engine(quantize(model), context, tokens)


@torch.no_grad()
def graphed(model: GPTModel, context: Tensor, tokens: int) -> tuple[Burst, GPTModel]:
    loop, held = GraphedLoop(model, 1), context.shape[1]
    if held:
        loop.generate(context, 1)
    replay = loop.capture()

    @torch.no_grad()
    def burst(newest: Tensor) -> Tensor:
        loop.token.copy_(newest[None])
        loop.position.fill_(held)
        made = []
        for _ in range(tokens):
            replay()
            made.append(loop.token.clone())
        return torch.cat(made, dim=1)[0]

    return burst, model


PROVIDERS = {
    OURS: functools.partial(prepare, engine),
    **{f"fastgpt, design {name}": functools.partial(prepare, of_design(name)) for name in engines.DESIGNS},
    INT8: functools.partial(prepare, int8),
    "cuBLAS and SDPA in a CUDA graph": functools.partial(prepare, graphed),
}
BENCHMARKS = (Benchmark("token", "decode", lambda scale: list(cases(scale)), PROVIDERS),)
