"""What keeps the host out of a decode engine's way: a step and the choice of the next token in a CUDA graph, read in bursts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.graphs import Graph
from fastgpt.inference.sampling import Sampler

# What a row has in fastgpt_kernels.sampling.Draws, by its place in the batch.
_ROW_STATE = ("rows", "positions", "ended", "tokens", "seen")


class Loop:
    """How an engine's rows choose their tokens on the device: what a step draws is what the next one reads.

    Args:
        sampler: a fused one, for the shape of its state; `take` says whose turn it is.
        tokens: int64 [B], the engine's input.
        positions: the engine's, which its steps move on.
    """

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
        index = torch.tensor(list(rows), device=self.draws.seed.device)
        for name in _ROW_STATE:
            if (theirs := getattr(sampler.draws, name)) is not None:
                torch.index_select(theirs, 0, index, out=getattr(self.draws, name))

    def give(self, sampler: Sampler, rows: Sequence[int]) -> None:
        """Let the sampler go on from here."""
        index = torch.tensor(list(rows), device=self.draws.seed.device)
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
