"""Greedy generation with the same weights and prompts: fastgpt beside the reference, transformers, llms_from_scratch, nanoGPT.

A sample is one call of a provider's `generate`, on a prompt that no sample before it had; tokens are counted from the ids that
came back, and what came back is checked token by token against the reference model. The floor reads every weight that a token
needs once a token, and the keys and values of the positions before it. Providers without a cache generate fewer tokens, which
flatters them: their cost grows.

`prefill` is the same with one new token: the time to the first. A row of `generate` less the row of `prefill` with the same
prompt, over the tokens between, is the time of a token.

On a CPU int8 and int4 are tables of their own: fp32 models with rounded weights, beside CTranslate2's int8, which rounds what is
multiplied with them to 8 bits too and is held to a wider slack.

Besides greedy generation there is sampling at SAMPLED, from the same seed in each call: another call must give the same tokens.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness.measure import (
    INT8,
    OURS,
    Absent,
    Benchmark,
    Candidate,
    Case,
    Work,
    Wrong,
    device,
    needs_cuda,
)
from benchmarks.harness.op import interpreting
from benchmarks.models.graphed import GraphedLoop
from benchmarks.models.nanogpt import from_fastgpt
from benchmarks.models.providers import (
    book_model,
    check_greedy,
    config,
    on_kernels,
    on_reference,
    spread_model,
    transformers_model,
)
from benchmarks.models.translated import ctranslate2_generate
from fastgpt import GPTConfig, GPTModel, ops
from fastgpt.inference import engine as engines
from fastgpt.info import kv_cache_bytes
from fastgpt.layers import ROUNDED
from fastgpt.quantization import quantize

Generate = Callable[[Tensor, int], Tensor]

# (model, batch, prompt, new tokens). The longest first: it is what the others are a part of.
SIZES = {
    "gpu": [
        *(("gpt2", 1, prompt, 24) for prompt in (1000, 256, 16)),
        *(("gpt2", batch, 256, 24) for batch in (8, 32, 128, 512)),
        *((name, 1, 256, 24) for name in ("gpt2-medium", "gpt2-large", "gpt2-xl")),
        *((name, 1, prompt, 24) for name in ("gpt2-medium", "gpt2-large", "gpt2-xl") for prompt in (16, 1000)),
        *((name, batch, 256, 24) for name in ("gpt2-medium", "gpt2-xl") for batch in (8, 32)),
    ],
    "cpu": [("gpt2", 1, 64, 32)],
    "dry": [("dry", 2, 5, 2)],
}
PREFILL_SIZES = {
    **SIZES,
    "cpu": [("gpt2", 1, prompt, 1) for prompt in (64, 256)],
}
# Of the weights, with their bytes: an int4 weight has a 16th of a step and a middle of 16 bits.
DTYPES = {"gpu": ("bfloat16",), "cpu": ("float32", "bfloat16", "int8", "int4"), "dry": ("float32",)}
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.625}
UNCACHED = ("fastgpt, no cache", "llms_from_scratch", "nanoGPT")
UNCACHED_TOKENS = 8
SAMPLED = {"temperature": 0.8, "top_k": 50}
CTRANSLATE2 = "CTranslate2"
# What a CPU's tables besides the one in fp32 have.
ON_A_CPU = {"bfloat16": (OURS, "transformers"), "int8": (OURS, CTRANSLATE2), "int4": (OURS,)}
# How far from the likeliest token what rounds activations to 8 bits may go, in standard deviations of the logits.
ROUNDED_SLACK = 0.5
DRAWN = ("fastgpt, fused sampler", "fastgpt, torch sampler")

# Providers that would hold up a stage for minutes, or have nothing to show there: the most rows that they get, and why.
MOST_ROWS = {
    **dict.fromkeys(UNCACHED, (8, "it computes every position again for each token: minutes at that many rows")),
    INT8: (8, "int8 weights are read as such for up to 8 rows"),
    "fastgpt, prompt lookup": (32, "guesses pay while weights, not products, are what a forward waits for"),
}


def weight_bytes(config: GPTConfig, itemsize: float) -> float:
    """What a token must read of the parameters: all but the position table, the head tied or not."""
    counts = config.parameter_counts()
    untied = 0 if config.tie_weights else counts["token embedding"]
    return itemsize * (config.num_parameters - counts["position embedding"] - untied)


def generation_work(config: GPTConfig, batch: int, prompt: int, new: int, itemsize: float, kept: int) -> Work:
    """`new` forward passes, the first over the prompt. A cached token reads the weights, and all keys and values so far.

    Bytes: `itemsize` a weight, `kept` an element of the cache.

    Products are counted as they are needed: attention causal, the head for the tokens that are chosen.
    """
    position = kv_cache_bytes(config, kept) / config.context_length
    cached = batch * position * sum(prompt + i for i in range(1, new))
    C, L, positions = config.emb_dim, config.n_layers, prompt + new - 1
    matrices = L * (4 * C * C + 2 * C * config.hidden_dim) * positions + config.padded_vocab_size * C * new
    flops = batch * 2.0 * (matrices + L * C * positions * (positions + 1))
    return Work(flops, new * weight_bytes(config, itemsize) + cached, batch * position * positions)


def cases(benchmark: str, scale: str) -> Iterator[Case]:
    first_token = benchmark == "prefill"
    sizes, dtypes = (PREFILL_SIZES, DTYPES[scale][:1]) if first_token else (SIZES, DTYPES[scale])
    for dtype, (model, batch, prompt, new) in itertools.product(dtypes, sizes[scale]):
        new = 1 if first_token else new
        work = generation_work(config(model), batch, prompt, new, BYTES[dtype], 2 if scale == "gpu" else 4)
        size = {"model": model, "batch": batch, "prompt": prompt, "new": new}
        yield Case(benchmark, size, "", dtype, work, batch * new, "tokens")


def prepare(name: str, case: Case) -> Candidate:
    most, why = MOST_ROWS.get(name, (case.size["batch"], ""))
    if case.size["batch"] > most:
        raise Absent(why)
    if device().type == "cpu" and not interpreting():
        if name not in ON_A_CPU.get(case.dtype, (name,)):
            raise Absent("compared in fp32: two tables of everything would take a CPU too long")
        if name == INT8:
            raise Absent("on a CPU int8 has a table of its own")
    rounded = "int8" if name == INT8 else case.dtype if case.dtype in ROUNDED else None
    exact = spread_model(case.size["model"], torch.float32 if case.dtype in ROUNDED else case.torch_dtype)
    model = exact if rounded is None else quantize(exact, rounded)  # the one whose tokens they must be
    check: Callable[..., None] = check_greedy
    if rounded and name == CTRANSLATE2:
        check = functools.partial(check_greedy, slack=ROUNDED_SLACK)
    generate = GENERATORS[name](exact if name == CTRANSLATE2 else model, case)  # that rounds by itself
    return candidate(generate, model, case, name in UNCACHED, check_drawn(generate) if name in DRAWN else check)


def check_drawn(generate: Generate) -> Callable[..., None]:
    """That another call with the same seed gives the same ids, the prompt first."""

    def check(model: GPTModel, prompt: Tensor, out: Tensor, new_tokens: int, case: Case) -> None:
        if not torch.equal(out[:, : prompt.shape[1]], prompt):
            raise Wrong("the prompt didn't come back")
        if not torch.equal(generate(prompt, new_tokens), out):
            raise Wrong("the same seed gave other tokens")

    return check


def candidate(
    generate: Generate,
    model: GPTModel,
    case: Case,
    slow: bool = False,
    check_tokens: Callable[..., None] = check_greedy,
) -> Candidate:
    """One call of `generate` a sample, with a new prompt each time."""
    batch, prompt, new = (case.size[name] for name in ("batch", "prompt", "new"))
    new = min(new, UNCACHED_TOKENS) if slow else new
    draw = torch.Generator().manual_seed(1)
    seen: list[tuple[Tensor, Tensor]] = []
    notes = {"new_tokens": new, "units": batch * new}

    def run() -> Tensor:
        idx = torch.randint(model.config.vocab_size, (batch, prompt), generator=draw).to(device())
        out = generate(idx, new)
        seen.append((idx, out))
        return out

    def check(out: Tensor) -> None:
        counted = {ids.shape[1] - prompt for _, ids in seen}
        if counted != {new}:
            raise Wrong(f"{sorted(counted)} new tokens came back, {new} were asked for")
        check_tokens(model, *seen[-1], new, case)
        seen[:] = seen[-1:]

    return Candidate(run, check, notes=notes)


def check_design(name: str) -> None:
    """Absent unless it is another design of the engine's (fastgpt.inference.engine.DESIGNS) than the one in use here."""
    if device().type != "cuda" and not interpreting():
        raise Absent("the engine's designs are a GPU's")
    dependent = not interpreting() and ops.dependent_launches(device())
    if name == ("dependent" if dependent else "plain"):
        raise Absent("it is what fastgpt runs")
    if name != "plain" and not dependent:
        raise Absent("dependent launch came with compute capability 9.0, and Triton's interpreter has none")


def of_design(name: str) -> Callable[[GPTModel, Case], Generate]:
    """`generate` on an engine of one design."""

    def make(model: GPTModel, case: Case) -> Generate:
        check_design(name)
        copied = copy.deepcopy(model)
        copied.decode_engine = functools.partial(copied.decode_engine, design=name)
        return on_kernels(copied.generate)

    return make


def drawing(sampler: str) -> Callable[[GPTModel, Case], Generate]:
    def make(model: GPTModel, case: Case) -> Generate:
        if sampler == "fused" and device().type != "cuda" and not interpreting():
            raise Absent("the fused sampler is a GPU's")
        # In a dry run torch's draws behind plain PyTorch: the kernels before them are interpreted for the fused ones already.
        run = on_reference if sampler == "torch" and interpreting() else on_kernels

        def generate(idx: Tensor, n: int) -> Tensor:
            seeded = torch.Generator(device=device()).manual_seed(7)
            return run(model.generate)(idx, n, sampler=sampler, generator=seeded, **SAMPLED)

        return generate

    return make


def transformers_eager(model: GPTModel, case: Case, **settings) -> Generate:
    peer = transformers_model(model)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings}
    return lambda idx, n: peer.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, **options)


def transformers_static(model: GPTModel, case: Case) -> Generate:
    """Its static cache, whose forward transformers compiles by itself."""
    needs_cuda("a static cache under torch.compile")
    if (case.benchmark, case.size["model"], case.size["batch"]) != ("generate", "gpt2", 1):
        raise Absent("compiled for the smallest model at batch 1 alone: every case takes it a minute")
    return transformers_eager(model, case, cache_implementation="static")


def graphed(model: GPTModel, case: Case) -> Generate:
    if device().type != "cuda" and not interpreting():
        raise Absent("CUDA graphs are a GPU's")
    return GraphedLoop(model, case.size["batch"]).generate


def book(model: GPTModel, case: Case) -> Generate:
    peer = book_model(model, "ch04")
    from llms_from_scratch.ch04 import generate_text_simple

    return lambda idx, n: generate_text_simple(peer, idx, n, model.config.context_length)


def book_cached(model: GPTModel, case: Case) -> Generate:
    """Its model with a cache; the loop is ours, since the package's own asks for attributes that this model hasn't."""
    peer = book_model(model, "kv_cache.gpt2")
    from llms_from_scratch.kv_cache.utils import KVCache

    @torch.no_grad()
    def generate(idx: Tensor, n: int) -> Tensor:
        cache, peer.current_pos, new = KVCache(model.config.n_layers), 0, idx
        for _ in range(n):
            new = peer(new, use_cache=True, cache=cache)[:, -1:].argmax(-1)
            idx = torch.cat((idx, new), dim=1)
        return idx

    try:
        generate(torch.zeros(1, 4, dtype=torch.long, device=device()), 2)
    except RuntimeError as error:
        raise Absent(f"its own code fails at the second token: {error}") from error
    return generate


def nano(model: GPTModel, case: Case) -> Generate:
    peer = from_fastgpt(model).eval()

    @torch.no_grad()
    def generate(idx: Tensor, n: int) -> Tensor:
        for _ in range(n):
            logits = peer(idx[:, -model.config.context_length :])
            idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
        return idx

    return generate


def reference_cached(model: GPTModel, case: Case) -> Generate:
    if device().type != "cuda" and not interpreting():
        raise Absent("it is what fastgpt runs on a CPU")
    return on_reference(model.generate)


def reference_compiled(model: GPTModel, case: Case) -> Generate:
    """One compiled forward for every length, without a cache."""
    needs_cuda("torch.compile of a model")
    if (case.benchmark, case.size["model"], case.size["batch"]) != ("generate", "gpt2", 1):
        raise Absent("compiled for the smallest model at batch 1 alone: every case takes it a minute")
    next_token = torch.compile(lambda idx: model(idx)[:, -1:].argmax(-1), dynamic=True)

    @torch.no_grad()
    def generate(idx: Tensor, n: int) -> Tensor:
        for _ in range(n):
            idx = torch.cat((idx, next_token(idx[:, -model.config.context_length :])), dim=1)
        return idx

    return on_reference(generate)


GENERATORS: dict[str, Callable[[GPTModel, Case], Generate]] = {
    OURS: lambda model, case: on_kernels(model.generate),
    "fastgpt, no cache": lambda model, case: on_kernels(functools.partial(model.generate, use_cache=False)),
    **{f"fastgpt, design {name}": of_design(name) for name in engines.DESIGNS},
    INT8: lambda model, case: on_kernels(model.generate),
    "fastgpt, prompt lookup": lambda model, case: on_kernels(functools.partial(model.generate, lookup=8)),
    **{name: drawing(name.removeprefix("fastgpt, ").removesuffix(" sampler")) for name in DRAWN},
    "reference": reference_cached,
    "reference, no cache, compiled": reference_compiled,
    "transformers": transformers_eager,
    "transformers, static cache, compiled": transformers_static,
    "cuBLAS and SDPA in a CUDA graph": graphed,
    CTRANSLATE2: ctranslate2_generate,
    "llms_from_scratch": book,
    "llms_from_scratch, KV cache": book_cached,
    "nanoGPT": nano,
}
PROVIDERS = {name: functools.partial(prepare, name) for name in GENERATORS}
# What begins with the second token, or isn't part of the first one's time, is left out of `prefill`.
FIRST_TOKEN = {name: make for name, make in PROVIDERS.items() if name not in (*DRAWN, "fastgpt, prompt lookup")}
BENCHMARKS = (
    Benchmark("generate", "decode", lambda scale: list(cases("generate", scale)), PROVIDERS),
    Benchmark("prefill", "decode", lambda scale: list(cases("prefill", scale)), FIRST_TOKEN),
)
