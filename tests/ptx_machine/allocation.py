"""Memory that a launch may touch, and the shadow of what its threads did there."""

from __future__ import annotations

import ctypes

import numpy as np

from .floats import RAW

WATCHED = 1 << 26  # bytes of the largest allocation that is watched for more than its bounds; a shadow is 40 times that
WRITTEN, READ = np.uint8(1), np.uint8(2)  # flags of a byte that a grid touches


class Allocation:
    """Bytes that a launch may touch: a tensor's storage, or a variable of the module."""

    def __init__(
        self,
        start: int,
        size: int,
        name: str,
        itemsize: int = 1,
        valid: np.ndarray | None = None,
        keep: np.ndarray | None = None,
    ) -> None:
        self.start, self.size, self.end, self.name, self.itemsize = start, size, start + size, name, itemsize
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start)) if size else np.empty(0, "u1")
        self.views = {n: self.bytes[: size // n * n].view(dtype) for n, dtype in RAW.items()}
        self.valid = valid  # a flag a byte: whether it was ever written; None where all were
        self.keep = keep  # the array whose memory it is
        self.granule = 0
        self.written = False
        self.reads: list[tuple[np.ndarray, np.ndarray, int, np.ndarray]] = []
        self.reads_kept = 0
        self.cta_time: np.ndarray | None = None
        self.cta_reader: np.ndarray | None = None
        # byte -> the thread that writes what others read, unordered if they read after that time
        self.raced: dict[int, tuple[int, int]] = {}
        self.replaced = False
        self.unfinished: np.ndarray | None = (
            None  # flags of what earlier grids do to each byte, that may not have ended
        )

    def begin(self) -> None:
        """Forget the accesses of the launch before."""
        self.granule, self.written, self.reads, self.reads_kept = 0, False, [], 0
        self.cta_time = self.cta_reader = None  # of each CTA's last read, and its thread; -2 for several

    def touched(self, flags: np.ndarray | None) -> np.ndarray | None:
        """`flags` of each byte and those of the launch that has ended; None if there are none."""
        if self.granule == 0:
            return flags
        read = self.last_reader >= 0 if self.cta_time is None else (self.cta_time >= 0).any(0)
        mine = np.repeat(WRITTEN * (self.writer >= 0) | READ * read, self.granule)[: self.size]
        return mine if flags is None or len(flags) != len(mine) else mine | flags

    def place(self, offset: int) -> str:
        return f"{self.name} + {offset} bytes (element {offset // self.itemsize} of {self.size // self.itemsize})"

    def _shadow(self, granule: int) -> None:
        if self.granule == 0:
            self.granule = granule
            n = -(-self.size // granule)
            self.write_time = np.full(n, -1, np.int64)
            self.writer = np.full(n, -1, np.int64)
            self.read_time = np.full(n, -1, np.int64)
            self.first_reader = np.full(n, np.iinfo(np.int64).max, np.int64)
            self.last_reader = np.full(n, -1, np.int64)
        elif granule < self.granule:
            ratio, self.granule = self.granule // granule, granule
            if self.cta_time is not None:
                self.cta_time, self.cta_reader = (np.repeat(x, ratio, axis=1) for x in (self.cta_time, self.cta_reader))
            for name in ("write_time", "writer", "read_time", "first_reader", "last_reader"):
                setattr(self, name, np.repeat(getattr(self, name), ratio))
            spread = np.arange(ratio)
            self.reads = [
                ((at[:, None] * ratio + spread).reshape(-1), np.repeat(who, ratio), time, np.repeat(bar, ratio))
                for at, who, time, bar in self.reads
            ]

    def granules(self, offsets: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """Indices of the granules of each access, one row after another, and how many a row has."""
        if size < self.granule or self.granule == 0:
            self._shadow(size)
        at, count = offsets // self.granule, size // self.granule
        return (at if count == 1 else (at[:, None] + np.arange(count)).reshape(-1)), count
