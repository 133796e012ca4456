"""Files that are never half-written: a temporary file beside the place, synced, then renamed. And where the bundled ones are."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

BUNDLED = Path(__file__).parent / "assets"  # the small model that comes with the package, and its tokenizer


def atomic_write(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and rename it: `path` is the old file or the whole new one.

    Missing directories are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = str(path.parent / f".{path.name}.{secrets.token_hex(8)}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # 666 less the umask, as open() has it
    mode = os.stat(temporary).st_mode & 0o777
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # safetensors puts a file of its own there, which only the owner may read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Make renames inside a directory survive a power cut; nothing to do where a directory can't be opened (Windows)."""
    if os.name == "posix":
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`atomic_write` of UTF-8 text."""
    atomic_write(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
