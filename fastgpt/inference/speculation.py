"""Prompt-lookup decoding: guess the next tokens from the row's own text, and let one forward judge all of them.

Text repeats itself: names, quotations, code. What followed the last occurrence of a row's final three tokens (two, one) is
proposed to follow them again. A forward of the newest token and its proposals gives the model's choice behind each of them; the
proposals that are its choices stay, with the choice behind the last, and the KV cache forgets the others. Every token is the
model's own greedy choice, so that a wrong guess costs time alone.

The choices are those of one token at a time up to rounding: a forward of several positions sums in another order, and where the
two best logits are within its error of each other, either may come first. In float64, or wherever they are further apart, the
tokens are plain greedy decoding's.

A forward of K tokens pays where it costs less than K forwards of one: on a CPU, where reading the weights is the larger part.
On a GPU it runs as modules, beside a decode engine that makes a token in a fraction of their launches: there it rarely does.

Source of the idea: https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastgpt.inference.batch import Batch
from fastgpt.inference.sampling import INVALID, SamplingParams, sample

NGRAMS = (3, 2, 1)  # tokens that must match, the longest first

GREEDY = SamplingParams()


class Request(Protocol):
    """What a generation was asked for, of what matters here; see fastgpt.inference.generate."""

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def stop_tokens(self) -> frozenset[int]: ...

    @property
    def overflow(self) -> str: ...

    @property
    def lookup(self) -> int: ...

    @property
    def logprobs(self) -> bool: ...


def check_lookup(lookup: int, params: SamplingParams, use_cache: bool) -> None:
    """ValueError unless up to `lookup` tokens can be guessed with these options; 0 guesses none."""
    if isinstance(lookup, bool) or not isinstance(lookup, int) or lookup < 0:
        raise ValueError(f"lookup must be a whole number of at least 0, got {lookup!r}")
    if lookup == 0:
        return
    if params.temperature > 0.0:
        raise ValueError(f"lookup={lookup} is for greedy decoding, temperature=0; got temperature {params.temperature}")
    if params.repetition_penalty != 1.0:
        raise ValueError(
            f"lookup={lookup} works with no repetition penalty, which is 1; got {params.repetition_penalty}"
        )
    if not use_cache:
        raise ValueError(f"lookup={lookup} needs the KV cache; got use_cache=False")


class History:
    """A row's tokens, and where each n-gram in them was last followed by something."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        for n in NGRAMS:
            if n <= len(self.tokens):
                self._after[tuple(self.tokens[-n:])] = len(self.tokens)
        self.tokens.append(token)

    def proposals(self, most: int) -> list[int]:
        """What followed the last occurrence of the final n-gram, `most` tokens; what ends with the text is repeated."""
        for n in NGRAMS:
            start = self._after.get(tuple(self.tokens[-n:]))
            if start is not None:
                period = len(self.tokens) - start
                return [self.tokens[start + i % period] for i in range(most)]
        return []


class Lookahead:
    """Greedy tokens for a batch whose rows run ahead of each other, each as far as its proposals hold.

    Args:
        batch: the rows at their prompts, this object's alone; its rows grow as they run ahead.
        active: the rows that want tokens.
        request: what they want.
    """

    def __init__(self, batch: Batch, active: Sequence[int], request: Request) -> None:
        self.batch, self._request = batch, request
        self._left = dict.fromkeys(active, request.max_new_tokens)
        self._history = {row: History(batch.rows[row]) for row in active}
        self._ready: dict[int, deque[tuple[int, float]]] = {row: deque() for row in active}
        for row in active:
            batch.rows[row] = self._history[row].tokens

    def steps(self, active: list[int]) -> tuple[list[list[int]], list[list[float]] | list[None]]:
        """The next tokens, and their log-probabilities, of the active rows: as many steps as all of them have, at least one.

        A step has an entry for each row of the batch; other rows' say nothing.
        """
        while not all(self._ready[row] for row in active):
            self._forward()
        tokens, scores = [], []
        for _ in range(min(len(self._ready[row]) for row in active)):
            step, step_scores = [INVALID] * len(self.batch.rows), [0.0] * len(self.batch.rows)
            for row in active:
                step[row], step_scores[row] = self._ready[row].popleft()
            tokens.append(step)
            scores.append(step_scores)
        return tokens, scores if self._request.logprobs else [None] * len(tokens)

    def _forward(self) -> None:
        """At least one more token for every row that has none ready."""
        batch = self.batch
        going = [row for row, left in self._left.items() if left]
        inside = [row for row in going if len(batch.rows[row]) <= batch.context]
        proposals: dict[int, list[int]] = {}
        if batch.cache is not None and inside:
            room = min(batch.capacity - max(len(batch.rows[row]) for row in inside), self._request.lookup)
            proposals = {row: self._history[row].proposals(min(room, self._left[row] - 1)) for row in inside}
        if any(proposals.values()):
            self._verify(proposals)
            outside = [row for row in going if row not in inside and not self._ready[row]]
            for rows, logits in batch.uncached(outside):
                self._choose(rows, logits[:, None], [[]] * len(rows))
        else:
            if batch.engine is not None:
                batch.engine.begin()
            logits = batch.logits(going)
            self._choose(going, logits[torch.tensor(going, device=batch.device), None], [[]] * len(going))

    def _verify(self, proposals: dict[int, list[int]]) -> None:
        """One forward of each row's newest token and its proposals."""
        batch, rows = self.batch, list(proposals)
        if rows != batch.cached:
            batch.keep(rows)
        assert batch.cache is not None
        width = 1 + max(map(len, proposals.values()))
        # A shorter row is padded with tokens of its own, so that no other embedding enters its keys.
        padded = [[batch.rows[row][-1], *proposals[row], *batch.rows[row][-1:] * width][:width] for row in rows]
        logits = batch.model(torch.tensor(padded, device=batch.device), cache=batch.cache)
        self._choose(rows, logits, [proposals[row] for row in rows])
        batch.cache.truncate([len(batch.rows[row]) - 1 for row in rows])  # the newest token is still to come

    def _choose(self, rows: list[int], logits: Tensor, proposals: list[list[int]]) -> None:
        """Give each row the model's choices from logits [rows, T, V], as far as its proposals were those."""
        chosen = sample(logits.flatten(0, 1), GREEDY).view(logits.shape[:2])
        scores = torch.zeros(chosen.shape)
        if self._request.logprobs:
            scores = torch.log_softmax(logits.float(), dim=-1).gather(2, chosen.clamp(min=0)[:, :, None])[:, :, 0]
        for row, guessed, tokens, row_scores in zip(rows, proposals, chosen.tolist(), scores.tolist(), strict=True):
            for at, token in enumerate(tokens):
                self._append(row, token, row_scores[at])
                if not self._left[row] or at >= len(guessed) or guessed[at] != token:
                    break

    def _append(self, row: int, token: int, score: float) -> None:
        history, request = self._history[row], self._request
        history.append(token)
        self._ready[row].append((token, score))
        self._left[row] -= 1
        full = request.overflow == "stop" and len(history.tokens) >= self.batch.context
        if full or token == INVALID or token in request.stop_tokens:
            self._left[row] = 0
