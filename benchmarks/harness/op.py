"""An op as data -> a Benchmark: its inputs, sizes, traffic and peers; this file makes providers and candidates of them.

Every op has three providers for nothing: fastgpt (the Triton kernels on a GPU and in a dry run, elsewhere what the CPU runs),
plain PyTorch (fastgpt.reference, eager) and the same under torch.compile. Peers are functions of a case that return a function
of the op's inputs, or raise Absent.

    forward    fn(*inputs) without gradients
    backward   the gradients alone, of a graph made before, for a random incoming one
    both       forward and gradients together, for an op that computes them at once
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.measure import (
    OURS,
    Absent,
    Benchmark,
    Candidate,
    Case,
    Work,
    check_close,
    clock,
    device,
    looped,
    needs_cuda,
)
from fastgpt import ops, reference, use_backend
from fastgpt.ops import triton_unavailable

PLAIN = "torch"
COMPILED = "torch.compile"
Function = Callable[..., Any]

# Buffers in turn are larger than the last cache together, and few enough to be captured quickly. Many times an H100's 50 MB of
# L2, for which writes are many; a CPU's L3, of which this process may not even have all, a third more.
CACHES = {"cuda": 4.0, "cpu": 1.34}
MAX_BUFFERS = {"cuda": 256, "cpu": 64}
# FLOPs a byte from which a CPU's cores are what limits it: there 16 MB are enough, and where only growth is looked at.
COMPUTE_BOUND = 10.0
SMALL_BYTES = 16e6


class Draw:
    """Random inputs on the benchmark's device; never zeros."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device(), dtype=torch.float32).mul_(std).to(self.dtype)

    def ids(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, device=device())


@dataclass(frozen=True)
class Op:
    """inputs(size, draw) -> the op's tensors. gradients: indices of the inputs that have one.

    work: mode -> (size, bytes of an element) -> Work. sizes: scale -> sizes; growth: scale -> what to vary about the first of
    them. options: keywords of every call, of which `shown` name the case. peers: name -> case -> function. direct,
    plain: what fastgpt and plain PyTorch call where neither dispatch nor fastgpt.reference has the op. check: (inputs, outputs)
    -> Wrong or nothing, where there is no one right result.
    """

    name: str
    inputs: Callable[[Mapping[str, int], Draw], tuple[Tensor, ...]]
    work: Mapping[str, Callable[[Mapping[str, int], int], Work]]
    sizes: Mapping[str, Sequence[Mapping[str, int]]]
    gradients: tuple[int, ...] = ()
    growth: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    shown: tuple[str, ...] = ("activation", "causal")
    peers: Mapping[str, Callable[[Case], Function]] = field(default_factory=dict)
    direct: Function | None = None
    plain: Function | None = None
    check: Callable[[Sequence[Tensor], Sequence[Tensor]], None] | None = None

    @property
    def benchmark(self) -> Benchmark:
        names = (OURS, PLAIN, COMPILED, *self.peers)
        providers = {name: functools.partial(self._prepare, name) for name in names}
        return Benchmark(self.name, "kernels", lambda scale: list(self._cases(scale)), providers, rounds=9)

    def _cases(self, scale: str) -> Iterator[Case]:
        base = self.sizes[scale]
        sizes: list[tuple[Mapping[str, int], str | None]] = [(size, None) for size in base]
        for name, values in self.growth.get(scale, {}).items():
            sizes += [({**base[0], name: value}, name) for value in values if value != base[0][name]]
        dtype = torch.bfloat16 if scale == "gpu" else torch.float32
        for (size, grows), mode in itertools.product(sizes, self.work):
            work = self.work[mode](size, dtype.itemsize)
            variant = {name: value for name, value in self.options.items() if name in self.shown}
            yield Case(self.name, {**size, **variant}, mode, str(dtype).removeprefix("torch."), work, grows=grows)

    def _prepare(self, name: str, case: Case) -> Candidate:
        if case.grows and name not in (OURS, PLAIN):
            raise Absent("growth is measured of fastgpt and plain PyTorch")
        return self.candidate(self.function(name, case), case)

    def function(self, name: str, case: Case) -> Function:
        """What provider `name` calls."""
        if name == OURS:
            return functools.partial(self.direct or kernel(self.name), **self.options)
        plain = self.reference
        if device().type == "cpu" and not interpreting() and name in (PLAIN, COMPILED):
            raise Absent("it is what fastgpt runs on a CPU" if name == PLAIN else "an op is compiled on a GPU only")
        if name == PLAIN:
            return plain
        if name == COMPILED:
            return compiled(plain)
        return self.peers[name](case)

    @property
    def reference(self) -> Function:
        return functools.partial(self.plain or getattr(reference, self.name), **self.options)

    def candidate(self, function: Function, case: Case) -> Candidate:
        problem = _problem(self, case)
        stream = None
        if device().type == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
        # A backward pass runs where its forward did: all of it on the stream that a graph is captured from.
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            calls = [problem.call(i, function) for i in range(len(problem.inputs))]
            for call in calls:
                call()
            outputs = [call() for call in calls]
        clock()
        problem.check(outputs)  # before a graph is captured of it
        timer = "host" if stream is None else "graph"
        try:
            run, count = looped(calls, stream)
        except RuntimeError as error:
            if stream is None:
                raise
            timer = f"host, since no graph takes it: {error}".splitlines()[0][:200]
            run, count = looped(calls, None)
        notes = {"timer": timer, "buffers": len(calls), "error": problem.error}
        return Candidate(run, problem.check, problem.refresh, problem.poison, count, notes)


class Problem:
    """An op at one size: rotating inputs that all providers share, and what is right for them."""

    def __init__(self, op: Op, case: Case) -> None:
        self.op, self.case = op, case
        draw = Draw(case.torch_dtype)
        self._new = lambda: op.inputs(case.size, draw)
        first = self._new()
        moved = case.work.read + case.work.written
        small = device().type == "cpu" and (case.grows is not None or case.work.flops > COMPUTE_BOUND * moved)
        count = math.ceil((SMALL_BYTES if small else rotated_bytes()) / max(moved, 1.0))
        most = 2 if interpreting() else MAX_BUFFERS[device().type]
        self.inputs = [first, *(self._new() for _ in range(max(1, min(count, most)) - 1))]
        self.incoming: list[tuple[Tensor, ...]] = []
        if case.mode == "backward":
            outputs = _tuple(op.reference(*first))
            self.incoming = [tuple(torch.randn_like(o) for o in outputs) for _ in self.inputs]
        self.turn, self.error = 0, 0.0
        self._known: tuple[int, tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def call(self, i: int, function: Function) -> Callable[[], tuple[Tensor, ...]]:
        """What is timed: `function` on inputs i in the case's mode."""
        if self.case.mode == "forward":

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return _tuple(function(*self.inputs[i]))

            return forward
        leaves = [x.detach().requires_grad_(j in self.op.gradients) for j, x in enumerate(self.inputs[i])]
        wanted = [leaves[j] for j in self.op.gradients]
        if self.case.mode == "both":

            def both() -> tuple[Tensor, ...]:
                loss = function(*leaves)
                return loss.detach(), *torch.autograd.grad(loss, wanted)

            return both
        outputs = _tuple(function(*leaves))
        return lambda: torch.autograd.grad(outputs, wanted, self.incoming[i], retain_graph=True)

    def refresh(self) -> None:
        """New data in the memory of the buffer that is checked next. A backward pass gets a new incoming gradient: its
        forward was before."""
        self.turn += 1
        i = self.turn % len(self.inputs)
        backward = self.case.mode == "backward"
        tensors = self.incoming[i] if backward else self.inputs[i]
        with torch.no_grad():
            for tensor, values in zip(
                tensors, map(torch.randn_like, tensors) if backward else self._new(), strict=True
            ):
                tensor.copy_(values)
        self._known = None

    def poison(self, outputs: Sequence[tuple[Tensor, ...]]) -> None:
        """NaN, or -1, in all outputs, but for a gradient that is the incoming one itself or has no memory of its own."""
        given = {x.untyped_storage().data_ptr() for held in (*self.inputs, *self.incoming) for x in held}
        with torch.no_grad():
            for out in (out for held in outputs for out in held):
                if out.untyped_storage().data_ptr() not in given and 0 not in out.stride():
                    out.fill_(math.nan if out.is_floating_point() else -1)

    def check(self, outputs: Sequence[tuple[Tensor, ...]]) -> None:
        """One buffer's outputs against float64, another one each time."""
        i = self.turn % len(self.inputs)
        if self.op.check is not None:
            return self.op.check(self.inputs[i], outputs[i])
        if self._known is None or self._known[0] != i:
            self._known = i, *self._right(i)
        _, plain, exact = self._known
        self.error = check_close(outputs[i], plain, exact, torch.finfo(self.case.torch_dtype).eps)

    def _right(self, i: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Plain PyTorch's outputs for inputs i, in the case's dtype and in float64."""
        function = self.op.reference
        plain = self.call(i, function)()
        kept = self.inputs[i], self.incoming[i : i + 1]
        self.inputs[i] = tuple(x.double() if x.is_floating_point() else x for x in kept[0])
        self.incoming[i : i + 1] = [tuple(g.double() for g in incoming) for incoming in kept[1]]
        try:
            return plain, self.call(i, function)()
        finally:
            self.inputs[i], self.incoming[i : i + 1] = kept


@functools.cache
def rotated_bytes() -> float:
    """What buffers in turn come to: CACHES times the last cache, which Linux says of a CPU, else 64 MB."""
    if device().type == "cuda":
        size = torch.cuda.get_device_properties(0).L2_cache_size
    else:
        files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        size = max((1024 * int(file.read_text().strip().removesuffix("K")) for file in files), default=64 << 20)
    return CACHES[device().type] * size


# The problem of the case in hand, which its providers share.
_latest: list[Problem] = []


def _problem(op: Op, case: Case) -> Problem:
    if not _latest or _latest[0].case != case:
        _latest[:] = [Problem(op, case)]
    return _latest[0]


def kernel(name: str) -> Function:
    """The op through dispatch: Triton where it can run, else what `auto` takes."""
    backend = "triton" if device().type == "cuda" or interpreting() else "auto"

    def call(*args: Any, **options: Any) -> Any:
        with use_backend(backend):
            return getattr(ops, name)(*args, **options)

    return call


class MetaDraw(Draw):
    """Shapes without data."""

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def ids(self, limit: int, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")


def call_on_meta(op: Op, case: Case) -> None:
    """The op's kernels on tensors without data, backward too where the case has it: for whoever records launches."""
    tensors = op.inputs(case.size, MetaDraw(case.torch_dtype))
    backward = case.mode != "forward"
    leaves = [t.requires_grad_(backward and i in op.gradients) for i, t in enumerate(tensors)]
    out = (op.direct or getattr(importlib.import_module("fastgpt_kernels"), op.name))(*leaves, **op.options)
    if backward:
        torch.autograd.backward(_tuple(out), [torch.empty_like(o) for o in _tuple(out)])


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, a thousand times slower."""
    return device().type == "cpu" and triton_unavailable(device(), torch.float32) is None


def compiled(function: Function) -> Function:
    needs_cuda("torch.compile of one op")
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
