"""The decode loop, stopping and streaming. Knows a model by its `config` and its call alone.

Rows of a batch may have prompts of any lengths: each keeps its own length in the KVCache, so a row's result doesn't depend on
its batch mates. A row that has filled the context leaves the cache: GPT-2's learned positions move with every cropped token,
so no cached key stays valid, and "crop" recomputes the last `context_length` tokens for each new one, exactly as the uncached
loop does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.config import ContextLengthError, TokenIdError
from fastgpt.inference.batch import Batch, LanguageModel, Stepper, activation_dtype, evaluating
from fastgpt.inference.sampling import INVALID, Sampler, SamplingParams
from fastgpt.inference.speculation import Lookahead, check_lookup

Prompts: TypeAlias = Sequence[Sequence[int] | Tensor] | Tensor

OVERFLOWS = ("crop", "stop", "error")

# Tokens that an engine makes between two looks of the host at them: a look waits for the GPU, 20 us beside a token's 100 or more.
# A row that stops meanwhile has made up to 15 for nothing.
LOOK_EVERY = 16


class Completion(NamedTuple):
    """One prompt's continuation.

    tokens: new ids, the prompt's not among them, the stop token included.
    finish_reason: "stop" (a stop token), "length" (max_new_tokens), "context" (overflow="stop" and no position was left).
    logprobs: natural log-probability of each token under the model's own distribution, before temperature and filters; None
        unless asked for.
    """

    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None


class Step(NamedTuple):
    """One step of a streamed generation, an entry a prompt; None for a prompt that had finished before."""

    tokens: list[int | None]
    finish_reasons: list[str | None]
    logprobs: list[float | None] | None


def generate(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Iterable[int] = (),
    generator: torch.Generator | None = None,
    overflow: str = "crop",
    use_cache: bool = True,
    lookup: int = 0,
    sampler: str = "torch",
    logprobs: bool = False,
    stream: bool = False,
) -> list[Completion] | Iterator[Step]:
    """Continue prompts of any lengths.

    Args:
        model: a GPTModel, or anything with its `config` and call.
        prompts: sequences of token ids, each with at least one.
        max_new_tokens: tokens to add to each prompt, at most.
        temperature, top_k, top_p, min_p, repetition_penalty: see fastgpt.inference.sampling.SamplingParams.
        stop_tokens: ids that end a row; the id that ended it is kept.
        generator: of the random draws; None is torch's global one. One draw a step for the whole batch; one a call if "fused".
        overflow: past the context length, "crop" goes on with the last context_length tokens, recomputed for each new one;
            "stop" ends the row when prompt and completion fill the context; "error" raises ContextLengthError before computing.
        use_cache: False recomputes everything for each token; the tokens are the same.
        lookup: guess up to so many tokens from a row's own text, and judge them in one forward; see .speculation.
        sampler: "torch" draws as transformers does; "fused" in Triton on the GPU, each token by seed, row and position alone.
        logprobs: also report each token's log-probability.
        stream: return an iterator of Steps instead; the work happens as it is consumed.

    Returns:
        A Completion a prompt, in order; or the iterator.

    Raises:
        ValueError: before anything is computed, for an empty or over-long prompt, ids outside the vocabulary (TokenIdError) or
            bad parameters; while computing, for logits that are NaN or Inf.

    The model's training mode is restored afterwards.
    """
    request = _Request(
        model,
        [_ids(prompt) for prompt in prompts],
        max_new_tokens,
        SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty),
        frozenset(stop_tokens),
        generator,
        overflow,
        use_cache,
        lookup,
        sampler,
        logprobs,
    )
    request.check()
    return _run(request, look_always=True) if stream else _collect(request)


def generate_tensor(model: LanguageModel, idx: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
    """`generate` for same-length prompts idx [B, T]; int64 [B, T + n] on idx's device. See GPTModel.generate."""
    if idx.dim() != 2 or idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"idx must be int32 or int64 [B, T], got {idx.dtype} {list(idx.shape)}")
    done = generate(model, idx, max_new_tokens, **options)
    assert isinstance(done, list)
    longest = max((len(completion.tokens) for completion in done), default=0)
    added = [c.tokens + [c.tokens[-1] if c.tokens else 0] * (longest - len(c.tokens)) for c in done]
    new = torch.tensor(added, dtype=torch.int64, device=idx.device).view(idx.shape[0], longest)
    return torch.cat((idx.long(), new), dim=1)


class _Request(NamedTuple):
    model: LanguageModel
    prompts: list[list[int]]
    max_new_tokens: int
    params: SamplingParams
    stop_tokens: frozenset[int]
    generator: torch.Generator | None
    overflow: str
    use_cache: bool
    lookup: int
    sampler: str
    logprobs: bool

    def batch(self) -> Batch:
        return Batch(self.model, self.prompts, self.max_new_tokens, self.use_cache)

    def check(self) -> None:
        config = self.model.config
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be a whole number of at least 0, got {self.max_new_tokens!r}")
        if self.overflow not in OVERFLOWS:
            raise ValueError(f"overflow must be one of {OVERFLOWS}, got {self.overflow!r}")
        if self.use_cache and not config.causal:
            raise ValueError("a model with causal=False can't generate with a KV cache; pass use_cache=False")
        check_lookup(self.lookup, self.params, self.use_cache)
        device = next(iter(self.model.parameters())).device
        ops.sampler_kernels(self.sampler, device, activation_dtype(self.model, device))
        for row, prompt in enumerate(self.prompts):
            if not prompt:
                raise ValueError(f"prompt {row} is empty; a prompt needs at least one token")
            for token in (min(prompt), max(prompt)):
                if not 0 <= token < config.vocab_size:
                    raise TokenIdError(
                        f"prompt {row} has token id {token}, outside the vocabulary of {config.vocab_size}"
                    )
            longest = len(prompt) + (self.max_new_tokens if self.overflow == "error" else 0)
            if self.overflow != "crop" and longest > config.context_length:
                what = f"{len(prompt)} tokens" + (
                    f" and {self.max_new_tokens} to come" if self.overflow == "error" else ""
                )
                raise ContextLengthError(
                    f"prompt {row} has {what}, more than the context length {config.context_length}; "
                    "shorten it, or use overflow='crop'"
                )
        for token in self.stop_tokens:
            if isinstance(token, bool) or not isinstance(token, int):
                raise ValueError(f"stop_tokens must be token ids, got {token!r}")


def _collect(request: _Request) -> list[Completion]:
    tokens: list[list[int]] = [[] for _ in request.prompts]
    logprobs: list[list[float]] = [[] for _ in request.prompts]
    reasons = ["length"] * len(request.prompts)
    for step in _run(request):
        for row, (token, reason) in enumerate(zip(step.tokens, step.finish_reasons, strict=True)):
            if token is not None:
                tokens[row].append(token)
                if step.logprobs is not None:
                    logprobs[row].append(step.logprobs[row] or 0.0)
            if reason is not None:
                reasons[row] = reason
    return [
        Completion(new, reason, scores if request.logprobs else None)
        for new, reason, scores in zip(tokens, reasons, logprobs, strict=True)
    ]


def _run(request: _Request, look_always: bool = False) -> Iterator[Step]:
    model, params = request.model, request.params
    if not request.prompts or request.max_new_tokens == 0:
        return
    batch = request.batch()
    B = len(batch.rows)
    active = list(range(B))
    if request.overflow == "stop":
        full = [row for row in active if len(batch.rows[row]) >= batch.context]
        if full:
            yield Step(
                [None] * B,
                ["context" if row in full else None for row in range(B)],
                [None] * B if request.logprobs else None,
            )
        active = [row for row in active if row not in full]
    greedy = params.temperature == 0.0
    kernels = ops.sampler_kernels(request.sampler, batch.device, batch.dtype, greedy)
    # A draw of torch's behind the end of a row would leave the generator further on than a loop that looks at every token.
    burst = 1 if look_always or (kernels is None and request.stop_tokens and not greedy) else LOOK_EVERY
    vocab_size, stops = model.config.vocab_size, request.stop_tokens
    sampler = Sampler(params, batch.rows, vocab_size, batch.device, request.generator, kernels, stops, burst)
    stepper = Stepper(batch, sampler, request.logprobs, burst, ahead=not look_always)
    lookahead = Lookahead(request.batch(), active, request) if request.lookup else None
    count = 0
    try:
        while active and count < request.max_new_tokens:
            with evaluating(model), torch.no_grad():
                if lookahead is not None:
                    tokens, logprobs = lookahead.steps(active)
                else:
                    tokens, logprobs = stepper.steps(active, request.max_new_tokens - count)
            for new, picked in zip(tokens, logprobs, strict=True):
                count += 1
                reasons = _append(batch, active, new, count, request)
                yield Step(
                    [new[row] if row in active else None for row in range(B)],
                    reasons,
                    None if picked is None else [picked[row] if row in active else None for row in range(B)],
                )
                active = [row for row in active if reasons[row] is None]
                if not active:
                    return
    finally:
        (batch if lookahead is None else lookahead.batch).close()


def _append(batch: Batch, active: list[int], new: list[int], count: int, request: _Request) -> list[str | None]:
    """Give each active row its count-th token; returns why rows end with it."""
    reasons: list[str | None] = [None] * len(batch.rows)
    for row in active:
        if new[row] == INVALID:
            raise ValueError(
                f"the logits of row {row} are NaN or Inf after {len(batch.rows[row])} tokens; "
                "the weights are broken, or the dtype overflows"
            )
        batch.rows[row].append(new[row])
        if new[row] in request.stop_tokens:
            reasons[row] = "stop"
        elif count == request.max_new_tokens:
            reasons[row] = "length"
        elif request.overflow == "stop" and len(batch.rows[row]) >= batch.context:
            reasons[row] = "context"
    return reasons


def _ids(prompt: Sequence[int] | Tensor) -> list[int]:
    if isinstance(prompt, Tensor):
        if prompt.dim() != 1 or prompt.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"a prompt must be int32 or int64 [T], got {prompt.dtype} {list(prompt.shape)}")
        return prompt.tolist()
    if isinstance(prompt, (str, bytes)):
        raise ValueError(
            f"a prompt must be token ids, got {type(prompt).__name__}; encode text with fastgpt.text.tokenizer first"
        )
    return [int(token) for token in prompt]
