"""The CUDA runtime's Python door, pretended: one H100, streams, events, captures that fail as torch's do, and nothing done.

What a capture forbids raises, and invalidates the capture: `torch.cuda.graph` then raises at its end as well, and leaves the
stream, the generator and the memory pool as torch 2.11 leaves them. Only what fastgpt and torch's own Python ask is here.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from fake_gpu import trace

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    shared_memory_per_multiprocessor=233472,
)


class Forbidden(RuntimeError):
    """What CUDA says of an operation inside a capture."""


class Runtime:
    """The pretended device's state; one a process, `RUNTIME`."""

    def __init__(self) -> None:
        self.capability = (9, 0)
        self.free_bytes = 70 << 30
        self.current: Stream = Stream("default")
        self.capturing: Stream | None = None
        self.invalid = False  # the capture in hand
        self.generator_usable = True
        self.pools: set[tuple[int, int]] = set()
        self.observers: list[Any] = []  # called where an allocation finds no room
        self.copies = itertools.count(1)  # asynchronous ones to the host, numbered
        self.copied, self.arrived = 0, 0  # the newest started, and the newest waited for

    @property
    def in_capture(self) -> bool:
        return self.capturing is self.current

    def forbid(self, what: str) -> None:
        """Raise if a capture is going on."""
        if self.in_capture:
            self.invalid = True
            raise Forbidden(f"CUDA error: operation not permitted when stream is capturing: {what} at {trace.where()}")

    def wait(self, what: str) -> None:
        """The host waits for all that the device has been given."""
        self.forbid(what)
        trace.note(trace.READ, what)
        self.arrived = self.copied

    def as_new(self) -> bool:
        """Whether no capture has left anything behind."""
        return self.current.name == "default" and self.generator_usable and not self.pools and self.capturing is None


class Stream:
    def __init__(self, device: Any = None, *args: Any, **kwargs: Any) -> None:
        self.name, self.device, self.device_index = (
            device if device == "default" else "side",
            torch.device("cuda", 0),
            0,
        )
        self.cuda_stream = id(self)

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return RUNTIME.capturing is self

    def synchronize(self) -> None:
        RUNTIME.wait("Stream.synchronize")


class Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._copied: int | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._copied = RUNTIME.copied

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        RUNTIME.forbid("Event.query")
        return True

    def synchronize(self) -> None:
        """Waits for what was before it alone, which is still a wait for the device."""
        RUNTIME.forbid("Event.synchronize")
        trace.note(trace.READ, "Event.synchronize")
        if self._copied is not None:
            RUNTIME.arrived = max(RUNTIME.arrived, self._copied)

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class StreamContext:
    """torch.cuda.stream(…); one that is never left, as by a failed capture, stays in force."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before, RUNTIME.current = RUNTIME.current, self._stream or RUNTIME.current

    def __exit__(self, *error: object) -> None:
        RUNTIME.current = self._before


class CUDAGraph:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._captured = False

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        if RUNTIME.capturing is not None:
            RUNTIME.invalid = True
            raise Forbidden("CUDA error: a capture is going on already")
        RUNTIME.pools.add(pool)
        RUNTIME.capturing, RUNTIME.invalid, RUNTIME.generator_usable = RUNTIME.current, False, False
        self._pool = pool

    def capture_end(self) -> None:
        RUNTIME.capturing = None
        if RUNTIME.invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        RUNTIME.pools.discard(self._pool)
        RUNTIME.generator_usable, self._captured = True, True
        for seen in trace.current():
            seen.captures += 1

    def replay(self) -> None:
        if not self._captured:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        RUNTIME.forbid("CUDAGraph.replay")
        for seen in trace.current():
            seen.replays += 1


class Capture:
    """torch.cuda.graph, whose end raises before it leaves the stream."""

    def __init__(
        self, graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> None:
        self._graph, self._pool = graph, pool or (1, next(_pools))
        self._on, self._mode = StreamContext(stream or Stream()), capture_error_mode

    def __enter__(self) -> None:
        RUNTIME.forbid("torch.cuda.synchronize")
        self._on.__enter__()
        self._graph.capture_begin(self._pool, self._mode)

    def __exit__(self, *error: object) -> None:
        self._graph.capture_end()
        self._on.__exit__()


class DefaultGenerator:
    def clone_state(self) -> str:
        return "a copy"

    def graphsafe_set_state(self, state: str) -> None:
        RUNTIME.generator_usable = True


class Generator(torch._C.Generator):
    """torch.Generator on any device: the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        self = super().__new__(cls, "cpu")
        self._on = torch.device(device)
        return self

    @property
    def device(self) -> torch.device:
        return self._on


RUNTIME = Runtime()
_pools = itertools.count(1)


@contextlib.contextmanager
def _on_device(device: Any) -> Iterator[None]:
    yield


def _end_pool(device: int, pool: tuple[int, int]) -> None:
    if pool not in RUNTIME.pools:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")


def _set_stream(stream: Stream) -> None:
    RUNTIME.current = stream


def install() -> None:
    """Put all of it in torch.cuda's place, for the rest of the process."""
    cuda = torch.cuda
    doors = {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": _on_device,
        "get_device_capability": lambda device=None: RUNTIME.capability,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "Stream": Stream,
        "Event": Event,
        "stream": StreamContext,
        "current_stream": lambda device=None: RUNTIME.current,
        "default_stream": lambda device=None: DEFAULT_STREAM,
        "set_stream": _set_stream,
        "synchronize": lambda device=None: RUNTIME.wait("torch.cuda.synchronize"),
        "CUDAGraph": CUDAGraph,
        "graph": Capture,
        "graph_pool_handle": lambda: (0, next(_pools)),
        "is_current_stream_capturing": lambda: RUNTIME.in_capture,
        "default_generators": (DefaultGenerator(),),
        "mem_get_info": lambda device=None: (RUNTIME.free_bytes, PROPERTIES.total_memory),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "_lazy_init": lambda: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }
    for name, door in doors.items():
        setattr(cuda, name, door)
    torch._C._cuda_endAllocateToPool = _end_pool
    torch._C._cuda_releasePool = lambda device, pool: RUNTIME.pools.discard(pool)
    torch._C._cuda_attachOutOfMemoryObserver = RUNTIME.observers.append
    torch.accelerator.current_stream = lambda device=None: RUNTIME.current
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
    torch.Generator = Generator
    cuda.amp.common.amp_definitely_not_available = lambda: False


DEFAULT_STREAM = RUNTIME.current
