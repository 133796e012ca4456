"""What the host did to the device, with the line that did it."""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import _pytest
import pluggy
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
# Whose lines say nothing of who asked: torch's, Python's own, and pytest's.
UNTOLD = [Path(module.__file__).resolve().parent for module in (torch, os, pytest, _pytest, pluggy)]

# The host waits until the device has done all that it was given: a value read, a copy to pageable memory, a synchronization.
READ = "read"
# A copy of the host's memory to the device that makes the host wait: it isn't pinned, or not asked to be asynchronous.
UPLOAD = "upload"
# The same, asynchronous, of pageable memory: the driver stages it, and small ones don't wait.
STAGED = "staged upload"
# Asynchronous, of pinned memory: nobody waits.
PINNED = "pinned upload"
DOWNLOAD = "download"  # asynchronous, into pinned memory

WAITS = (READ, UPLOAD, STAGED)


class Event(NamedTuple):
    kind: str
    what: str
    where: str  # file:line function, the innermost that is neither torch's nor this folder's

    def __str__(self) -> str:
        return f"{self.kind}: {self.what} at {self.where}"


@dataclass
class Trace:
    """Of everything inside a `watching`."""

    events: list[Event] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)  # Triton launches by name, those of a capture included
    captures: int = 0
    replays: int = 0

    def count(self, *kinds: str) -> int:
        return sum(event.kind in kinds for event in self.events)

    def told(self, *kinds: str) -> str:
        """The events of these kinds, or of all, a line each kind and place."""
        counted = Counter(str(event) for event in self.events if not kinds or event.kind in kinds)
        return "\n".join(f"  {count} x {line}" for line, count in sorted(counted.items()))


_watching: list[Trace] = []


@contextmanager
def watching() -> Iterator[Trace]:
    """A Trace of what happens inside; they nest."""
    trace = Trace()
    _watching.append(trace)
    try:
        yield trace
    finally:
        _watching.remove(trace)


@contextmanager
def unwatched() -> Iterator[None]:
    """For what a scenario needs and isn't about: making a model."""
    kept, _watching[:] = _watching[:], []
    try:
        yield
    finally:
        _watching[:] = kept


def note(kind: str, what: str) -> None:
    if _watching:
        event = Event(kind, what, where())
        for trace in _watching:
            trace.events.append(event)


def current() -> list[Trace]:
    return _watching


def where() -> str:
    """file:line function of the innermost frame that is neither torch's nor this folder's instrument, and its caller."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < 2:
        if (shown := _shown(frame.f_code.co_filename)) is not None:
            found.append(f"{shown}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return ", from ".join(found)


@functools.cache
def _shown(name: str) -> str | None:
    """A file as it is told, or None for one that isn't."""
    path = Path(name).resolve()
    if name.startswith("<") or any(root in path.parents for root in UNTOLD) or path.parent == HERE:
        return None
    return str(path.relative_to(ROOT)) if ROOT in path.parents else "/".join(path.parts[-3:])
