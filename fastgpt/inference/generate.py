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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.inference.ahead import Ahead
from fastgpt.inference.arguments import Options, Prompts, check, prompt_ids, refuse, stop_ids
from fastgpt.inference.batch import LanguageModel, Source, activation_dtype, evaluating
from fastgpt.inference.sampling import GREEDY, INVALID, ByRow, Sampler, SamplingParams, whole_number
from fastgpt.inference.speculation import Lookup
from fastgpt.transfer import uploaded

if TYPE_CHECKING:
    from typing_extensions import Unpack

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


@overload
def generate(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    stream: Literal[False] = False,
    **options: Unpack[Options],
) -> list[Completion]: ...


@overload
def generate(
    model: LanguageModel, prompts: Prompts, max_new_tokens: int, *, stream: Literal[True], **options: Unpack[Options]
) -> Iterator[Step]: ...


@overload
def generate(
    model: LanguageModel, prompts: Prompts, max_new_tokens: int, *, stream: bool, **options: Unpack[Options]
) -> list[Completion] | Iterator[Step]: ...


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
    **unknown: Any,
) -> list[Completion] | Iterator[Step]:
    """Continue prompts of any lengths.

    Args:
        model: a GPTModel, or anything with its `config` and call.
        prompts: sequences of token ids, each with at least one.
        max_new_tokens: tokens to add to each prompt, at most.
        temperature, top_k, top_p, min_p, repetition_penalty: see fastgpt.inference.sampling.SamplingParams. A top_k of 0 is none.
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
        TypeError: for a keyword that there isn't, naming what has its place.

    The model's training mode is restored afterwards.
    """
    refuse(unknown)
    request = Request(
        model,
        prompt_ids(prompts),
        whole_number("max_new_tokens", max_new_tokens, 0),
        model.config.context_length,
        SamplingParams(temperature, None if top_k == 0 else top_k, top_p, min_p, repetition_penalty),
        stop_ids(stop_tokens),
        generator,
        overflow,
        use_cache,
        whole_number("lookup", lookup, 0),
        sampler,
        logprobs,
        evaluate=model if isinstance(model, nn.Module) else None,
    )
    check(request)
    if stream:
        return request.stream()
    steps = request.steps()
    return [_completion(row, steps, logprobs) for row in range(len(request.prompts))]


def generate_tensor(
    model: LanguageModel, idx: Tensor | Sequence[Sequence[int]], max_new_tokens: int, **options: Any
) -> Tensor:
    """`generate` for same-length prompts idx [B, T]; int64 [B, T + n] on idx's device. See GPTModel.generate."""
    if "stream" in options or "logprobs" in options:
        raise TypeError("model.generate() returns ids alone; stream= and logprobs= are fastgpt.generate's")
    if not isinstance(idx, Tensor):
        rows = prompt_ids(idx)
        if len({len(row) for row in rows}) > 1:
            raise ValueError(
                f"idx must have rows of one length, got {[len(row) for row in rows]}; fastgpt.generate takes any"
            )
        idx = torch.tensor(rows, dtype=torch.int64, device=next(iter(model.parameters())).device)
    if idx.dim() != 2 or idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"idx must be int32 or int64 [B, T], got {idx.dtype} {list(idx.shape)}")
    done = generate(model, idx, max_new_tokens, **options)
    longest = max((len(completion.tokens) for completion in done), default=0)
    added = [c.tokens + [c.tokens[-1] if c.tokens else 0] * (longest - len(c.tokens)) for c in done]
    new = uploaded(added, idx.device).view(idx.shape[0], longest)
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

    def kernels(self) -> ModuleType | None:
        """Whose draws there are: the fused sampler's, which a decode engine makes its greedy ones by as well, or torch's."""
        device, greedy = next(iter(self.model.parameters())).device, self.params.temperature == 0.0
        dtype = activation_dtype(self.model, device)
        return ops.sampler_kernels(self.sampler, device, dtype, greedy and self.use_cache)

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
    kernels, stops = request.kernels(), request.stop_tokens
    every = 1 if resting else LOOK_EVERY
    vocab_size = request.model.config.vocab_size if request.params.repetition_penalty != 1.0 else 0
    sampler = Sampler(request.params, rows.tokens, vocab_size, source.device, request.generator, kernels, stops, every)
    # A draw of torch's behind the end of a row would leave the generator further on than a loop that looks at every token, and
    # modules take too long for tokens that nobody gets.
    drawn = 1 if kernels is None and stops and request.params.temperature > 0.0 else every
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
