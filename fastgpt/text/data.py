"""Tokens in, batches out: batch i is a pure function of the data, the seed and i.

A stream of tokens is cut into blocks of T + 1 (inputs and their next tokens) at an offset that changes with every epoch; the
blocks of an epoch come in an order drawn from (seed, epoch). An epoch sees every token once, but for less than two blocks at
the ends, and the state of a run is one number. Where documents are kept apart, rows say where each begins in them.
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
        starts: where documents begin, ascending integers [D], the first 0. Documents are then packed: an epoch lays them end to
            end in an order of its own and cuts them into rows of T, so a document goes on in the next row where one ends. Of n
            tokens each but the last is an input once an epoch, and each but the first a target. Only an epoch's last row is
            padded, with zeros whose targets are IGNORED. None: rows run across documents, which aren't told apart.
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
            self._inputs = np.maximum(lengths - 1, 0)
            self.blocks_per_epoch = -(-int(self._inputs.sum()) // context)
            if self.blocks_per_epoch == 0:
                raise ValueError(f"none of {len(starts):,} documents has two tokens")
        else:
            if len(tokens) < context + 1:
                raise ValueError(
                    f"{len(tokens):,} tokens are fewer than one block of {context + 1}; add text or lower the context"
                )
            # Every epoch has the same number of blocks, whatever its offset, so that block i's epoch is a division.
            self.blocks_per_epoch = max((len(tokens) - 1) // context - 1, 1)
        self._epoch = -1  # whose order the fields below hold
        self._offset = 0
        self._order = self._documents = self._ends = np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """(inputs, targets) int64 [B, T] of step `step` >= 0, on the CPU.

        Where documents are kept apart, (inputs, targets, starts): int32 [B, T], where each token's document begins in its row.
        """
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, first: int, stop: int) -> tuple[Tensor, ...]:
        """Rows first .. stop - 1 of `batch(step)`: a process reads no more than its own."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        blocks = range(step * self.batch_size + first, step * self.batch_size + stop)
        if self.separate:
            packed = [self._packed(block) for block in blocks]
            inputs, targets, starts = (torch.from_numpy(np.stack(part)) for part in zip(*packed, strict=True))
            return inputs, targets, starts
        begins = [self._offset + self.context * index for index in map(self._index, blocks)]
        block = np.stack([self.tokens[begin : begin + self.context + 1] for begin in begins]).astype(np.int64)
        rows = torch.from_numpy(block)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _index(self, block: int) -> int:
        """Which of its epoch's blocks is number `block` of the whole run; the order of that epoch is at hand afterwards."""
        epoch, index = divmod(block, self.blocks_per_epoch)
        if self._epoch != epoch:
            draw = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            if self.separate:
                self._documents = draw.permutation(len(self._starts))
                self._ends = np.cumsum(self._inputs[self._documents])
            else:
                spare = len(self.tokens) - 1 - self.blocks_per_epoch * self.context
                self._offset = int(draw.integers(0, spare + 1))
            self._order, self._epoch = draw.permutation(self.blocks_per_epoch), epoch
        return int(self._order[index])

    def _packed(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(inputs, targets, starts) [T] of a row of whole documents, but for those that its ends cut."""
        begin = self._index(block) * self.context
        inputs = np.zeros(self.context, dtype=np.int64)
        targets = np.full_like(inputs, IGNORED)
        starts = np.zeros(self.context, dtype=np.int32)
        place, filled = int(np.searchsorted(self._ends, begin, side="right")), 0
        while filled < self.context and place < len(self._ends):
            document = self._documents[place]
            left = int(self._ends[place]) - (begin + filled)  # inputs of it that are in no earlier row
            count = min(left, self.context - filled)
            first = int(self._starts[document] + self._inputs[document]) - left
            piece = self.tokens[first : first + count + 1]
            part = slice(filled, filled + count)
            inputs[part], targets[part], starts[part] = piece[:-1], piece[1:], filled
            filled, place = filled + count, place + 1
        starts[filled:] = filled  # padding is a document of its own, which nothing else sees
        return inputs, targets, starts


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
