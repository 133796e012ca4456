"""An engine running ahead of the host: a step and the choice of the next token in one CUDA graph, read in bursts.

While the host reads one burst, the next is made. `Ahead` is the driver; a `Loop` is what it has the engine run, a `Reading` the
tokens on their way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgpt.graphs import Graph
from fastgpt.inference.sampling import ByRow, Sampler
from fastgpt.transfer import uploaded

if TYPE_CHECKING:
    from fastgpt.inference.batch import Source

# What a row has in fastgpt_kernels.sampling.Draws, by its place in the batch.
_ROW_STATE = ("rows", "positions", "ended", "tokens", "seen")


class Loop:
    """How an engine's rows choose their tokens on the device: what a step draws is what the next one reads.

    Args:
        sampler: a fused one, for the shape of its state; `take` says whose turn it is.
        tokens: int64 [B], the engine's input.
        positions: the engine's, which its steps move on.
    """

    @torch.inference_mode(False)  # it is kept for later calls
    def __init__(self, sampler: Sampler, tokens: Tensor, positions: Tensor) -> None:
        like, B = sampler.draws, len(tokens)
        rows = {
            name: None
            if getattr(like, name) is None
            else getattr(like, name).new_empty(B, *getattr(like, name).shape[1:])
            for name in _ROW_STATE
        }
        self.draws: Any = like._replace(
            **rows | {"tokens": tokens},
            seed=like.seed.clone(),
            stops=like.stops.clone(),
            drawn=like.drawn.new_empty(like.drawn.shape[0], B),
        )
        moved = [
            t for name, t in self.draws._asdict().items() if t is not None and name not in ("seed", "rows", "stops")
        ]
        self.graph = Graph([positions, *moved], tokens.device)

    @staticmethod
    def key(sampler: Sampler) -> tuple[Any, ...]:
        """Samplers that can take turns in one loop have the same."""
        return sampler.params, sampler.draws.stops.shape, sampler.draws.drawn.shape[0]

    def take(self, sampler: Sampler, rows: Sequence[int]) -> None:
        """Go on where the sampler is, with these rows of it in the engine's order."""
        self.draws.seed.copy_(sampler.draws.seed)
        self.draws.stops.copy_(sampler.draws.stops)
        index = uploaded(list(rows), self.draws.seed.device)
        for name in _ROW_STATE:
            if (theirs := getattr(sampler.draws, name)) is not None:
                torch.index_select(theirs, 0, index, out=getattr(self.draws, name))

    def give(self, sampler: Sampler, rows: Sequence[int]) -> None:
        """Let the sampler go on from here."""
        index = uploaded(list(rows), self.draws.seed.device)
        for name in _ROW_STATE:
            if (mine := getattr(self.draws, name)) is not None:
                getattr(sampler.draws, name).index_copy_(0, index, mine)


class Reading:
    """Tokens on their way to the host.

    Args:
        drawn: int64 [K, B]; token p of a row at p % K.
        first: the first token's p.
        count: tokens of each row.
    """

    def __init__(self, drawn: Tensor, first: int, count: int) -> None:
        self.count = count
        self._at = [(first + i) % drawn.shape[0] for i in range(count)]
        self._host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=drawn.is_cuda)
        self._host.copy_(drawn, non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if drawn.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(drawn.device))

    def tokens(self) -> list[list[int]]:
        """A list a step, with a token a row; waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        kept = self._host.tolist()
        return [kept[at] for at in self._at]


class Ahead:
    """The driver for greedy and fused draws from an engine that serves all active rows; see fastgpt.inference.generate.

    Args:
        source: of the logits.
        sampler: a fused one.
        burst: tokens of a row between two looks of the host at them.
        depth: bursts on their way at a time.
    """

    def __init__(self, source: Source, sampler: Sampler, burst: int, depth: int) -> None:
        self._source, self._sampler, self._burst, self._depth = source, sampler, burst, depth
        self._loop: Loop | None = None
        self._started: deque[Reading] = deque()

    def steps(self, active: list[int], left: int) -> Sequence[tuple[ByRow[int], None]]:
        """See fastgpt.inference.generate.OneAtATime.steps. Once no more of them can be started, those on their way come first."""
        source, sampler = self._source, self._sampler
        if source.first is not None:
            return [(sampler(source.logits()).tolist(), None)]
        engine = source.engine
        if engine is not None and source.serves(active):
            if self._loop is None:
                self._loop = engine.loop(sampler, source.cached)
            left -= sum(reading.count for reading in self._started)
            while len(self._started) < self._depth and (count := min(self._burst, left, source.room)) > 0:
                self._started.append(engine.run(self._loop, sampler, count))
                left -= count
        if self._started:
            return [(dict(zip(source.cached, step, strict=True)), None) for step in self._started.popleft().tokens()]
        if self._loop is not None:  # the sampler goes on where the engine's loop is
            self._loop.give(sampler, source.cached)
            self._loop = None
        return []
