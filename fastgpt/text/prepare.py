"""Text to token shards: in parallel, resumable, and the same files whatever the number of workers.

The inputs are cut into units of about `shard_bytes` of text. A first pass hashes every document; with all hashes known, it is
settled which documents are held out (those of the smallest hashes, so that equal texts are never on both sides) and which
repeat an earlier one. A second pass encodes, and each unit becomes one shard of each split. A unit that is done has a record,
and is skipped when the command is run again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.files import write_text
from fastgpt.text.data import encode_with_starts
from fastgpt.text.documents import Source, documents, find, sources
from fastgpt.text.shards import DATASET, write_shard
from fastgpt.text.tokenizer import SymbolTokenizer, Tokenizer, load_tokenizer

PLAN = "plan.json"
HELD_BYTES = 8192  # a block of GPT-2's context, which a validation loss needs, where a token has up to eight bytes
TRAIN, VALIDATION, DUPLICATE = 0, 1, 2


@dataclass(frozen=True)
class PrepareSettings:
    """How to prepare. Raises ValueError that names the field, what came and what was expected."""

    tokenizer: str = "gpt2"  # gpt2, bundled, char, word, a file or a directory
    field: str = "text"  # of .jsonl, parquet and datasets
    validation: float | None = None  # share of the documents to hold out; None: 1%, and at least HELD_BYTES of text
    deduplicate: bool = False  # leave out documents whose text is exactly that of an earlier one
    shard_bytes: int = 64_000_000  # of text a shard, about
    include: str = ""  # pattern of the names to take below directories; empty: whatever is text

    def __post_init__(self) -> None:
        if self.validation is not None and not 0 <= self.validation < 1:
            raise ValueError(f"validation must be at least 0 and less than 1, got {self.validation}")
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes must be at least 1, got {self.shard_bytes}")
        if not self.field:
            raise ValueError("field must name a field, got an empty string")


Progress = Callable[[str, int, int], None]  # (what is done, bytes of it done, bytes in all)


def prepare(
    inputs: Sequence[str],
    out: Path,
    settings: PrepareSettings,
    workers: int = 1,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Write the shards of `inputs` into `out`; returns what dataset.json says of them.

    Args:
        inputs: text files, .jsonl, .parquet, directories of them, or "hf:NAME[:CONFIG]" for the train split of a dataset. What
            is no text below a directory is left out, and listed under "skipped".
        out: made when missing. ValueError where it holds other inputs or options.
        workers: processes; 1 uses this one.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    files: list[str] = []
    skipped: list[str] = []
    for name in inputs:
        found_here = None if name.startswith("hf:") else find([name], settings.include or None)
        files += [name] if found_here is None else map(str, found_here.files)
        skipped += [] if found_here is None else map(str, found_here.skipped)
    units = _units(sources(files), settings.shard_bytes)
    plan = {"inputs": list(inputs), "settings": asdict(settings), "fingerprint": _fingerprint(units)}
    out.mkdir(parents=True, exist_ok=True)
    _check_plan(out, plan)
    if (out / DATASET).is_file():
        return json.loads((out / DATASET).read_text(encoding="utf-8"))
    for path in out.glob(".*"):
        if re.fullmatch(r"\..*\.bin\.[0-9a-f]{16}", path.name):  # of a process that was killed
            path.unlink()
    tokenizer = _tokenizer(settings, units)
    tokenizer.save(out)
    sizes = [sum(source.size for source in unit) for unit in units]
    with _each(workers, out, settings.field) as each:
        hashes = list(_reported(each(_hashes, [(unit,) for unit in units]), "reading", sizes, progress))
        labels = _labels(hashes, settings)
        # Only now: inputs or options that fail before a shard is written leave nothing that a corrected command would run into.
        write_text(out / PLAN, json.dumps(plan, indent=1) + "\n")
        todo = [i for i in range(len(units)) if not _record(out, i).is_file()]
        done = each(_encode, [(i, units[i], labels[i]) for i in todo])
        for _ in _reported(done, "encoding", [sizes[i] for i in todo], progress):
            pass
    records = [json.loads(_record(out, i).read_text(encoding="utf-8")) for i in range(len(units))]
    found: dict[str, Any] = {"version": 1, "vocab_size": tokenizer.n_vocab, "shards": {}, "tokens": {}, "documents": {}}
    for split in ("train", "validation"):
        parts = [record[split] for record in records if split in record]
        found["shards"][split] = [part["file"] for part in parts]
        found["tokens"][split] = sum(part["tokens"] for part in parts)
        found["documents"][split] = sum(part["documents"] for part in parts)
    found["duplicates"] = sum(int((label == DUPLICATE).sum()) for label in labels)
    found["skipped"] = skipped
    found["bytes"] = sum(record["bytes"] for record in records)
    write_text(out / DATASET, json.dumps(found | plan, indent=1) + "\n")
    for i in range(len(units)):
        _record(out, i).unlink()
    return found | plan


def _units(sources: Iterable[Source], most: int) -> list[list[Source]]:
    """Small sources together, large .jsonl files cut, so that a unit has about `most` bytes."""
    units: list[list[Source]] = []
    size = most
    for source in sources:
        cuts = range(source.start, max(source.stop, 1), most) if source.kind == "jsonl" else [source.start]
        for cut in cuts:
            part = source
            if source.kind == "jsonl":
                stop = min(cut + most, source.stop)
                part = source._replace(start=cut, stop=stop, size=stop - cut)
            if size + part.size > most:
                units.append([])
                size = 0
            units[-1].append(part)
            size += part.size
    return units


def _fingerprint(units: list[list[Source]]) -> str:
    """Changes when a file's name, size or time does."""
    digest = hashlib.sha256()
    for source in (source for unit in units for source in unit):
        time = 0 if source.kind == "dataset" else os.stat(source.path).st_mtime_ns
        digest.update(repr((*source, time)).encode())
    return digest.hexdigest()


def _check_plan(out: Path, plan: dict[str, Any]) -> None:
    path = out / PLAN
    if not path.is_file():
        if (out / DATASET).exists():
            raise ValueError(f"{out} holds a data set without its {PLAN}; choose another --out")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key in plan if before.get(key) != plan[key]]
    if changed:
        raise ValueError(
            f"{out} was begun with other {' and '.join(changed)} (a fingerprint is of the files' names, sizes and times); "
            "remove it or choose another --out"
        )


def _tokenizer(settings: PrepareSettings, units: list[list[Source]]) -> Tokenizer:
    if settings.tokenizer not in ("char", "word"):
        return load_tokenizer(settings.tokenizer)
    symbols: set[str] = set()
    for source in (source for unit in units for source in unit):
        for text in documents(source, settings.field):
            symbols.update(SymbolTokenizer.from_text(settings.tokenizer, text).symbols)
    return SymbolTokenizer(settings.tokenizer, sorted(symbols))


def _labels(hashes: list[np.ndarray], settings: PrepareSettings) -> list[np.ndarray]:
    """For each unit, TRAIN, VALIDATION or DUPLICATE of each document, uint8."""
    every = np.concatenate(hashes) if hashes else np.empty((0, 3), np.uint64)
    if len(every) == 0:
        raise ValueError("the inputs hold no document")
    order = np.lexsort((every[:, 1], every[:, 0]))  # stable: of equal hashes the earliest document comes first
    repeats = np.zeros(len(every), dtype=bool)
    repeats[order[1:]] = (every[order[1:]] == every[order[:-1]]).all(axis=1)
    labels = np.full(len(every), TRAIN, dtype=np.uint8)
    distinct = every[order][~repeats[order]]
    if settings.validation != 0 and len(distinct) > 1:
        held = max(round((settings.validation or 0.01) * len(distinct)), 1)
        if settings.validation is None:
            enough = int(np.searchsorted(np.cumsum(distinct[:, 2]), HELD_BYTES)) + 1
            held = max(held, min(enough, len(distinct) // 2))
        held = min(held, len(distinct) - 1)
        labels[every[:, 0] <= distinct[held - 1, 0]] = VALIDATION
    if settings.deduplicate:
        labels[repeats] = DUPLICATE
    return np.split(labels, np.cumsum([len(part) for part in hashes])[:-1])


def _record(out: Path, index: int) -> Path:
    return out / f"unit-{index:05d}.json"


# What a worker process is given once: (directory, field, tokenizer).
_worker: tuple[Path, str, Tokenizer]


def _begin(out: Path, field: str) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _worker = (out, field, load_tokenizer(out))


def _hashes(unit: list[Source]) -> np.ndarray:
    """128 bits of BLAKE2b of each document's text, and its bytes, uint64 [D, 3]."""
    texts = (text.encode("utf-8") for source in unit for text in documents(source, _worker[1]))
    rows = [hashlib.blake2b(text, digest_size=16).digest() + len(text).to_bytes(8, "little") for text in texts]
    return np.frombuffer(b"".join(rows), dtype="<u8").reshape(-1, 3)


def _encode(index: int, unit: list[Source], labels: np.ndarray) -> None:
    """Write the unit's shards, then its record."""
    out, field, tokenizer = _worker
    record: dict[str, Any] = {"bytes": 0}
    texts = [text for source in unit for text in documents(source, field)]
    for split, label in (("train", TRAIN), ("validation", VALIDATION)):
        chosen = [text for text, mine in zip(texts, labels, strict=True) if mine == label]
        if chosen:
            tokens, starts = encode_with_starts(tokenizer, chosen)
            name = f"{split}-{index:05d}.bin"
            write_shard(out / name, tokens, starts, tokenizer.n_vocab)
            record[split] = {"file": name, "tokens": len(tokens), "documents": len(chosen)}
            record["bytes"] += sum(len(text.encode("utf-8")) for text in chosen)
    write_text(_record(out, index), json.dumps(record) + "\n")


@contextmanager
def _each(
    workers: int, out: Path, field: str
) -> Iterator[Callable[[Callable[..., Any], list[tuple[Any, ...]]], Iterator[Any]]]:
    """A map over calls, in order, by this process or by `workers` others."""
    if workers == 1:
        global _worker
        _worker = (out, field, load_tokenizer(out))
        yield lambda call, arguments: (call(*each) for each in arguments)
        return
    # Spawned and not forked: a fork of a process whose libraries have threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin, (out, field)) as pool:

        def over(call: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> Iterator[Any]:
            futures = [pool.submit(call, *each) for each in arguments]
            return (future.result() for future in futures)

        try:
            yield over
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _reported(results: Iterator[Any], what: str, sizes: list[int], progress: Progress) -> Iterator[Any]:
    done = 0
    progress(what, 0, sum(sizes))
    for result, size in zip(results, sizes, strict=True):
        done += size
        progress(what, done, sum(sizes))
        yield result
