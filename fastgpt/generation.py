"""Prefill, the decode loop, stopping and streaming. Knows a model by its `config` and its call alone.

Rows of a batch may have prompts of any lengths: each keeps its own length in the KVCache, so a row's result doesn't depend on
its batch mates. A row that has filled the context leaves the cache: GPT-2's learned positions move with every cropped token,
so no cached key stays valid, and "crop" recomputes the last `context_length` tokens for each new one, exactly as the uncached
loop does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.cache import KVCache
from fastgpt.config import ContextLengthError, GPTConfig, TokenIdError
from fastgpt.decoder import Engine
from fastgpt.sampling import INVALID, Sampler, SamplingParams
from fastgpt.speculation import Lookahead, check_lookup

Prompts: TypeAlias = Sequence[Sequence[int] | Tensor] | Tensor

OVERFLOWS = ("crop", "stop", "error")

# Positions of one prefill forward. The activations of a chunk are 16 * width * chunk elements, 25 MB in bf16 at GPT-2 124M,
# and 1024 rows already fill every GEMM; a longer chunk only raises the peak.
PREFILL_CHUNK = 1024

# Tokens that an engine makes between two looks of the host at them: a look waits for the GPU, 20 us beside a token's 100 or more.
# A row that stops meanwhile has made up to 15 for nothing.
LOOK_EVERY = 16


class LanguageModel(Protocol):
    """What generation needs of a model. `decode_engine(batch_size, positions)`, where it has one, gives an engine, or why not."""

    config: GPTConfig
    training: bool

    def __call__(self, idx: Tensor, /, *, cache: KVCache | None = None, logits_at: Tensor | None = None) -> Tensor: ...

    def train(self, mode: bool = True) -> Any: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


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
        temperature, top_k, top_p, min_p, repetition_penalty: see fastgpt.sampling.SamplingParams.
        stop_tokens: ids that end a row; the id that ended it is kept.
        generator: of the random draws; None is torch's global one. One draw a step for the whole batch; one a call if "fused".
        overflow: past the context length, "crop" goes on with the last context_length tokens, recomputed for each new one;
            "stop" ends the row when prompt and completion fill the context; "error" raises ContextLengthError before computing.
        use_cache: False recomputes everything for each token; the tokens are the same.
        lookup: guess up to so many tokens from a row's own text, and judge them in one forward; see fastgpt.speculation.
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


def prefill(
    model: LanguageModel, cache: KVCache, prompts: Sequence[Sequence[int]], chunk: int = PREFILL_CHUNK
) -> Tensor:
    """Fill an empty cache with prompts of any lengths, `chunk` positions a forward; returns the last positions' logits [B, V].

    Rows are padded at the end for the forward and cut to their own length afterwards: causal attention never looks there.
    """
    device = cache.keys.device
    lengths = [len(prompt) for prompt in prompts]
    padded = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
    padded = padded.to(device)
    last = torch.tensor(lengths) - 1
    logits: Tensor | None = None
    for start in range(0, max(lengths), chunk):
        width = min(chunk, max(lengths) - start)
        ends_here = (last >= start) & (last < start + width)
        at = (last - start).clamp(0, width - 1).to(device)
        chunk_logits = model(padded[:, start : start + width], cache=cache, logits_at=at)[:, 0]
        logits = chunk_logits if logits is None else torch.where(ends_here.to(device)[:, None], chunk_logits, logits)
    cache.truncate(lengths)
    assert logits is not None
    return logits


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
        ops.sampler_kernel(self.sampler, device, activation_dtype(self.model, device))
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


class _Batch:
    """The rows of a request on their way: what each has, which run from the cache, which are past the context."""

    def __init__(self, request: _Request) -> None:
        self.model, self.context = request.model, request.model.config.context_length
        self.device = next(iter(request.model.parameters())).device
        self.dtype = activation_dtype(request.model, self.device)
        self.rows = [list(prompt) for prompt in request.prompts]
        self.use_cache = request.use_cache
        self.capacity = min(self.context, max(map(len, self.rows)) + request.max_new_tokens)
        self.cache: KVCache | None = None
        self.cached: list[int] = []  # rows in the cache, in its order
        self.engine: Engine | None = None  # owns the cache, where the model has one

    def logits(self, active: list[int]) -> Tensor:
        """Next-token logits [B, V] of the active rows; other rows are zeros, so that the draw's shape never changes."""
        if not self.use_cache:
            pieces = self.uncached(active)
        else:
            # A row runs from the cache as long as its newest token still has a position.
            inside = [row for row in active if len(self.rows[row]) <= self.context]
            pieces = self._cached(inside) + self.uncached([row for row in active if len(self.rows[row]) > self.context])
        if len(pieces) == 1 and pieces[0][0] == list(range(len(self.rows))):
            return pieces[0][1]
        out = torch.zeros(len(self.rows), self.model.config.vocab_size, device=self.device)
        for rows, logits in pieces:
            out[torch.tensor(rows, device=self.device)] = logits.float()
        return out

    def _cached(self, rows: list[int]) -> list[tuple[list[int], Tensor]]:
        if not rows:
            self.close()
            return []
        if self.cache is None:
            self.cache, self.cached = self._open(len(rows)), rows
            logits = prefill(self.model, self.cache, [self.rows[row] for row in rows])
            if self.engine is not None:
                self.engine.begin()
            return [(rows, logits)]
        if self.engine is not None and not self.engine.plan.holds():  # a paused stream's caller replaced a parameter
            self.engine = None
        if rows != self.cached:
            self.keep(rows)
        newest = torch.tensor([self.rows[row][-1] for row in rows], device=self.device)
        if self.engine is not None:
            return [(rows, self.engine.step(newest))]
        return [(rows, self.model(newest[:, None], cache=self.cache)[:, 0])]

    def steps_ahead(self, active: list[int], most: int) -> int:
        """How many tokens the active rows can get before a host has to look at them."""
        if self.engine is None or active != self.cached:
            return 1
        return max(min(most, self.context + 1 - max(len(self.rows[row]) for row in active)), 1)

    def ahead(self, chosen: Tensor) -> Tensor:
        """`logits` again, after tokens [B] that are on the device still and that no row has got yet."""
        assert self.engine is not None
        if len(self.cached) == len(self.rows):
            return self.engine.step(chosen)
        at = torch.tensor(self.cached, device=self.device)
        out = torch.zeros(len(self.rows), self.model.config.vocab_size, device=self.device)
        out[at] = self.engine.step(chosen[at]).float()
        return out

    def _open(self, rows: int) -> KVCache:
        """A cache for `rows` rows: an engine's, or one of its own."""
        find = getattr(self.model, "decode_engine", None)
        engine = "this model has none" if find is None else find(rows, self.capacity)
        if isinstance(engine, str):
            self.engine = None
            return KVCache(self.model.config, rows, self.capacity, self.dtype, self.device)
        self.engine = engine
        return engine.cache

    def keep(self, rows: list[int]) -> None:
        """Finished rows leave the batch."""
        assert self.cache is not None
        kept, old, engine = [self.cached.index(row) for row in rows], self.cache, self.engine
        if engine is None:
            self.cache = old.select(kept)
        else:
            self.cache = self._open(len(rows))
            self.cache.take(old, kept)
            if self.engine is not None:
                self.engine.begin()
            engine.release()
        self.cached = rows

    def append(self, active: list[int], new: list[int], count: int, request: _Request) -> list[str | None]:
        """Give each active row its count-th token; returns why rows end with it."""
        reasons: list[str | None] = [None] * len(self.rows)
        for row in active:
            if new[row] == INVALID:
                raise ValueError(
                    f"the logits of row {row} are NaN or Inf after {len(self.rows[row])} tokens; "
                    "the weights are broken, or the dtype overflows"
                )
            self.rows[row].append(new[row])
            if new[row] in request.stop_tokens:
                reasons[row] = "stop"
            elif count == request.max_new_tokens:
                reasons[row] = "length"
            elif request.overflow == "stop" and len(self.rows[row]) >= self.context:
                reasons[row] = "context"
        return reasons

    def close(self) -> None:
        """Give the engine back."""
        if self.engine is not None:
            self.engine.release()
        self.cache, self.cached, self.engine = None, [], None

    def uncached(self, rows: list[int]) -> list[tuple[list[int], Tensor]]:
        """One forward per distinct length over the last `context` tokens of each row."""
        by_length: dict[int, list[int]] = {}
        for row in rows:
            by_length.setdefault(min(len(self.rows[row]), self.context), []).append(row)
        pieces = []
        for length, group in by_length.items():
            idx = torch.tensor([self.rows[row][-length:] for row in group], device=self.device)
            last = torch.full((len(group),), length - 1, device=self.device)
            pieces.append((group, self.model(idx, logits_at=last)[:, 0]))
        return pieces


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
    batch = _Batch(request)
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
    kernel = ops.sampler_kernel(request.sampler, batch.device, batch.dtype)
    choose = Sampler(params, batch.rows, model.config.vocab_size, batch.device, request.generator, kernel)
    # A draw of torch's behind the end of a row would leave the generator further on than a loop that looks at every token.
    most = 1 if look_always or (kernel is None and request.stop_tokens and params.temperature > 0.0) else LOOK_EVERY
    ahead = Lookahead(_Batch(request), active, request) if request.lookup else None
    count = 0
    try:
        while active and count < request.max_new_tokens:
            drawn: list[Tensor] = []
            scores: list[Tensor] = []
            with evaluating(model), torch.no_grad():
                if ahead is not None:
                    tokens, logprobs = ahead.steps(active)
                else:
                    logits = batch.logits(active)
                    for _ in range(batch.steps_ahead(active, min(most, request.max_new_tokens - count))):
                        if drawn:
                            logits = batch.ahead(drawn[-1])
                        chosen = choose(logits)
                        if request.logprobs:
                            all_scores = torch.log_softmax(logits.float(), dim=-1)
                            scores.append(all_scores.gather(1, chosen.clamp(min=0)[:, None])[:, 0])
                        drawn.append(chosen)
                    tokens = torch.stack(drawn).tolist()
                    logprobs = torch.stack(scores).tolist() if scores else [None] * len(tokens)
            for new, picked in zip(tokens, logprobs, strict=True):
                count += 1
                reasons = batch.append(active, new, count, request)
                yield Step(
                    [new[row] if row in active else None for row in range(B)],
                    reasons,
                    None if picked is None else [picked[row] if row in active else None for row in range(B)],
                )
                active = [row for row in active if reasons[row] is None]
                if not active:
                    return
    finally:
        (batch if ahead is None else ahead.batch).close()


@contextlib.contextmanager
def evaluating(model: LanguageModel | nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own mode again outside; entered anew each step, so that a paused stream leaves no trace."""
    modes = [(module, module.training) for module in model.modules()] if model.training else []
    if modes:
        model.train(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def activation_dtype(model: LanguageModel | nn.Module, device: torch.device) -> torch.dtype:
    """The dtype of the keys and values that the model computes: autocast's where it is on, else the parameters'."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _ids(prompt: Sequence[int] | Tensor) -> list[int]:
    if isinstance(prompt, Tensor):
        if prompt.dim() != 1 or prompt.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"a prompt must be int32 or int64 [T], got {prompt.dtype} {list(prompt.shape)}")
        return prompt.tolist()
    if isinstance(prompt, (str, bytes)):
        raise ValueError(
            f"a prompt must be token ids, got {type(prompt).__name__}; encode text with fastgpt.tokenizer first"
        )
    return [int(token) for token in prompt]
