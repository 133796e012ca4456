"""Files of token ids, memory-mapped: our own with a header, nanoGPT's and llm.c's.

A shard of ours, little-endian:

    offset  bytes     what
    0       8         "fgtokens"
    8       4         version, uint32: 1
    12      4         bytes of an id, uint32: 2 (uint16) or 4 (uint32)
    16      8         ids N, uint64
    24      8         documents D, uint64
    32      8         vocabulary, uint64: every id is below it
    40      24        zeros
    64      N * w     ids, then zeros up to a multiple of 8
            D * 8     where each document begins, uint64, the first at 0; "<|endoftext|>" ends one, if the tokenizer has it

A directory of `fastgpt prepare` holds shards, their list in dataset.json, and the tokenizer. llm.c's files have a header of 256
int32: 20240520, 1, N for uint16 ids, 20240801, 7, N for uint32 (https://github.com/karpathy/llm.c/blob/master/dev/data/data_common.py).
nanoGPT's train.bin and val.bin are uint16 ids and nothing else (https://github.com/karpathy/nanoGPT/tree/master/data).
"""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastgpt.files import atomic_write
from fastgpt.text.formats import META
from fastgpt.text.tokenizer import FILE

DATASET = "dataset.json"
MAGIC, VERSION, HEADER = b"fgtokens", 1, struct.Struct("<8sIIQQQ24x")
LLMC: dict[tuple[int, int], np.dtype] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
LLMC_HEADER_BYTES = 256 * 4
SPLITS = {"train": ("train.bin", "*_train_*.bin", "*_train.bin"), "validation": ("val.bin", "*_val_*.bin", "*_val.bin")}


class Shard(NamedTuple):
    """Memory-mapped ids [N], where documents begin [D], and what all ids are below; None where the file doesn't say."""

    tokens: np.ndarray
    starts: np.ndarray | None
    vocab_size: int | None


def write_shard(path: str | os.PathLike[str], tokens: np.ndarray, starts: np.ndarray, vocab_size: int) -> None:
    """Write a shard of ours, whole or not at all. tokens: uint16 or uint32 [N]; starts: ascending integers [D]."""
    if tokens.dtype not in (np.uint16, np.uint32):
        raise TypeError(f"tokens must be uint16 or uint32, got {tokens.dtype}")
    header = HEADER.pack(MAGIC, VERSION, tokens.itemsize, len(tokens), len(starts), vocab_size)

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.write(header)
            file.write(tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).data)
            file.write(bytes(-tokens.nbytes % 8))
            file.write(np.ascontiguousarray(starts, dtype="<u8").data)

    atomic_write(path, write)


def read_shard(path: str | os.PathLike[str]) -> Shard:
    """Map a file of ids: ours, llm.c's, or, where its name ends in .bin, nanoGPT's. ValueError says what is wrong with it."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if head.startswith(MAGIC):
        return _ours(path, head, size)
    numbers = struct.unpack("<3i", head[:12]) if len(head) >= 12 else (0, 0, 0)
    dtype, count = LLMC.get(numbers[:2]), numbers[2]
    if dtype is not None:
        if size != LLMC_HEADER_BYTES + count * dtype.itemsize:
            raise ValueError(f"{path} has {size:,} bytes, but its llm.c header says {count:,} ids of {dtype.itemsize}")
        return Shard(_map(path, dtype, count, LLMC_HEADER_BYTES), None, None)
    if path.suffix != ".bin":
        raise ValueError(
            f"{path} is not a file of token ids: it has no header that is known, and its name doesn't end in .bin"
        )
    if head.startswith(b"\x93NUMPY"):
        raise ValueError(
            f"{path} is a .npy file of numpy under another name; write its ids alone, as uint16: ids.tofile(path)"
        )
    if size == 0 or size % 2:
        raise ValueError(f"{path} has {size:,} bytes; nanoGPT's format is uint16 ids, two bytes each, at least one")
    tokens = _map(path, np.dtype("<u2"), size // 2, 0)
    if len(tokens) >= 64 and np.count_nonzero(tokens[1:100_000:2]) * 100 < len(tokens[1:100_000:2]):
        warnings.warn(
            f"{path}: nearly every second id is 0, as where uint32 ids are read as uint16; nanoGPT's format is uint16. "
            "`fastgpt prepare` writes shards that say what they are",
            stacklevel=2,
        )
    return Shard(tokens, None, None)


def _ours(path: Path, head: bytes, size: int) -> Shard:
    if len(head) < HEADER.size:
        raise ValueError(f"{path} is cut off inside its header, at {size} bytes")
    _, version, width, count, documents, vocab_size = HEADER.unpack(head)
    if version != VERSION or width not in (2, 4):
        raise ValueError(
            f"{path} has format version {version} and {width} bytes an id; known are version {VERSION}, 2 or 4"
        )
    body = count * width + -count * width % 8
    if size != HEADER.size + body + 8 * documents:
        raise ValueError(
            f"{path} has {size:,} bytes, not the {HEADER.size + body + 8 * documents:,} that its header says"
        )
    tokens = _map(path, np.dtype(f"<u{width}"), count, HEADER.size)
    return Shard(tokens, _map(path, np.dtype("<u8"), documents, HEADER.size + body), vocab_size)


def _map(path: Path, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
    if count == 0:  # nothing can be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))


class Tokens:
    """Several shards as one array of ids [N] that is read by slices."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        self._ends = np.cumsum([len(shard.tokens) for shard in shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"token files are read in slices of step 1, got {part}")
        pieces = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first = int(self._ends[index - 1]) if index else 0
            piece = self.shards[index].tokens[start - first : stop - first]
            pieces.append(piece)
            start, index = start + len(piece), index + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.empty(0, np.uint16)

    def starts(self, end_of_text: int | None) -> np.ndarray:
        """Where documents begin, int64; from the files, or after each `end_of_text` where they don't say."""
        found, first = [], 0
        for shard in self.shards:
            starts = document_starts(shard.tokens, end_of_text) if shard.starts is None else shard.starts
            found.append(starts.astype(np.int64) + first)
            first += len(shard.tokens)
        return np.concatenate(found) if found else np.empty(0, np.int64)


def document_starts(tokens: np.ndarray, end_of_text: int | None) -> np.ndarray:
    """0 and the positions after each `end_of_text` [D], int64, but for one at the very end."""
    if end_of_text is None:
        raise ValueError(
            "where documents begin isn't known: the file doesn't say, and the tokenizer has no <|endoftext|>"
        )
    found = [np.zeros(min(len(tokens), 1), np.int64)]
    for start in range(0, len(tokens), 1 << 24):
        found.append(np.flatnonzero(tokens[start : start + (1 << 24)] == end_of_text) + start + 1)
    starts = np.concatenate(found)
    return starts[starts < len(tokens)]


def tokenizer_beside(path: Path) -> Path | None:
    """The directory of a token file or of token files, if it says what tokenizer made them: ours, or nanoGPT's meta.pkl."""
    directory = path if path.is_dir() else path.parent
    return directory if (directory / FILE).is_file() or (directory / META).is_file() else None


def holds_tokens(path: Path) -> bool:
    """Whether `path` is a .bin file, a directory of `fastgpt prepare`, or one with nanoGPT's or llm.c's .bin files."""
    if path.is_dir():
        return (path / DATASET).is_file() or any(_split_files(path, split) for split in SPLITS)
    return path.suffix == ".bin"


def open_tokens(path: Path, split: str = "train") -> Tokens:
    """The ids of a file (its only split is "train"), or of a directory's "train" or "validation"; empty where it has none."""
    if not path.is_dir():
        return Tokens([read_shard(path)] if split == "train" else [])
    return Tokens([read_shard(file) for file in _split_files(path, split)])


def _split_files(directory: Path, split: str) -> list[Path]:
    if not (directory / DATASET).is_file():
        return sorted({file for pattern in SPLITS[split] for file in directory.glob(pattern)})
    try:
        names = json.loads((directory / DATASET).read_text(encoding="utf-8"))["shards"][split]
        if any(Path(name).name != name for name in names):
            raise ValueError(f"it names a shard outside the directory: {names}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / DATASET} is not the list of a prepared data set: {error!r}") from error
    return [directory / name for name in names]
