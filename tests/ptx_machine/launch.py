"""A launch: a grid of a parsed kernel, run batch by batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .allocation import Allocation
from .batch import Batch
from .global_memory import GlobalMemory
from .parse import Kernel, PtxError
from .report import Report

_LANES = 8192  # threads of a batch, about: registers of this many stay in the cache
_ORDERED = 2048  # CTAs whose orders by atomics are followed
_KEPT = 1 << 28  # bytes of registers of decoded batches that are kept
_decoded: dict[tuple, Batch] = {}  # with the kernel, which keeps its id from meaning another


class Launch:
    """One launch of a kernel on memory that it may touch."""

    def __init__(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        arguments: Sequence[bytes],
        memory: GlobalMemory,
        report: Report,
        shared_size: int = 0,
        threads: int | None = None,
        cooperative: bool = False,
        races: bool = True,
        lanes: int = _LANES,
        dependent: bool = False,
        seconds: float | None = None,
        tensor_maps: dict[str, Any] | None = None,
        poison: int = 0xFF,
    ) -> None:
        """dependent: grids before it may still run. tensor_maps: by the names of parameters. poison fills shared memory."""
        self.kernel, self.memory, self.report, self.races = kernel, memory, report, races
        self.grid = tuple([*grid, 1, 1][:3])
        self.threads = threads or kernel.threads
        self.shared_size = max(shared_size, max((at + size for at, size, _ in kernel.shared.values()), default=0))
        self.lanes, self.poison, self.dependent = lanes, poison, dependent
        self.clock, self.steps = 1, 0
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.synchronises = kernel.synchronises
        self.whole = cooperative  # CTAs that wait for each other must run together
        if len(arguments) != len(kernel.params):
            raise PtxError(f"{kernel.name}: {len(arguments)} arguments for {len(kernel.params)} parameters")
        self.parameters = dict(zip((p.name for p in kernel.params), arguments, strict=True))
        self.variables: dict[str, int] = {}
        # addresses that no memory has
        self.map_addresses = {name: 2**60 + 1024 * i for i, name in enumerate(tensor_maps or {})}
        self.tensor_maps = {self.map_addresses[name]: tensor for name, tensor in (tensor_maps or {}).items()}
        for name, data in kernel.variables.items():
            array = kernel.arrays.setdefault(name, np.empty(len(data), np.uint8))  # where decoded steps look for it
            array[:] = np.frombuffer(data, np.uint8)
            self.variables[name] = array.ctypes.data
            memory.add(Allocation(array.ctypes.data, len(array), name))

    def cta_index(self, cta: Any) -> tuple[Any, Any, Any]:
        x, y, _ = self.grid
        return cta % x, cta // x % y, cta // (x * y)

    def run(self) -> None:
        ctas = self.grid[0] * self.grid[1] * self.grid[2]
        self.report.kernel = self.kernel.name
        self.memory.begin(self.threads, ctas, self.synchronises and ctas <= _ORDERED)
        size = ctas if self.whole else max(1, min(ctas, self.lanes // self.threads))
        batches = -(-ctas // size)
        size = -(-ctas // batches)
        with np.errstate(all="ignore"):
            for first in range(0, ctas, size):
                batch = self._batch(min(size, ctas - first))
                batch.begin(self, first)
                batch.run()

    def _batch(self, ctas: int) -> Batch:
        """One that was decoded for an earlier launch, where there is one."""
        key = id(self.kernel), self.grid, self.threads, ctas
        batch = _decoded.pop(key, None) or Batch(self, ctas)
        _decoded[key] = batch  # the newest is the last
        while len(_decoded) > 1 and sum(b.bytes for b in _decoded.values()) > _KEPT:
            del _decoded[next(iter(_decoded))]
        return batch
