"""A whole training step, replayed as one CUDA graph: no time between kernels, nothing for Python to do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgpt.graphs import capture

WARMUP_STEPS = 3  # before the capture, for libraries to choose their algorithms and make their workspaces


class CapturedStep:
    """`step(*batch)` as a CUDA graph: the first steps are real ones on a side stream, then comes the capture, then replays.

    Every tensor that the step reads must keep its address: batches are copied into buffers, the learning rate is a tensor. Random
    numbers are right on each replay, since a graph reads the generator's seed and offset when it is launched.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    """

    def __init__(self, step: Callable[..., Tensor], device: torch.device) -> None:
        self._step, self._stream = step, torch.cuda.Stream(device)
        self._replay: Callable[[], None] | None = None
        self._buffers: list[Tensor] = []
        self._warm = 0

    def __call__(self, batch: list[Tensor]) -> Tensor:
        outside = torch.cuda.current_stream(self._stream.device)  # which need not be the current device
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            if not self._buffers:
                self._buffers = [part.clone() for part in batch]
            for buffer, part in zip(self._buffers, batch, strict=True):
                buffer.copy_(part)
            if self._warm < WARMUP_STEPS:
                values = self._step(*self._buffers)
                self._warm += 1
            else:
                if self._replay is None:
                    self._replay, self._values = capture(
                        lambda: self._step(*self._buffers), self._stream.device, warmups=0, stream=self._stream
                    )
                self._replay()
                values = self._values.clone()
        outside.wait_stream(self._stream)
        return values
