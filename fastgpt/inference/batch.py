"""The rows of a generation on their way: prefill, which of them run from the cache, and how their next tokens are made.

A model is known by its `config` and its call alone; where it has a decode engine, that makes the tokens. An engine's finished
rows stay in its batch, where they cost next to nothing, until half of them have finished: then the others move together.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastgpt.config import GPTConfig
from fastgpt.inference.ahead import Loop, Reading
from fastgpt.inference.cache import KVCache
from fastgpt.inference.engine import Engine
from fastgpt.inference.sampling import INVALID, Sampler

# Positions of one prefill forward. The activations of a chunk are 16 * width * chunk elements, 25 MB in bf16 at GPT-2 124M,
# and 1024 rows already fill every GEMM; a longer chunk only raises the peak.
PREFILL_CHUNK = 1024

# Positions of all rows in one prefill forward: 0.8 GB of those activations, whatever the batch.
PREFILL_TOKENS = 32768


class LanguageModel(Protocol):
    """What generation needs of a model. `decode_engine(batch_size, positions)`, where it has one, gives an engine, or why not."""

    config: GPTConfig
    training: bool

    def __call__(self, idx: Tensor, /, *, cache: KVCache | None = None, logits_at: Tensor | None = None) -> Tensor: ...

    def train(self, mode: bool = True) -> Any: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def prefill(model: LanguageModel, cache: KVCache, prompts: Sequence[Sequence[int]], chunk: int | None = None) -> Tensor:
    """Fill an empty cache with prompts of any lengths, `chunk` positions a forward; returns the last positions' logits [B, V].

    None is as many as PREFILL_CHUNK and PREFILL_TOKENS allow. Rows are padded at the end for the forward and cut to their own
    length afterwards: causal attention never looks there.
    """
    chunk = max(min(PREFILL_CHUNK, PREFILL_TOKENS // len(prompts)), 1) if chunk is None else chunk
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


class Batch:
    """What each row has, which run from the cache, which are past the context.

    Args:
        model: whose tokens they are.
        prompts: what the rows begin with, at least one token each.
        max_new_tokens: that a row can get.
        use_cache: False recomputes everything for each token.
    """

    def __init__(
        self, model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, use_cache: bool
    ) -> None:
        self.model, self.context = model, model.config.context_length
        self.device = next(iter(model.parameters())).device
        self.dtype = activation_dtype(model, self.device)
        self.rows = [list(prompt) for prompt in prompts]
        self.use_cache = use_cache
        self.capacity = min(self.context, max(map(len, self.rows)) + max_new_tokens)
        self.cache: KVCache | None = None
        self.cached: list[int] = []  # rows in the cache, in its order
        self.engine: Engine | None = None  # owns the cache, where the model has one

    def logits(self, active: list[int]) -> Tensor:
        """Next-token logits [B, V] of the active rows; other rows are zeros, so that the draw's shape never changes."""
        if not self.use_cache:
            pieces = self.uncached(active)
        else:
            inside = self.inside(active)
            pieces = self._cached(inside) + self.uncached([row for row in active if row not in inside])
        if len(pieces) == 1 and pieces[0][0] == list(range(len(self.rows))):
            return pieces[0][1]
        out = torch.zeros(len(self.rows), self.model.config.vocab_size, device=self.device)
        for rows, logits in pieces:
            out[torch.tensor(rows, device=self.device)] = logits.float()
        return out

    def inside(self, rows: Sequence[int]) -> list[int]:
        """Those that run from the cache: their newest token still has a position."""
        return [row for row in rows if len(self.rows[row]) <= self.context]

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
        if not self.runs_ahead(rows) and rows != self.cached:
            self.keep(rows)
        newest = torch.tensor([self.rows[row][-1] for row in self.cached], device=self.device)
        if self.engine is not None:
            return [(self.cached, self.engine.step(newest))]
        return [(self.cached, self.model(newest[:, None], cache=self.cache)[:, 0])]

    def runs_ahead(self, rows: list[int]) -> bool:
        """Whether an engine can go on with the cached rows as they are, of which `rows` still want tokens."""
        if self.engine is not None and not self.engine.plan.holds():  # a paused stream's caller replaced a parameter
            self.engine = None
        many = 2 * len(rows) > len(self.cached) and set(rows) <= set(self.cached)
        return self.engine is not None and many and self.engine.room > 0

    def ahead(self, chosen: Tensor) -> Tensor:
        """`logits` again, by the engine, after tokens [B] that are on the device still and that no row has got yet."""
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


class Stepper:
    """Makes the next tokens of a batch's rows.

    An engine draws greedy and fused tokens by itself: while the host reads one burst of them, the next is made. Otherwise torch
    draws from the logits of each step, an engine's still without waiting in between.

    Args:
        batch: the rows.
        sampler: which chooses for all of them.
        logprobs: also tell each token's log-probability.
        burst: tokens of a row between two looks of the host at them.
        ahead: whether to have a burst made while another is looked at.
    """

    def __init__(self, batch: Batch, sampler: Sampler, logprobs: bool, burst: int, ahead: bool) -> None:
        self._batch, self._sampler, self._logprobs = batch, sampler, logprobs
        self._burst, self._depth = burst, 2 if ahead else 1
        self._loop: Loop | None = None
        self._started: deque[Reading] = deque()

    def steps(self, active: list[int], left: int) -> tuple[list[list[int]], list[list[float]] | list[None]]:
        """The next tokens, and their log-probabilities, of the active rows: at least one step of the `left` that are wanted.

        A step has an entry for each row of the batch; other rows' say nothing.
        """
        batch, sampler = self._batch, self._sampler
        alone = sampler.kernels is not None and not self._logprobs
        if alone and batch.engine is not None and not self._started and not batch.runs_ahead(active):
            self._stop()
            if batch.inside(active) == active:
                batch.keep(active)
        if alone and batch.runs_ahead(active):
            engine = batch.engine
            assert engine is not None
            if self._loop is None:
                self._loop = engine.loop(sampler, batch.cached)
            left -= sum(reading.count for reading in self._started)
            while len(self._started) < self._depth and (count := min(self._burst, left, engine.room)) > 0:
                self._started.append(engine.run(self._loop, sampler, count))
                left -= count
        if self._started:
            tokens = self._started.popleft().tokens()
            return [self._of_all(step) for step in tokens], [None] * len(tokens)
        self._stop()
        return self._drawn(active, 1 if alone else min(self._burst, left))

    def _stop(self) -> None:
        """The sampler goes on where the engine's loop is."""
        if self._loop is not None:
            self._loop.give(self._sampler, self._batch.cached)
            self._loop = None

    def _drawn(self, active: list[int], most: int) -> tuple[list[list[int]], list[list[float]] | list[None]]:
        """Steps whose tokens the sampler draws from logits; more than one where an engine makes those."""
        batch, drawn, scores = self._batch, list[Tensor](), list[Tensor]()
        logits = batch.logits(active)
        if most > 1:
            most = min(most, 1 + batch.engine.room) if batch.runs_ahead(active) and batch.engine is not None else 1
        for step in range(most):
            if step:
                logits = batch.ahead(drawn[-1])
            drawn.append(self._sampler(logits))
            if self._logprobs:
                all_scores = torch.log_softmax(logits.float(), dim=-1)
                scores.append(all_scores.gather(1, drawn[-1].clamp(min=0)[:, None])[:, 0])
        return torch.stack(drawn).tolist(), torch.stack(scores).tolist() if scores else [None] * len(drawn)

    def _of_all(self, step: list[int]) -> list[int]:
        tokens = [INVALID] * len(self._batch.rows)
        for row, token in zip(self._batch.cached, step, strict=True):
            tokens[row] = token
        return tokens


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
