"""Generation on one page: rows of tokens on the host, and three drivers that make the next ones.

| part | what there is | where |
|---|---|---|
| rows | prompts and new tokens on the host, who is active, why each ended | `Rows` |
| where logits come from | modules with a KV cache, modules without, a decode engine | `batch.Source` |
| who chooses | torch's sampler, the fused one | `sampling.Sampler` |
| when the host looks | `OneAtATime`, an engine running `ahead.Ahead`, prompt lookup's `speculation.Lookup` | `_steps` |

The last are the drivers. `steps(active, left)` of one are the next tokens of the active rows; there are none once the rows, or
their places, are no longer those that it was chosen for. So one is chosen when a call begins, when a row ends or fills the
context, and when a cache has no room, not at each token. While the caller of a stream has control, modules have their own
modes, and a parameter that is replaced meanwhile is seen.

Rows of a batch may have prompts of any lengths: each keeps its own length in the KVCache, so a row's result doesn't depend on its
batch mates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.config import ContextLengthError, TokenIdError
from fastgpt.inference.ahead import Ahead
from fastgpt.inference.batch import LanguageModel, Source, activation_dtype, evaluating
from fastgpt.inference.sampling import GREEDY, INVALID, ByRow, Sampler, SamplingParams
from fastgpt.inference.speculation import Lookup, check_lookup

Prompts: TypeAlias = Sequence[Sequence[int] | Tensor] | Tensor

OVERFLOWS = ("crop", "stop", "error")

# Tokens made between two looks of the host at them: a look waits for the GPU, 20 us beside an engine's token of 100 or more.
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
    request = Request(
        model,
        _prompts(prompts),
        max_new_tokens,
        model.config.context_length,
        SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty),
        frozenset(stop_tokens),
        generator,
        overflow,
        use_cache,
        lookup,
        sampler,
        logprobs,
        evaluate=model if isinstance(model, nn.Module) else None,
    )
    _check(request)
    if stream:
        return request.stream()
    steps = request.steps()
    return [_completion(row, steps, logprobs) for row in range(len(request.prompts))]


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


class Request(NamedTuple):
    """What is to be generated; see `generate`. Nothing is checked here.

    context: tokens that the next one may depend on.
    evaluate: the module that is put in eval mode meanwhile; None leaves modes alone.
    """

    model: LanguageModel
    prompts: list[list[int]]
    max_new_tokens: int
    context: int
    params: SamplingParams = GREEDY
    stop_tokens: frozenset[int] = frozenset()
    generator: torch.Generator | None = None
    overflow: str = "crop"
    use_cache: bool = True
    lookup: int = 0
    sampler: str = "torch"
    logprobs: bool = False
    evaluate: nn.Module | None = None

    def steps(self) -> list[Step]:
        """All of them, made at once."""
        with self._computing():
            return list(_steps(self, resting=False))

    def stream(self) -> Iterator[Step]:
        """Each made when it is asked for."""
        steps = _steps(self, resting=True)
        with contextlib.closing(steps):
            while True:
                with self._computing():
                    step = next(steps, None)
                if step is None:
                    return
                yield step

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        # Not in the caller's inference mode, whose tensors a stream that is resumed outside couldn't write to.
        modes = contextlib.nullcontext() if self.evaluate is None else evaluating(self.evaluate)
        with modes, torch.inference_mode(False), torch.no_grad():
            yield

    def end(self, token: int, length: int) -> str | None:
        """Why a row ends with a token, its length-th."""
        if token in self.stop_tokens:
            return "stop"
        return "context" if self.overflow == "stop" and length >= self.context else None


class Rows:
    """Prompts and new tokens on the host, who is active, and why each ended."""

    def __init__(self, request: Request) -> None:
        self.tokens = [list(prompt) for prompt in request.prompts]
        self.active = list(range(len(self.tokens))) if request.max_new_tokens else []
        self.count = 0  # of new tokens that active rows have
        self._request = request

    @property
    def left(self) -> int:
        return self._request.max_new_tokens - self.count

    def full(self) -> Step | None:
        """Prompts that end where they begin, if there are any: they fill the context, and that was to be the end."""
        request = self._request
        full = [row for row in self.active if request.overflow == "stop" and len(self.tokens[row]) >= request.context]
        if not full:
            return None
        self.active = [row for row in self.active if row not in full]
        B = len(self.tokens)
        reasons = ["context" if row in full else None for row in range(B)]
        return Step([None] * B, reasons, [None] * B if request.logprobs else None)

    def add(self, new: ByRow[int], logprobs: ByRow[float] | None) -> Step:
        """Give each active row its next token."""
        self.count += 1
        B = len(self.tokens)
        tokens: list[int | None] = [None] * B
        reasons: list[str | None] = [None] * B
        scores: list[float | None] = [None] * B
        for row in self.active:
            if new[row] == INVALID:
                raise ValueError(
                    f"the logits of row {row} are NaN or Inf after {len(self.tokens[row])} tokens; "
                    "the weights are broken, or the dtype overflows"
                )
            self.tokens[row].append(new[row])
            tokens[row], reasons[row] = new[row], self._request.end(new[row], len(self.tokens[row]))
            if reasons[row] != "stop" and not self.left:
                reasons[row] = "length"
            if logprobs is not None:
                scores[row] = logprobs[row]
        if any(reasons):
            self.active = [row for row in self.active if reasons[row] is None]
        return Step(tokens, reasons, None if logprobs is None else scores)


def _check(request: Request) -> None:
    config = request.model.config
    if (
        isinstance(request.max_new_tokens, bool)
        or not isinstance(request.max_new_tokens, int)
        or request.max_new_tokens < 0
    ):
        raise ValueError(f"max_new_tokens must be a whole number of at least 0, got {request.max_new_tokens!r}")
    if request.overflow not in OVERFLOWS:
        raise ValueError(f"overflow must be one of {OVERFLOWS}, got {request.overflow!r}")
    if request.use_cache and not config.causal:
        raise ValueError("a model with causal=False can't generate with a KV cache; pass use_cache=False")
    check_lookup(request.lookup, request.params, request.use_cache)
    _kernels(request, next(iter(request.model.parameters())).device, greedy=False)
    to_come = request.max_new_tokens if request.overflow == "error" else 0
    for row, prompt in enumerate(request.prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty; a prompt needs at least one token")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < config.vocab_size:
                raise TokenIdError(f"prompt {row} has token id {token}, outside the vocabulary of {config.vocab_size}")
        if request.overflow != "crop" and len(prompt) + to_come > config.context_length:
            what = f"{len(prompt)} tokens" + (f" and {to_come} to come" if request.overflow == "error" else "")
            raise ContextLengthError(
                f"prompt {row} has {what}, more than the context length {config.context_length}; "
                "shorten it, or use overflow='crop'"
            )
    for token in request.stop_tokens:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"stop_tokens must be token ids, got {token!r}")


def _prompts(prompts: Prompts) -> list[list[int]]:
    """Lists of ids; a tensor of several prompts is read at once."""
    if isinstance(prompts, Tensor) and prompts.dim() == 2:
        _ids(prompts[:1].flatten())
        return prompts.tolist()
    return [_ids(prompt) for prompt in prompts]


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


def _kernels(request: Request, device: torch.device, greedy: bool) -> ModuleType | None:
    dtype = activation_dtype(request.model, device)
    return ops.sampler_kernels(request.sampler, device, dtype, greedy and request.use_cache)


def _completion(row: int, steps: Sequence[Step], logprobs: bool) -> Completion:
    tokens = [token for step in steps if (token := step.tokens[row]) is not None]
    scores = [score for step in steps if step.logprobs and (score := step.logprobs[row]) is not None]
    reason = next((reason for step in steps if (reason := step.finish_reasons[row])), "length")
    return Completion(tokens, reason, scores if logprobs else None)


class OneAtATime:
    """The driver for all else: logits, then a draw, and again.

    Args:
        source: of the logits.
        sampler: which chooses for all rows.
        logprobs: also tell each token's log-probability.
        burst: tokens of a row between two looks of the host at them, where an engine makes the logits.
        modules_burst: the same where modules do.
    """

    def __init__(self, source: Source, sampler: Sampler, logprobs: bool, burst: int, modules_burst: int) -> None:
        self._source, self._sampler, self._logprobs = source, sampler, logprobs
        self._burst, self._modules_burst = burst, modules_burst

    def steps(self, active: list[int], left: int) -> Sequence[tuple[ByRow[int], ByRow[float] | None]]:
        """The next tokens of the active rows, and their log-probabilities, `left` of each at most, step by step.

        None if another driver is to be chosen. Entries of other rows say nothing.
        """
        source = self._source
        burst = self._modules_burst if source.engine is None else self._burst
        drawn, scores = list[Tensor](), list[Tensor]()
        for _ in range(min(source.reach(active), left, burst)):
            logits = source.logits(self._sampler.newest)
            drawn.append(self._sampler(logits))
            if self._logprobs:
                all_scores = torch.log_softmax(logits.float(), dim=-1)
                scores.append(all_scores.gather(1, drawn[-1].clamp(min=0)[:, None])[:, 0])
        if not drawn:
            return []
        tokens = torch.stack(drawn).tolist()
        return list(zip(tokens, torch.stack(scores).tolist() if scores else [None] * len(tokens), strict=True))


def _steps(request: Request, resting: bool) -> Generator[Step, None, None]:
    """The steps of a generation, whose caller has control between two of them if `resting`."""
    rows = Rows(request)
    if (full := rows.full()) is not None:
        yield full
    if not rows.active:
        return
    tokens = [list(row) for row in rows.tokens] if request.lookup else rows.tokens
    source = Source(request.model, tokens, request.max_new_tokens, request.context, request.use_cache)
    greedy, stops = request.params.temperature == 0.0, request.stop_tokens
    kernels = _kernels(request, source.device, greedy)
    every = 1 if resting else LOOK_EVERY
    vocab_size = request.model.config.vocab_size if request.params.repetition_penalty != 1.0 else 0
    sampler = Sampler(request.params, rows.tokens, vocab_size, source.device, request.generator, kernels, stops, every)
    # A draw of torch's behind the end of a row would leave the generator further on than a loop that looks at every token, and
    # modules take too long for tokens that nobody gets.
    drawn = 1 if kernels is None and stops and not greedy else every
    one = OneAtATime(source, sampler, request.logprobs, drawn, 1 if stops else every)
    ahead = Ahead(source, sampler, every, depth=1 if resting else 2)
    lookup = Lookup(source, rows.active, request) if request.lookup else None

    def choose() -> OneAtATime | Ahead | Lookup:
        if lookup is not None:
            return lookup
        source.arrange(rows.active)
        alone = kernels is not None and not request.logprobs and source.engine is not None and not source.outside
        return ahead if alone else one

    try:
        driver = choose()
        while rows.active:
            made = driver.steps(rows.active, rows.left)
            for new, logprobs in made:
                yield rows.add(new, logprobs)
                if not rows.active:
                    return
            if not made:
                driver = choose()
            elif resting:
                source.look()
    finally:
        source.close()
