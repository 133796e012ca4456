"""CUDA graphs: what works on static buffers, captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Graph:
    """Calls a function that works on static buffers; on a GPU by replaying what was captured at the first call.

    `moved` are the buffers that the function reads and changes, for the run that compiles its kernels to leave as they were.
    """

    def __init__(self, moved: Sequence[Tensor], device: torch.device) -> None:
        self._moved, self._device = moved, device
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, run: Callable[[], None]) -> None:
        if self._device.type != "cuda":
            run()
            return
        if self._graph is None:
            self._graph = self._captured(run)
        self._graph.replay()

    def _captured(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        # On a stream of this device, which need not be the current one; compiled and warm before the capture.
        before, graph = [t.clone() for t in self._moved], torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            for moved, was in zip(self._moved, before, strict=True):
                moved.copy_(was)
            # Other threads of the caller's may allocate meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                run()
        return graph
