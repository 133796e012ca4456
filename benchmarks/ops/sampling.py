"""The choice of the next token from logits. Bound by memory: the logits once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.harness.measure import Work, Wrong
from benchmarks.harness.op import Draw, Op
from fastgpt.inference.sampling import SamplingParams, filtered, sample

SIZES = {
    "gpu": [{"B": B, "V": 50257} for B in (1, 8, 128)],
    "cpu": [],  # a CPU runs fastgpt.inference.sampling.sample, which is the peer
    "dry": [{"B": 2, "V": 70}],
}
MANY = 8  # draws of which one at least is not the most likely token


def work(s, b):
    return Work(0.0, s["B"] * s["V"] * b, 8 * s["B"])


def inputs(size, draw: Draw) -> tuple[Tensor, ...]:
    positions = draw.ids(1024, size["B"]).to(torch.int32)
    return draw.normal(size["B"], size["V"], std=2.0), draw.ids(2**31, 1), positions


def torch_sampler(logits: Tensor, seed: Tensor, positions: Tensor, **options) -> Tensor:
    """With torch's own draws."""
    return sample(logits, SamplingParams(**options))


def kernels(logits: Tensor, seed: Tensor, positions: Tensor, **options) -> Tensor:
    from fastgpt_kernels.sampling import sample_tokens

    return sample_tokens(logits, seed, positions, **options)


def check_tokens(inputs: Sequence[Tensor], outputs: Sequence[Tensor], **options) -> None:
    """That each row's token is one that the filters keep, and of many not all the most likely ones."""
    logits, (tokens,) = inputs[0].float(), outputs
    B, V = logits.shape
    if tokens.shape != (B,) or tokens.dtype != torch.int64 or not bool(((tokens >= 0) & (tokens < V)).all()):
        raise Wrong(f"expected {B} ids under {V}, got {tokens.tolist()[:8]} of shape {tuple(tokens.shape)}")
    kept = filtered(logits / options["temperature"], SamplingParams(**options))
    if not bool(kept.gather(1, tokens[:, None]).isfinite().all()):
        raise Wrong("a token that the filters drop was drawn")
    if B >= MANY and torch.equal(tokens, logits.argmax(-1)):
        raise Wrong(f"all {B} tokens are the most likely ones, which a draw is not")


def _op(**options) -> Op:
    check: Callable[..., None] = functools.partial(check_tokens, **options)
    return Op(
        "sample_tokens", inputs, {"forward": work}, SIZES, options=options, shown=tuple(options),
        direct=kernels, plain=torch_sampler, check=check,
    )  # fmt: skip


DRAW = _op(temperature=0.8)
FILTERED = _op(temperature=0.8, top_k=50)
OPS = (DRAW, FILTERED)
