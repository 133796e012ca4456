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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.inference.sampling import GREEDY, INVALID, ByRow, SamplingParams, sample
from fastgpt.transfer import uploaded

if TYPE_CHECKING:
    from fastgpt.inference.batch import Source
    from fastgpt.inference.generate import Request

NGRAMS = (3, 2, 1)  # tokens that must match, the longest first


def check_lookup(lookup: int, params: SamplingParams, use_cache: bool) -> None:
    """ValueError unless up to `lookup` tokens can be guessed with these options; 0 guesses none."""
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


class Lookup:
    """The driver for greedy tokens whose rows run ahead of each other, each as far as its proposals hold.

    Args:
        source: of the logits, this object's alone; its rows grow as they run ahead.
        active: the rows that want tokens.
        request: what they want.
    """

    def __init__(self, source: Source, active: list[int], request: Request) -> None:
        self._source, self._request = source, request
        self._left = dict.fromkeys(active, request.max_new_tokens)
        self._history = {row: History(source.rows[row]) for row in active}
        self._ready: dict[int, deque[tuple[int, float]]] = {row: deque() for row in active}
        for row in active:
            source.rows[row] = self._history[row].tokens

    def steps(self, active: list[int], left: int) -> Sequence[tuple[ByRow[int], ByRow[float] | None]]:
        """See fastgpt.inference.generate.OneAtATime.steps: as many as all of the active rows have."""
        while not all(self._ready[row] for row in active):
            self._forward()
        made = []
        for _ in range(min(len(self._ready[row]) for row in active)):
            step = {row: self._ready[row].popleft() for row in active}
            scores = {row: score for row, (_, score) in step.items()} if self._request.logprobs else None
            made.append(({row: token for row, (token, _) in step.items()}, scores))
        return made

    def _forward(self) -> None:
        """At least one more token for every row that has none ready."""
        source = self._source
        going = [row for row, left in self._left.items() if left]
        source.arrange(going)
        inside = [row for row in going if row not in source.outside]
        proposals: dict[int, list[int]] = {}
        if inside and source.first is None:
            room = min(source.capacity - max(len(source.rows[row]) for row in inside), self._request.lookup)
            proposals = {row: self._history[row].proposals(min(room, self._left[row] - 1)) for row in inside}
        if any(proposals.values()):
            self._verify(proposals)
            for rows, logits in source.uncached([row for row in source.outside if not self._ready[row]]):
                self._choose(rows, logits[:, None], [[]] * len(rows))
        else:
            if source.engine is not None:
                source.engine.begin()
            logits = source.logits()
            self._choose(going, logits[uploaded(going, source.device), None], [[]] * len(going))

    def _verify(self, proposals: dict[int, list[int]]) -> None:
        """One forward of each row's newest token and its proposals."""
        source, rows = self._source, list(proposals)
        if rows != source.cached:
            source.keep(rows)
        assert source.cache is not None
        width = 1 + max(map(len, proposals.values()))
        # A shorter row is padded with tokens of its own, so that no other embedding enters its keys.
        padded = [[source.rows[row][-1], *proposals[row], *source.rows[row][-1:] * width][:width] for row in rows]
        logits = source.model(uploaded(padded, source.device), cache=source.cache)
        self._choose(rows, logits, [proposals[row] for row in rows])
        source.cache.truncate([len(source.rows[row]) - 1 for row in rows])  # the newest token is still to come

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
        if token == INVALID or request.end(token, len(history.tokens)):
            self._left[row] = 0
