"""Triton kernels, compiled to PTX for a GPU that isn't here, run on CPU tensors.

    with machine(90) as m:
        m.run(kernel, grid, *args, BLOCK=…, num_warps=…)    # any @triton.jit kernel
        y = fastgpt_kernels.layer_norm(x, weight, bias)     # whatever fastgpt_kernels launches

At the end a finding of the checkers is raised as CheckError, unless `strict` is false; `m.report` has them all.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fastgpt_kernels import _launch

from .allocation import WATCHED, Allocation
from .boxes import TensorMap
from .global_memory import GlobalMemory
from .launch import Launch
from .parse import Kernel, parse
from .report import Finding, Report
from .shared_memory import COPY_UNFENCED

KERNELS = ("fastgpt_kernels", "mutant_")  # modules whose uninitialised tensors are watched
_SHOWN = 5  # findings in an error's message
_POISON, _OTHER = 0xFF, 0x11  # what nobody wrote: NaN in any float; and for a replay

# Triton before 3.7 puts no fence.proxy.async between a cp.async and the wgmma that reads what it brought:
# https://github.com/triton-lang/triton/pull/9610
COMPILERS = {COPY_UNFENCED} if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else set()

# Where this is a list, findings of COMPILERS go to it and not among a machine's errors: for a test to be judged by the rest.
compilers: list[Finding] | None = None


class CheckError(Exception):
    """A launch did something wrong."""


class _Driver:
    """As much of a driver as Triton's JIT asks for before it compiles."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"ptx machine, sm{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


def _stop_at_ptx(*stage: Any) -> tuple[str, str] | None:
    """Triton's hook into its pipeline: no ptxas runs. Asked for nothing, it says what its doing is called in a cache's key."""
    if not stage:
        return "ptx", "ptx"
    stage[1]["cubin"] = lambda ptx, metadata: b""
    return None


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> Kernel:
    return parse(text)


@dataclasses.dataclass
class Timing:
    kernel: str
    ctas: int
    seconds: float
    compile_seconds: float
    steps: int  # instructions, one for all threads of a batch that run it together


class Machine:
    """Who launches, as fastgpt_kernels._launch.Launcher: for compute capability `arch`, 80 or 90, with `sms` multiprocessors.

    races: watch for them. lanes: threads of a batch. seconds: a launch that takes longer raises. change: edits the PTX.
    """

    device_types: tuple[str, ...] = ("cpu",)

    def __init__(
        self,
        arch: int = 80,
        sms: int = 4,
        races: bool = True,
        lanes: int | None = None,
        seconds: float | None = None,
        change: Callable[[str], str] | None = None,
    ) -> None:
        self._arch, self._sms = arch, sms
        self.races, self.lanes, self.seconds, self.change = races, lanes, seconds, change
        self.report = Report()
        self.timings: list[Timing] = []
        self._fresh: dict[int, tuple[Tensor, np.ndarray, int]] = {}  # uninitialised storages by address
        self._texts: dict[str, str] = {}  # changed PTX by the compiled kernel's hash
        self._last: GlobalMemory | None = None  # of the launch before
        self._unfinished: dict[int, np.ndarray] = {}  # what grids before may still do, by address

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.run(kernel, grid, *args, **kwargs)

    def arch(self, device: torch.device) -> int:
        return self._arch

    def sm_count(self, device: torch.device) -> int:
        return self._sms

    def run(self, kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        compiled = kernel.warmup(*args, grid=grid, **kwargs)
        parsed = self._kernel(compiled)
        bound = {p.name: p.default for p in kernel.params} | dict(zip(kernel.arg_names, args, strict=False))
        bound |= {name: value for name, value in kwargs.items() if name in bound}
        values = [bound[name] for name, type_ in compiled.src.signature.items() if type_ != "constexpr"]
        memory = GlobalMemory(self._allocations(bound), self.report, self.races)
        compile_seconds, started = time.perf_counter() - started, time.perf_counter()
        metadata = compiled.metadata
        flat = list(_flatten(values, iter(getattr(metadata, "tensordesc_meta", None) or [])))
        packed = [_pack(v, p.size, p.type) for v, p in zip(flat, parsed.params, strict=False)]
        maps = {p.name: v for v, p in zip(flat, parsed.params, strict=False) if isinstance(v, TensorMap)}
        if callable(grid):
            grid = grid(bound)
        scratch = self._scratch(metadata, grid, parsed.params[len(packed) :], memory)
        dependent = bool(getattr(metadata, "launch_pdl", False))
        self._unfinished = self._last.touched(self._unfinished) if dependent and self._last else {}
        for allocation in memory.allocations:
            flags = self._unfinished.get(allocation.start)
            allocation.unfinished = flags if flags is not None and len(flags) == allocation.size else None

        def launch_with(report: Report, poison: int) -> Launch:
            memory.report = report
            launch = Launch(
                parsed,
                grid,
                packed + scratch,
                memory,
                report,
                metadata.shared,
                32 * metadata.num_warps,
                cooperative=bool(getattr(metadata, "launch_cooperative_grid", False)),
                dependent=dependent,
                races=self.races,
                seconds=self.seconds,
                tensor_maps=maps,
                poison=poison,
                **({"lanes": self.lanes} if self.lanes else {}),
            )
            launch.run()
            return launch

        before = None
        if sum(a.size for a in memory.allocations) <= 2 * WATCHED:
            before = [(a, a.bytes.copy(), None if a.valid is None else a.valid.copy()) for a in memory.allocations]
        self.report.touched.clear()
        launch = launch_with(self.report, _POISON)
        doubtful = [
            self.report.findings[key] for key in self.report.touched if key[0] in ("uninitialised", "global race")
        ]
        if doubtful and before is not None and _replays_alike(before, lambda: launch_with(Report(), _OTHER)):
            for finding in doubtful:
                if not finding.benign:
                    finding.benign, finding.detail = True, f"{finding.detail}; other values there change no result"
        self._last = memory
        seconds = time.perf_counter() - started
        self.timings.append(Timing(parsed.name, int(np.prod(launch.grid)), seconds, compile_seconds, launch.steps))

    def _kernel(self, compiled: Any) -> Kernel:
        if self.change is None:
            return _parsed(compiled.asm["ptx"])
        if compiled.hash not in self._texts:
            self._texts[compiled.hash] = self.change(compiled.asm["ptx"])
        return _parsed(self._texts[compiled.hash])

    def _scratch(self, metadata: Any, grid: Any, params: list, memory: GlobalMemory) -> list[bytes]:
        """The two pointers that Triton adds: global and profile scratch memory."""
        out = []
        for name, _ in zip(("global_scratch", "profile_scratch"), params, strict=False):
            size = (getattr(metadata, f"{name}_size", 0) or 0) * int(np.prod(grid))
            start = 0
            if size:
                array = np.zeros(size + 256, np.uint8)
                start = -(-array.ctypes.data // 256) * 256
                memory.add(Allocation(start, size, name, keep=array))
            out.append(struct.pack("<Q", start))
        return out

    def _allocations(self, bound: dict[str, Any]) -> list[Allocation]:
        named: dict[int, Allocation] = {}
        for name, value in bound.items():
            tensor = value if isinstance(value, Tensor) else getattr(value, "base", None)  # of a tensor descriptor
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
            if start in named:
                named[start].name += f"/{name}"
                continue
            valid = None
            if start in self._fresh:
                _, flags, version = self._fresh[start]
                if tensor._version == version:
                    valid = flags
                else:
                    del self._fresh[start]  # torch wrote to it
            if storage.nbytes():
                named[start] = Allocation(start, storage.nbytes(), name, tensor.element_size(), valid)
        return list(named.values())

    @contextlib.contextmanager
    def poisoning(self, callers: tuple[str, ...]) -> Iterator[None]:
        """torch.empty and its kin give NaNs, and what kernels then read of them unwritten is reported.

        Only where the caller's module has a name that begins with one of `callers`.
        """
        names = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")]
        before = [getattr(where, name) for where, name in names]

        def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
            @functools.wraps(make)
            def poisoned(*args: Any, **kwargs: Any) -> Tensor:
                tensor = make(*args, **kwargs)
                if sys._getframe(1).f_globals.get("__name__", "").startswith(callers) and type(tensor) is Tensor:
                    self._poison(tensor)
                return tensor

            return poisoned

        for (where, name), make in zip(names, before, strict=True):
            setattr(where, name, poison(make))
        try:
            yield
        finally:
            for (where, name), make in zip(names, before, strict=True):
                setattr(where, name, make)
            self._fresh.clear()

    def _poison(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu" and 0 < storage.nbytes() <= WATCHED:
            start, size = storage.data_ptr(), storage.nbytes()
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))[:] = _POISON
            # kept, so that nothing else is put at its address
            self._fresh[start] = tensor, np.zeros(size, bool), tensor._version

    def errors(self) -> list[Finding]:
        """What is wrong, less what `compilers` takes."""
        errors = self.report.errors
        if compilers is None:
            return errors
        compilers.extend(f for f in errors if f.kind in COMPILERS)
        return [f for f in errors if f.kind not in COMPILERS]

    def check(self) -> None:
        if errors := self.errors():
            more = f"\nand {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
            raise CheckError("\n".join(map(str, errors[:_SHOWN])) + more)

    def forget(self) -> None:
        """What it saw and timed, and the memory that it keeps."""
        self.report.findings.clear()
        self.timings.clear()
        self._fresh.clear()
        self._last, self._unfinished = None, {}


def _replays_alike(before: list[tuple[Allocation, np.ndarray, Any]], again: Callable[[], Any]) -> bool:
    """Whether all comes out the same, bit by bit, with other values in what nobody wrote and in what was read in a race."""
    after = [(a.bytes.copy(), None if a.valid is None else a.valid.copy()) for a, _, _ in before]
    for a, content, valid in before:
        a.bytes[:] = content
        a.replaced = bool(a.raced)
        if valid is not None:
            a.valid[:] = valid
            a.bytes[~valid] = _OTHER
    try:
        again()
        alike = all(
            np.array_equal(a.bytes, content) if valid is None else np.array_equal(a.bytes[valid], content[valid])
            for (a, _, _), (content, valid) in zip(before, after, strict=True)
        )
    finally:
        for (a, _, _), (content, valid) in zip(before, after, strict=True):
            a.bytes[:] = content
            a.replaced, a.raced = False, {}
            if valid is not None:
                a.valid[:] = valid
    return alike


def _flatten(values: list[Any], described: Iterator[dict[str, Any]]) -> Iterator[Any]:
    """One value a parameter: tuples apart, descriptors as their map, shape and strides."""
    for v in values:
        if isinstance(v, (tuple, list)):
            yield from _flatten(list(v), described)
        elif hasattr(v, "block_shape"):
            how = next(described)
            box, swizzle = tuple(how["block_size"]), how["swizzle"]
            yield TensorMap(v.base.data_ptr(), tuple(v.shape), tuple(v.strides), how["elem_size"], box, swizzle)
            yield from v.shape
            yield from v.strides
        else:
            yield v


def _pack(value: Any, size: int, type_: str) -> bytes:
    if isinstance(value, TensorMap):
        return bytes(size)
    if isinstance(value, Tensor):
        return struct.pack("<Q", value.data_ptr())
    if isinstance(value, float) or (isinstance(value, int) and type_[0] == "f"):
        return struct.pack("<d" if size == 8 else "<f", value)
    if isinstance(value, int):
        return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    raise TypeError(f"can't pass a {type(value).__name__}")


@contextlib.contextmanager
def machine(
    arch: int = 80, *, strict: bool = True, callers: tuple[str, ...] = KERNELS, **options: Any
) -> Iterator[Machine]:
    """A Machine that is handed every launch of fastgpt_kernels.

    callers: beginnings of the names of modules whose torch.empty is watched. strict: raise CheckError at the end.
    """
    if _launch.INTERPRETING:
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler that the machine is about: run it without")
    m, knobs = Machine(arch, **options), triton.knobs
    triton.runtime.driver.set_active(_Driver(arch))
    before = knobs.runtime.add_stages_inspection_hook, knobs.cache.dir
    # A folder of its own, since the key of Triton 3.6 doesn't tell that the pipeline was cut short.
    knobs.runtime.add_stages_inspection_hook, knobs.cache.dir = _stop_at_ptx, os.path.join(knobs.cache.dir, "ptx")
    try:
        with _launch.launched_by(m), m.poisoning(callers):
            yield m
    finally:
        knobs.runtime.add_stages_inspection_hook, knobs.cache.dir = before
    if strict:
        m.check()
