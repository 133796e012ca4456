"""Files to documents: text files, .jsonl, parquet, Hugging Face datasets, and directories of them.

A text file is a document; a line of .jsonl, or a row of parquet or of a dataset, is one, in a field of it. A byte-order mark at
the start of a file is no part of its text.
"""

from __future__ import annotations

import codecs
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

DATASET_ROWS = 20_000  # of a Hugging Face dataset in a source: about 100 MB of web pages

# Files below a directory that hold documents, or text whatever they hold. Others are looked into.
DOCUMENTS = (".jsonl", ".parquet")
TEXT = frozenset((
    ".txt", ".text", ".md", ".rst", ".tex", ".org", ".adoc", ".html", ".htm", ".xml", ".csv", ".tsv", ".json", ".yaml", ".yml",
    ".toml", ".ini", ".cfg", ".log", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java",
    ".kt", ".js", ".jsx", ".ts", ".tsx", ".css", ".rb", ".pl", ".php", ".lua", ".sh", ".sql", ".r", ".jl", ".hs", ".ml",
    ".scala", ".swift", ".srt",
))  # fmt: skip
LOOKED_AT = 4096  # bytes of a file of another name, which say whether it is text


class Source(NamedTuple):
    """Part of an input that is read in one go.

    kind: "text" (a file is a document), "jsonl" (bytes start .. stop), "parquet" (row groups), "dataset" (rows).
    size: bytes of it, roughly, for the progress and for cutting units.
    """

    kind: str
    path: str
    start: int
    stop: int
    size: int


class Found(NamedTuple):
    """The files that were named or stand below a named directory, and what below those is no text."""

    files: list[Path]
    skipped: list[Path]

    def note(self) -> str:
        """A line on what was skipped, for whoever named the directories; empty where nothing was."""
        if not self.skipped:
            return ""
        more = "" if len(self.skipped) == 1 else f" and {len(self.skipped) - 1:,} more"
        return f"skipped, since they are no text: {self.skipped[0]}{more} (name a file itself, or --include GLOB, to take it)"


def find(paths: Sequence[str | os.PathLike[str]], include: str | None = None) -> Found:
    """The files named, whatever they are, and the texts below the directories named, sorted.

    Below a directory, links are followed, hidden files and folders are left out, and so is what isn't text: by its name's ending,
    or by its first bytes. With `include`, a pattern of file names such as "*.py", the files that match are taken and no others.
    Raises FileNotFoundError for what isn't there.
    """
    found = Found([], [])
    for path in map(Path, paths):
        if path.is_dir():
            for file in _below(path):
                if include is not None:
                    if fnmatch(file.name, include):
                        found.files.append(file)
                elif file.suffix.lower() in DOCUMENTS or file.suffix.lower() in TEXT or _looks_like_text(file):
                    found.files.append(file)
                else:
                    found.skipped.append(file)
        elif path.is_file():
            found.files.append(path)
        else:
            raise FileNotFoundError(f"no file or directory at {str(path)!r}")
    return found


def _below(directory: Path) -> list[Path]:
    files: list[Path] = []
    seen: set[str] = set()  # a link may lead back to where it stands
    for folder, folders, names in os.walk(directory, followlinks=True):
        place = os.path.realpath(folder)
        folders[:] = [] if place in seen else [name for name in folders if not name.startswith(".")]
        if place not in seen:
            files += [Path(folder, name) for name in names if not name.startswith(".")]
        seen.add(place)
    return sorted(file for file in files if file.is_file())


def _looks_like_text(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(LOOKED_AT)
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # a character may be cut
    except UnicodeDecodeError:
        return False
    return "\0" not in text


def sources(files: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """What files and "hf:NAME[:CONFIG]" are made of, in order."""
    found: list[Source] = []
    for name in files:
        if isinstance(name, str) and name.startswith("hf:"):
            rows = len(_dataset(name))
            for start in range(0, rows, DATASET_ROWS):
                stop = min(start + DATASET_ROWS, rows)
                found.append(Source("dataset", name, start, stop, (stop - start) * 5000))
            continue
        path = Path(name)
        size = path.stat().st_size
        if path.suffix == ".parquet":
            found += _row_groups(path)
        else:
            found.append(Source("jsonl" if path.suffix == ".jsonl" else "text", str(path), 0, size, size))
    return found


def documents(source: Source, field: str) -> Iterator[str]:
    """The texts of a source. ValueError names the file and place of one that can't be read."""
    if source.kind == "text":
        yield read_text(source.path)
    elif source.kind == "jsonl":
        yield from _lines(source, field)
    elif source.kind == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(source.path) as file:
            if field not in file.schema_arrow.names:
                raise ValueError(f"{source.path} has no column {field!r}; it has {', '.join(file.schema_arrow.names)}")
            groups = list(range(source.start, source.stop))
            for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield _text(text, field, source.path)
    else:
        rows = _dataset(source.path)
        for row in range(source.start, source.stop):
            record = rows[row]
            if field not in record:
                raise ValueError(f"{source.path} has no field {field!r}; it has {', '.join(record)}")
            yield _text(record[field], field, f"{source.path}, row {row:,}")


def read_documents(files: Sequence[str | os.PathLike[str]], field: str = "text") -> list[str]:
    """All documents of files, in order."""
    return [text for source in sources(files) for text in documents(source, field)]


def read_text(path: str | os.PathLike[str]) -> str:
    """A file's text, without a byte-order mark; ValueError with the position of the first byte that isn't UTF-8."""
    raw = Path(path).read_bytes()
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start:,}") from error


def _lines(source: Source, field: str) -> Iterator[str]:
    """A line belongs to the range that its first byte is in."""
    with open(source.path, "rb") as file:
        if source.start:
            file.seek(source.start - 1)
            file.readline()
        while (place := file.tell()) < source.stop:
            line = file.readline()
            if place == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            where = f"{source.path}, line at byte {place:,}"
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not a JSON object in UTF-8: {error}") from error
            if not isinstance(record, dict) or field not in record:
                raise ValueError(f"{where}: an object with a field {field!r} was expected, got {line[:60]!r}")
            yield _text(record[field], field, where)


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field!r} must be text, got {value!r:.60}")
    return value.encode("utf-8", errors="replace").decode("utf-8")  # JSON can hold half a surrogate pair, UTF-8 can't


def _row_groups(path: Path) -> list[Source]:
    _needs("pyarrow", str(path))
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error
    return [Source("parquet", str(path), i, i + 1, size) for i, size in enumerate(groups)]


def _dataset(name: str) -> Any:
    """The train split of "hf:NAME[:CONFIG]", from the hub or its cache."""
    _needs("datasets", name)
    import datasets

    path, _, config = name.removeprefix("hf:").partition(":")
    return datasets.load_dataset(path, config or None, split="train")


def _needs(module: str, what: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{what} needs {module}, which isn't installed: pip install 'fastgpt-triton[data]'")
