"""CUDA graphs: the one door to capturing work on static buffers and replaying it.

A capture that fails leaves torch in a state that no later call expects: capture_end raises before it gives back the stream, the
generator and the memory pool (torch 2.11 and 2.13). `capture` puts them right, so that the caller may go on without a graph.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


class CaptureError(RuntimeError):
    """Why a CUDA graph can't hold something; the error of the op that broke the capture is its cause."""


class Graph:
    """Calls a function that works on static buffers; on a GPU by replaying what was captured at the first call.

    `moved` are the buffers that the function reads and changes, for the run that compiles its kernels to leave as they were.
    """

    def __init__(self, moved: Sequence[Tensor], device: torch.device) -> None:
        self._moved, self._device = moved, device
        self._replay: Callable[[], None] | None = None

    def __call__(self, run: Callable[[], None]) -> None:
        if self._device.type != "cuda":
            run()
            return
        if self._replay is None:
            self._replay, _ = capture(run, self._device, moved=self._moved)
        self._replay()


def capture(
    run: Callable[[], _T],
    device: torch.device,
    *,
    moved: Sequence[Tensor] = (),
    warmups: int = 1,
    stream: torch.cuda.Stream | None = None,
) -> tuple[Callable[[], None], _T]:
    """(replay, what `run` returned under capture: memory of the graph's own, written anew by each replay).

    Args:
        run: works on tensors of `device` that keep their addresses; reads nothing back.
        device: of CUDA; needn't be the current one.
        moved: what `run` reads and changes; after each warm-up it is as before.
        warmups: runs before the capture, to compile kernels and let libraries choose; 0 where the caller made them, on `stream`.
        stream: to capture from; a backward pass has to be where its forward was. A new one by default.

    Raises CaptureError with the line of the op that a graph can't hold. The process can go on, random numbers included; only
    graphs captured before then draw from a generator that torch.manual_seed no longer reaches.
    """
    with torch.cuda.device(device):
        outside = torch.cuda.current_stream()
        stream = torch.cuda.Stream() if stream is None else stream
        before = [t.clone() for t in moved]
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):
            for _ in range(warmups):
                run()
                for t, was in zip(moved, before, strict=True):
                    t.copy_(was)
        outside.wait_stream(stream)
        return _captured(run, stream, outside)


def _captured(
    run: Callable[[], _T], stream: torch.cuda.Stream, outside: torch.cuda.Stream
) -> tuple[Callable[[], None], _T]:
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    broken: BaseException | None = None
    try:
        # Other threads of the caller's may allocate meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                outputs = run()
            except BaseException as error:
                broken = error
                raise
    except BaseException as error:
        if error is not broken:
            _repair(outside, pool)
        cause = broken or error
    else:
        return graph.replay, outputs
    if isinstance(cause, torch.OutOfMemoryError) or not isinstance(cause, RuntimeError):
        raise cause  # no graph's fault
    raise CaptureError(_told(broken, cause)) from cause


def _repair(outside: torch.cuda.Stream, pool: Any) -> None:
    """Give back what a capture that couldn't be ended still holds."""
    torch.cuda.set_stream(outside)
    generator = torch.cuda.default_generators[outside.device_index]
    generator.graphsafe_set_state(generator.clone_state())  # the copy doesn't take itself to be in a capture
    with contextlib.suppress(RuntimeError):  # where the end got as far as that
        torch._C._cuda_endAllocateToPool(outside.device_index, pool)
        torch._C._cuda_releasePool(outside.device_index, pool)


def _told(broken: BaseException | None, error: BaseException) -> str:
    if broken is None:
        return f"the capture of a CUDA graph couldn't be ended, and no op in it had raised: {_first_line(error)}"
    frames = traceback.extract_tb(broken.__traceback__)
    torchs = Path(torch.__file__).parent
    at = next((frame for frame in reversed(frames) if torchs not in Path(frame.filename).parents), frames[-1])
    return f"no CUDA graph can hold `{at.line}` ({at.filename}:{at.lineno}, {at.name}): {_first_line(broken)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
