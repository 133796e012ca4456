"""Tokens in, batches out: batch i is a pure function of the data, the seed and i.

A stream of tokens is cut into blocks of T + 1 (inputs and their next tokens) at an offset that changes with every epoch; the
blocks of an epoch come in an order drawn from (seed, epoch). An epoch sees every token once, but for less than two blocks at
the ends, and the state of a run is one number.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgpt.tokenizer import Tokenizer


class TokenStream:
    """Batches over one long array of token ids.

    Args:
        tokens: integer ids [N].
        context: T, positions of a row.
        batch_size: rows B of a batch.
        seed: of the order.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch_size: int, seed: int = 0) -> None:
        for name, value, least in (("context", context, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if len(tokens) < context + 1:
            raise ValueError(
                f"{len(tokens):,} tokens are fewer than one block of {context + 1}; add text or lower the context"
            )
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        # Every epoch has the same number of blocks, whatever its offset, so that block i's epoch is a division.
        self.blocks_per_epoch = max((len(tokens) - 1) // context - 1, 1)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets) int64 [B, T] of step `step` >= 0, on the CPU."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        starts = [self._start(step * self.batch_size + row) for row in range(self.batch_size)]
        rows = np.stack([self.tokens[start : start + self.context + 1] for start in starts]).astype(np.int64)
        block = torch.from_numpy(rows)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()

    def _start(self, block: int) -> int:
        epoch, index = divmod(block, self.blocks_per_epoch)
        if self._order[0] != epoch:
            draw = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            spare = len(self.tokens) - 1 - self.blocks_per_epoch * self.context
            offset = int(draw.integers(0, spare + 1))
            self._order = (epoch, offset + self.context * draw.permutation(self.blocks_per_epoch))
        return int(self._order[1][index])


def read_text(path: str | os.PathLike[str]) -> str:
    """A file's text; ValueError with the position of the first byte that isn't UTF-8."""
    raw = Path(path).read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start:,}") from error


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> np.ndarray:
    """All documents' ids in one array, "<|endoftext|>" after each where the tokenizer has it; uint16 where ids fit."""
    pieces: list[np.ndarray] = []
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    for document in documents:
        pieces.append(np.array(tokenizer.encode(document) + end, dtype=dtype))
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=dtype)


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


def expand(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files named, and every file below the directories named, sorted; FileNotFoundError names what isn't there."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"no file or directory at {str(path)!r}")
    return files
