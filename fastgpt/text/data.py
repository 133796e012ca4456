"""Tokens in, batches out: batch i is a pure function of the data, the seed and i.

A stream of tokens is cut into blocks of T + 1 (inputs and their next tokens) at an offset that changes with every epoch; the
blocks of an epoch come in an order drawn from (seed, epoch). An epoch sees every token once, but for less than two blocks at
the ends, and the state of a run is one number. Where documents are kept apart, each is cut into blocks of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from fastgpt.text.shards import Tokens
from fastgpt.text.tokenizer import Tokenizer

IGNORED = -100  # targets that don't count, as in torch's cross_entropy


class TokenStream:
    """Batches over one long array of token ids.

    Args:
        tokens: integer ids [N], in memory, memory-mapped, or of several files.
        context: T, positions of a row.
        batch_size: rows B of a batch.
        seed: of the order.
        starts: where documents begin, ascending integers [D], the first 0. A row then holds one document, or T tokens of a long
            one; what is left of it is zeros whose targets are IGNORED. None: rows run across documents.
    """

    def __init__(
        self,
        tokens: np.ndarray | Tokens,
        context: int,
        batch_size: int,
        seed: int = 0,
        starts: np.ndarray | None = None,
    ) -> None:
        for name, value, least in (("context", context, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        self.separate = starts is not None
        if starts is not None:
            self._starts = np.asarray(starts, dtype=np.int64)
            if len(starts) == 0 or self._starts[0] != 0 or (np.diff(self._starts) < 0).any():
                raise ValueError("starts must ascend from 0, and hold at least one document")
            lengths = np.diff(self._starts, append=len(tokens))
            if lengths[-1] < 0:
                raise ValueError(f"a document begins at {self._starts[-1]:,}, after the last of {len(tokens):,} tokens")
            # A document of n tokens has n - 1 of them to predict.
            self._pieces = np.cumsum(-(-np.maximum(lengths - 1, 0) // context))
            self.blocks_per_epoch = int(self._pieces[-1])
            if self.blocks_per_epoch == 0:
                raise ValueError(f"none of {len(starts):,} documents has two tokens")
        else:
            if len(tokens) < context + 1:
                raise ValueError(
                    f"{len(tokens):,} tokens are fewer than one block of {context + 1}; add text or lower the context"
                )
            # Every epoch has the same number of blocks, whatever its offset, so that block i's epoch is a division.
            self.blocks_per_epoch = max((len(tokens) - 1) // context - 1, 1)
        self._order: tuple[int, int, np.ndarray] = (-1, 0, np.empty(0, dtype=np.int64))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets) int64 [B, T] of step `step` >= 0, on the CPU."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows first .. stop - 1 of `batch(step)`: a process reads no more than its own."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        spans = [self._span(step * self.batch_size + row) for row in range(first, stop)]
        if not self.separate:
            block = torch.from_numpy(np.stack([self.tokens[start:end] for start, end in spans]).astype(np.int64))
            return block[:, :-1].contiguous(), block[:, 1:].contiguous()
        inputs = torch.zeros(len(spans), self.context, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORED)
        for row, (start, end) in enumerate(spans):
            piece = torch.from_numpy(self.tokens[start:end].astype(np.int64))
            inputs[row, : len(piece) - 1] = piece[:-1]
            targets[row, : len(piece) - 1] = piece[1:]
        return inputs, targets

    def _span(self, block: int) -> tuple[int, int]:
        """Where block number `block` of the whole run begins and ends in the tokens."""
        epoch, index = divmod(block, self.blocks_per_epoch)
        if self._order[0] != epoch:
            draw = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            spare = 0 if self.separate else len(self.tokens) - 1 - self.blocks_per_epoch * self.context
            offset = int(draw.integers(0, spare + 1))
            self._order = (epoch, offset, draw.permutation(self.blocks_per_epoch))
        _, offset, order = self._order
        if not self.separate:
            start = offset + self.context * int(order[index])
            return start, start + self.context + 1
        piece = int(order[index])
        document = int(np.searchsorted(self._pieces, piece, side="right"))
        before = int(self._pieces[document - 1]) if document else 0
        start = int(self._starts[document]) + self.context * (piece - before)
        after = int(self._starts[document + 1]) if document + 1 < len(self._starts) else len(self.tokens)
        return start, min(start + self.context + 1, after)


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> np.ndarray:
    """All documents' ids in one array, "<|endoftext|>" after each where the tokenizer has it; uint16 where ids fit."""
    pieces: list[np.ndarray] = []
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    for document in documents:
        pieces.append(np.array(tokenizer.encode(document) + end, dtype=dtype))
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=dtype)


def encode_with_starts(tokenizer: Tokenizer, documents: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """`encode_documents`, and where each begins in it, int64 [D]."""
    encoded = [encode_documents(tokenizer, [document]) for document in documents]
    lengths = np.array([len(piece) for piece in encoded], dtype=np.int64)
    tokens = np.concatenate(encoded) if encoded else encode_documents(tokenizer, [])
    return tokens, np.cumsum(lengths) - lengths


def split_validation(tokens: np.ndarray, fraction: float, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation): the last `fraction` of the tokens is held out, but no fewer than `at_least` (>= 1) of them.

    ValueError where that leaves less than half for training.
    """
    held = max(int(len(tokens) * fraction), at_least, 1)
    if len(tokens) < 2 * held:
        raise ValueError(
            f"{len(tokens):,} tokens are too few to hold {held:,} out for validation; add text or lower the context"
        )
    return tokens[:-held], tokens[-held:]
