"""Runs a parsed kernel: many CTAs at once, every register one numpy array with an element a thread.

Threads that are at the same instruction go together; where they part, those furthest behind run first, so that they meet again
at the first instruction that all pass. A group that spins on an atomic lets the others run.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from .instructions import Decoder
from .operands import Step
from .parse import SIZES, PtxError
from .shared_memory import LocalMemory, SharedMemory

if TYPE_CHECKING:
    from .launch import Launch

_COLLECTIVE = {"shfl", "vote", "redux", "mma", "ldmatrix", "stmatrix", "wgmma"}  # of whole warps


class MachineError(Exception):
    """The program can't go on: a deadlock, or an instruction that failed."""


class Batch:
    """Some CTAs of a launch, from first_cta on, and their state."""

    def __init__(self, launch: Launch, ctas: int) -> None:
        """Decoded for launches of this kernel and grid; `begin` tells which, and where in its grid."""
        self.launch, self.kernel, self.ctas, self.threads = launch, launch.kernel, ctas, launch.threads
        self.lanes = ctas * self.threads
        self.warps = -(-self.threads // 32)
        if self.threads % 32 or self.threads > 1024:
            raise PtxError(f"{self.threads} threads: a CTA has whole warps, and 1024 threads at most")
        self.lane_cta = np.repeat(np.arange(ctas), self.threads)
        self.lane_warp = np.tile(np.repeat(np.arange(self.warps), 32), ctas)
        self.groups_committed = np.zeros(self.lanes, np.int64)
        self.products_committed = np.zeros(self.lanes // 32, np.int64)
        self.boxes_committed = np.zeros(self.lanes, np.int64)
        self.waited = np.zeros(self.lanes, bool)  # for the grids before: griddepcontrol.wait
        words = {kind: np.dtype(bool if kind == "pred" else f"u{SIZES[kind]}") for kind in SIZES if SIZES[kind] <= 8}
        self.registers = {name: np.zeros(self.lanes, words[kind]) for name, kind in self.kernel.registers.items()}
        # What decoded steps read that differs by launch: (array, axis of %ctaid), (array, parameter, offset in bytes).
        self.indices: list[tuple[np.ndarray, int]] = []
        self.parameters: list[tuple[np.ndarray, str, int]] = []
        self.bytes = sum(array.nbytes for array in self.registers.values())
        self.steps = Decoder(self).steps()
        self._cut()

    def begin(self, launch: Launch, first_cta: int) -> None:
        self.launch, self.first_cta = launch, first_cta
        self.report, self.memory = launch.report, launch.memory
        self.all_threads = first_cta * self.threads + np.arange(self.lanes)
        self.barrier_time = np.zeros(self.ctas, np.int64)
        self.lane_barrier = self.barrier_time[self.lane_cta]
        self.shared = SharedMemory(self.ctas, launch.shared_size, self.warps, self.report, launch.races, launch.poison)
        self.local = LocalMemory(self.lanes, sum(size for _, size in self.kernel.local.values()))
        for array in (self.groups_committed, self.products_committed, self.boxes_committed, self.waited):
            array.fill(0)
        for array in self.registers.values():
            array.fill(0)
        for array, axis in self.indices:
            array[...] = launch.cta_index(first_cta + self.lane_cta)[axis]
        for array, name, offset in self.parameters:
            array[...] = np.frombuffer(launch.parameters[name], array.dtype, len(array), offset)
        self.spun = False
        self.mbarriers: dict[tuple[int, int], Any] = {}

    # What the memories ask about lanes; None is all of them.

    @property
    def clock(self) -> int:
        return self.launch.clock

    def thread_ids(self, lanes: np.ndarray | None) -> np.ndarray:
        return self.all_threads if lanes is None else self.all_threads[lanes]

    def barrier_times(self, lanes: np.ndarray | None) -> np.ndarray:
        return self.lane_barrier if lanes is None else self.lane_barrier[lanes]

    def warp_of(self, lanes: np.ndarray | None) -> np.ndarray:
        return self.lane_warp if lanes is None else self.lane_warp[lanes]

    def cta_of(self, lanes: np.ndarray | None) -> np.ndarray:
        return self.lane_cta if lanes is None else self.lane_cta[lanes]

    def mask_of(self, lanes: np.ndarray) -> np.ndarray:
        mask = np.zeros(self.lanes, bool)
        mask[lanes] = True
        return mask

    def who(self, lanes: np.ndarray | None, position: int) -> str:
        lane = position if lanes is None else int(lanes[position])
        x, y, z = self.launch.cta_index(self.first_cta + lane // self.threads)
        return f"CTA ({x},{y},{z}) thread {lane % self.threads}"

    # Control

    def _cut(self) -> None:
        """Basic blocks: from each leader, the straight-line steps and where they end."""
        n = len(self.steps)
        leaders = {0, *self.kernel.labels.values()} | {i + 1 for i, s in enumerate(self.steps) if s.control}
        self.blocks: list[tuple[list, list, int] | None] = [None] * (n + 1)
        self.collective = [False] * (n + 1)
        for start in leaders:
            end = start
            while end < n and not self.steps[end].control and (end == start or end not in leaders):
                end += 1
            block = self.steps[start:end]
            self.blocks[start] = ([s.full for s in block], [s.masked for s in block], end)
            self.collective[start] = any(i.name in _COLLECTIVE for i in self.kernel.instructions[start:end])

    def run(self) -> None:
        self.groups: dict[int, np.ndarray | None] = {0: None}  # where threads are: which (None: all of them)
        self.waiting: dict[int, np.ndarray] = {}  # at a barrier, by its number
        self.resume = np.zeros(self.lanes, np.int64)
        self.exited = np.zeros(self.lanes, bool)
        self.parked: dict[
            int, np.ndarray
        ] = {}  # before a block in which whole warps work together, for the rest of theirs
        self.forced = False
        held: dict[int, np.ndarray | None] = {}  # spinning
        while self.groups or held or self.parked:
            if not self.groups:
                if held:
                    self.groups, held = held, {}
                else:
                    self.groups, self.parked, self.forced = dict(self.parked), {}, True
            at = min(self.groups)
            mask = self.groups.pop(at)
            at, mask, spinning = self._run_group(at, mask)
            if mask is not None and not mask.any():
                continue
            if at >= 0:
                self._join(held if spinning else self.groups, at, mask)
        if self.waiting:
            for number, mask in self.waiting.items():
                cta = int(self.lane_cta[np.flatnonzero(mask)[0]])
                here = int(np.count_nonzero(mask[self.lane_cta == cta]))
                at = self.kernel.instructions[int(self.resume[np.flatnonzero(mask)[0]]) - 1]
                self.report.add(
                    "barrier",
                    at,
                    f"CTA {self.first_cta + cta}: {here} of {self.threads} threads wait at barrier "
                    f"{number}, which the others never reach",
                )
            raise MachineError(f"{self.kernel.name}: deadlock at a barrier")
        if self.launch.dependent and not self.waited.all():
            thread = self.who(None, int(np.flatnonzero(~self.waited)[0]))
            self.report.add(
                "dependent launch",
                None,
                f"{thread} ends without griddepcontrol.wait: no later grid can rely on those before",
                int(np.count_nonzero(~self.waited)),
            )

    @staticmethod
    def _join(groups: dict[int, np.ndarray | None], at: int, mask: np.ndarray | None) -> None:
        before = groups.get(at)
        groups[at] = mask if before is None or mask is None else before | mask

    def _run_group(self, at: int, mask: np.ndarray | None) -> tuple[int, np.ndarray | None, bool]:
        """Until the group meets or passes another, parts, waits or ends: where it is (-1: nowhere), who, whether it spins."""
        launch = self.launch
        while True:
            if mask is not None:
                if at in self.parked:
                    mask = mask | self.parked.pop(at)
                    if mask.all():
                        mask = None
                if mask is not None and self.collective[at] and not self.forced and self._split_warps(mask):
                    self.parked[at] = mask
                    return -1, None, False
            self.forced = False
            full, masked, end = self.blocks[at]
            position = at
            try:
                if mask is None:
                    for step in full:
                        step()
                        position += 1
                else:
                    for step in masked:
                        step(mask)
                        position += 1
            except Exception as error:
                if isinstance(error, MachineError):
                    raise
                ins = self.kernel.instructions[position]
                raise MachineError(
                    f"{self.kernel.name}, PTX line {ins.line} `{ins.text}`: {type(error).__name__}: {error}"
                ) from error
            launch.steps += end - at
            if launch.deadline is not None and time.monotonic() > launch.deadline:
                raise MachineError(f"{self.kernel.name}: out of time at PTX line {self.kernel.instructions[at].line}")
            at = end
            if at >= len(self.steps):
                return -1, None, False
            step = self.steps[at]
            if step.control == "branch":
                at, mask, spinning = self._branch(step, at, mask)
                if spinning:
                    return at, mask, True
            elif step.control == "exit":
                gone = step.taken(mask)
                if gone is None:
                    if mask is None:
                        self.exited[:] = True
                    return -1, None, False
                self.exited |= gone
                mask = ~gone if mask is None else mask & ~gone
                self._release()
                if not mask.any():
                    return -1, mask, False
                at += 1
            elif step.control == "barrier":
                launch.clock += 1
                if mask is None and step.predicate is None:
                    self._passed(np.ones(self.ctas, bool))
                    at += 1
                else:
                    arriving = step.taken(mask)
                    arriving = (np.ones(self.lanes, bool) if mask is None else mask) if arriving is None else arriving
                    self._arrive(step, at, arriving)
                    rest = ~arriving if mask is None else mask & ~arriving
                    return at + 1, rest, False
            if mask is not None and not mask.any():
                return -1, mask, False
            others = min(self.groups, default=1 << 60) if self.groups else 1 << 60
            if at >= others:
                return at, mask, False

    def _split_warps(self, mask: np.ndarray) -> bool:
        rows, gone = mask.reshape(-1, 32), self.exited.reshape(-1, 32)
        return bool((rows.any(1) & ~(rows | gone).all(1)).any())

    def _branch(self, step: Step, at: int, mask: np.ndarray | None) -> tuple[int, np.ndarray | None, bool]:
        taken = step.taken(mask)
        spinning = False
        if step.target <= at and self.spun:
            self.spun, spinning = False, bool(self.groups) or taken is not None or mask is not None
        if taken is None:
            return step.target, mask, spinning
        if not taken.any():
            return at + 1, mask, False
        rest = ~taken if mask is None else mask & ~taken
        if not rest.any():
            return step.target, mask, spinning
        self._join(self.groups, at + 1, rest)
        return step.target, taken, spinning

    def _arrive(self, step: Step, at: int, mask: np.ndarray) -> None:
        before = self.waiting.get(step.target)
        self.waiting[step.target] = mask if before is None else before | mask
        self.resume[mask] = at + 1
        self._release()

    def _release(self) -> None:
        """Let go the CTAs all of whose threads have come (or are gone)."""
        for number, mask in list(self.waiting.items()):
            here = (mask | self.exited).reshape(self.ctas, self.threads).all(1)
            here &= mask.reshape(self.ctas, self.threads).any(1)
            if not here.any():
                continue
            going = mask & here[self.lane_cta]
            if (self.exited & here[self.lane_cta]).any():
                at = self.kernel.instructions[int(self.resume[np.flatnonzero(going)[0]]) - 1]
                self.report.add("barrier", at, "a barrier of a CTA some of whose threads have ended")
            places = np.unique(self.resume[going])
            if len(places) > len(np.unique(self.lane_cta[going])):
                at = self.kernel.instructions[int(places[0]) - 1]
                self.report.add(
                    "barrier", at, "threads of one CTA meet from different barrier instructions", benign=True
                )
            self._passed(here)
            for place in places:
                chosen = going & (self.resume == place)
                self._join(self.groups, int(place), None if chosen.all() else chosen)
            left = mask & ~going
            if left.any():
                self.waiting[number] = left
            else:
                del self.waiting[number]

    def _passed(self, ctas: np.ndarray) -> None:
        self.barrier_time = np.where(ctas, self.launch.clock, self.barrier_time)
        self.lane_barrier = self.barrier_time[self.lane_cta]
