"""Shared memory of the CTAs of a batch, and what each thread has for itself.

The shadow of shared memory is kept by granules and times as that of global memory, but threads of a warp count as one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .floats import RAW
from .parse import Instruction
from .report import Report

COPY_UNFENCED = "proxy fence, copy"  # what was missed between a cp.async and an asynchronous read
_STORED, _COPIED = 1, 2


class SharedMemory:
    """The shared memory of the CTAs of a batch, one behind another."""

    def __init__(
        self, ctas: int, size: int, warps: int, report: Report, races: bool = True, poison: int = 0xFF
    ) -> None:
        self.size = size
        self.stride = max(-(-size // 128) * 128, 128)
        self.bytes = np.full(ctas * self.stride, poison, np.uint8)  # 0xff is NaN in any float
        self.views = {n: self.bytes.view(dtype) for n, dtype in RAW.items()}
        self.report, self.races, self.warps = report, races, warps
        self.granule = 16
        n = len(self.bytes) // 16
        # time * 64 + warp of the last write, 0 if none, IN_FLIGHT if a copy is on its way; time of each warp's last read
        self.write = np.zeros(n, np.int64)
        self.read = np.zeros((warps, n), np.int64)
        self.copies: list[Copy] = []
        self.busy = np.zeros(n, np.int32)  # asynchronous operations that read it
        self.unfenced = np.zeros(n, np.uint8)  # _STORED or _COPIED by threads, with no fence.proxy.async since
        self.readings: dict[str, list[Any]] = {"product": [], "box": []}
        self.atomic_time: dict[tuple[int, int], int] = {}

    IN_FLIGHT = np.iinfo(np.int64).max

    def granules(self, at: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        while size < self.granule:
            self.granule //= 2
            self.write, self.read = np.repeat(self.write, 2), np.repeat(self.read, 2, axis=1)
            self.busy, self.unfenced = np.repeat(self.busy, 2), np.repeat(self.unfenced, 2)
            for reading in (r for readings in self.readings.values() for r in readings):
                reading.granules = np.concatenate([reading.granules * 2, reading.granules * 2 + 1])
        index, count = at // self.granule, size // self.granule
        return (index if count == 1 else (index[:, None] + np.arange(count)).reshape(-1)), count

    def locate(
        self, m: Any, ins: Instruction, addresses: np.ndarray, size: int, lanes: np.ndarray | None, verb: str
    ) -> tuple:
        """Bytes from the batch's start, and which accesses (None: all) are inside."""
        addresses = addresses.astype(np.int64)
        bad = (addresses < 0) | (addresses + size > self.size)
        if size > 1 and (addresses & (size - 1)).any():
            lane = int(np.flatnonzero(addresses & (size - 1))[0])
            self.report.add(
                "misaligned", ins, f"shared {verb} of {size} bytes at {addresses[lane]:#x} by {m.who(lanes, lane)}"
            )
            bad |= (addresses & (size - 1)) != 0
        chosen = None
        if bad.any():
            lane = int(np.flatnonzero(bad)[0])
            self.report.add(
                "out of bounds",
                ins,
                f"shared {verb} of {size} bytes at {addresses[lane]:#x} of {self.size:#x} by {m.who(lanes, lane)}",
                int(np.count_nonzero(bad)),
            )
            chosen = np.flatnonzero(~bad)
            addresses = addresses[chosen]
            lanes = chosen if lanes is None else lanes[chosen]
        return addresses + m.cta_of(lanes) * self.stride, chosen, lanes

    def load(self, m: Any, ins: Instruction, addresses: np.ndarray, size: int, lanes: np.ndarray | None) -> np.ndarray:
        at, chosen, some = self.locate(m, ins, addresses, size, lanes, "read")
        if len(at):
            self.check_read(m, ins, at, size, some)
        if chosen is None:
            return self.views[size][at // size]
        out = np.full(len(addresses) * size, 0xFF, np.uint8).view(RAW[size])
        out[chosen] = self.views[size][at // size]
        return out

    def store(
        self, m: Any, ins: Instruction, addresses: np.ndarray, values: np.ndarray, lanes: np.ndarray | None
    ) -> None:
        size = values.itemsize
        at, chosen, some = self.locate(m, ins, addresses, size, lanes, "write")
        values = values if chosen is None else values[chosen]
        index, warp = self.check_write(m, ins, at, size, some, values)
        if index is not None:
            self.write[index] = m.clock * 64 + warp
            self.unfenced[index] = _STORED
        self.views[size][at // size] = values
        if index is not None:
            twice = (self.write[index] & 63) != warp
            if twice.any():
                same = np.array_equal(self.views[size][at // size].view("u1"), values.view("u1"))
                i = int(np.flatnonzero(twice)[0])
                self._race(
                    m,
                    ins,
                    int(index[i]),
                    "written",
                    int(warp[i]),
                    "written in the same instruction",
                    int(self.write[index[i]] & 63),
                    np.count_nonzero(twice),
                    same,
                )

    def check_read(self, m: Any, ins: Instruction, at: np.ndarray, size: int, lanes: np.ndarray | None) -> None:
        if not self.races:
            return
        index, count = self.granules(at, size)
        warp, bar = m.warp_of(lanes), m.barrier_times(lanes)
        if count > 1:
            warp, bar = np.repeat(warp, count), np.repeat(bar, count)
        code = self.write[index]
        if not code.all():
            i = int(np.flatnonzero(code == 0)[0])
            self.report.add(
                "uninitialised",
                ins,
                f"read of shared byte {self.byte(index[i]):#x}, never written, by warp {warp[i]}",
                int(np.count_nonzero(code == 0)),
            )
        late = code > bar * 64 + 63
        if late.any():
            self._conflict(m, ins, index, code, warp, late, "read")
        self.read[warp, index] = m.clock

    def check_write(
        self, m: Any, ins: Instruction, at: np.ndarray, size: int, lanes: Any, values: np.ndarray | None
    ) -> tuple:
        if not self.races or not len(at):
            return None, None
        index, count = self.granules(at, size)
        warp, bar = m.warp_of(lanes), m.barrier_times(lanes)
        if count > 1:
            warp, bar = np.repeat(warp, count), np.repeat(bar, count)
        code = self.write[index]
        late = code > bar * 64 + 63
        if late.any():
            same = values is not None and np.array_equal(self.views[size][at // size].view("u1"), values.view("u1"))
            self._conflict(m, ins, index, code, warp, late, "written", same)
        busy = self.busy[index]
        if busy.any():
            i = int(np.flatnonzero(busy)[0])
            self.report.add(
                "asynchronous read",
                ins,
                f"shared byte {self.byte(index[i]):#x} written by warp {warp[i]} while a product "
                "or a box that nobody has waited for reads it",
                int(np.count_nonzero(busy)),
            )
        reads = self.read[:, index]
        late = reads > bar
        if late.any():
            late[warp, np.arange(len(index))] = False
            if late.any():
                other, i = (int(x[0]) for x in np.nonzero(late))
                self._race(m, ins, int(index[i]), "written", int(warp[i]), "read", other, np.count_nonzero(late.any(0)))
        return index, warp

    def byte(self, granule: int) -> int:
        return int(granule) * self.granule % self.stride

    def _conflict(self, m, ins, index, code, warp, late, verb, same=False) -> None:
        flying = code == self.IN_FLIGHT
        if flying.any():
            i = int(np.flatnonzero(flying)[0])
            self.report.add(
                "asynchronous copy",
                ins,
                f"shared byte {self.byte(index[i]):#x} {verb} by warp {warp[i]} while a copy to it is on its way",
                int(np.count_nonzero(flying)),
            )
        bad = late & ~flying & ((code & 63) != warp)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            self._race(
                m, ins, int(index[i]), verb, int(warp[i]), "written", int(code[i] & 63), np.count_nonzero(bad), same
            )

    def _race(self, m, ins, granule, verb, warp, did, other, count, same=False) -> None:
        cta = granule * self.granule // self.stride + m.first_cta
        self.report.add(
            "shared race, same value" if same else "shared race",
            ins,
            f"CTA {cta} byte {self.byte(granule):#x} {verb} by warp {warp}, {did} by warp {other}, no barrier between",
            int(count),
            same,
        )

    def atomic(self, m: Any, ins: Instruction, address: np.ndarray, size: int, lane: int) -> np.ndarray | None:
        """The one element to read and replace. Atomics race with plain accesses, not with each other."""
        lanes = np.array([lane])
        at, _, lanes = self.locate(m, ins, address, size, lanes, "atomic")
        if not len(at):
            return None
        if self.races:
            index, _ = self.granules(at, size)
            cta, code = int(m.cta_of(lanes)[0]), self.write[index]
            if (code == 0).any():
                self.report.add("uninitialised", ins, f"atomic on shared byte {self.byte(index[0]):#x}, never written")
            if not self.atomic_time.get((cta, int(index[0])), 0) * 64 >= int(code[0]):
                warp, bar = m.warp_of(lanes), m.barrier_times(lanes)
                if (code > bar * 64 + 63).any():
                    self._conflict(m, ins, index, code, warp, code > 0, "changed")
            self.write[index] = m.clock * 64 + m.warp_of(lanes)
            self.atomic_time[cta, int(index[0])] = m.clock + 1
        return self.bytes[int(at[0]) : int(at[0]) + size]

    # Asynchronous reads and boxes

    def begin(
        self, m: Any, ins: Instruction, kind: str, at: np.ndarray, size: int, warp: int, who: int, group: int
    ) -> None:
        if self.races:
            index, _ = self.granules(at, size)
            for how, found, verb in ((_STORED, "proxy fence", "written"), (_COPIED, COPY_UNFENCED, "copied")):
                unfenced = np.flatnonzero(self.unfenced[index] == how)
                if len(unfenced):
                    i = int(unfenced[0])
                    self.report.add(
                        found,
                        ins,
                        f"shared byte {self.byte(index[i]):#x} read asynchronously, {verb} by warp "
                        f"{self.write[index[i]] & 63} without fence.proxy.async since",
                    )
            self.busy[index] += 1  # what an operation names twice counts once, here and in `finish`
            self.readings[kind].append(Reading(index, warp, who, group))

    def fence(self, m: Any, mask: np.ndarray | None) -> None:
        """fence.proxy.async: what these warps wrote may be read asynchronously."""
        if mask is None:
            self.unfenced[:] = 0
        elif self.unfenced.any():
            here = mask.reshape(-1, self.warps, 32).any(2)
            index = np.flatnonzero(self.unfenced)
            cta, warp = index * self.granule // self.stride, self.write[index] & 63
            self.unfenced[index[here[cta, np.minimum(warp, self.warps - 1)]]] = 0

    def finish(self, m: Any, kind: str, done: Any) -> None:
        rest = []
        for reading in self.readings[kind]:
            if done(reading):
                self.busy[reading.granules] -= 1
                self.read[reading.warp, reading.granules] = m.clock
            else:
                rest.append(reading)
        self.readings[kind] = rest

    def deliver(self, at: np.ndarray, data: np.ndarray, chunks: np.ndarray) -> None:
        """A box that somebody has waited for; it counts as written before everything that follows, by whomever."""
        self.views[data.itemsize][at // data.itemsize] = data
        if self.races:
            index, _ = self.granules(chunks, 16)
            self.write[index], self.unfenced[index] = 64, 0

    # cp.async

    def copy(self, m: Any, ins: Instruction, addresses: np.ndarray, data: np.ndarray, lanes: np.ndarray) -> None:
        """Put a copy on its way; it arrives when its threads wait for its group."""
        size = data.itemsize
        at, chosen, lanes = self.locate(m, ins, addresses, size, lanes, "copy")
        data = data if chosen is None else data[chosen]
        index, _ = self.check_write(m, ins, at, size, lanes, None)
        if index is not None:
            self.write[index] = self.IN_FLIGHT
        self.copies.append(Copy(at, data, lanes, m.groups_committed[lanes].copy()))

    def wait(self, m: Any, lanes: np.ndarray | None, allowed: int) -> None:
        """Threads `lanes` wait until at most `allowed` of their committed groups are on their way."""
        limit = m.groups_committed - allowed
        if lanes is not None:
            limit = np.where(m.mask_of(lanes), limit, -1)
        rest = []
        for copy in self.copies:
            done = copy.group < limit[copy.lanes]
            if done.all():
                self._arrive(m, copy.at, copy.data, copy.lanes)
            elif done.any():
                self._arrive(m, copy.at[done], copy.data[done], copy.lanes[done])
                rest.append(Copy(copy.at[~done], copy.data[~done], copy.lanes[~done], copy.group[~done]))
            else:
                rest.append(copy)
        self.copies = rest

    def _arrive(self, m: Any, at: np.ndarray, data: np.ndarray, lanes: np.ndarray) -> None:
        self.views[data.itemsize][at // data.itemsize] = data
        if self.races:
            index, count = self.granules(at, data.itemsize)
            self.write[index], self.unfenced[index] = m.clock * 64 + np.repeat(m.warp_of(lanes), count), _COPIED


class LocalMemory:
    """What each thread has for itself; nothing to check but the bounds, which numpy does."""

    def __init__(self, lanes: int, size: int) -> None:
        self.size, self.bytes, self.first = size, np.full(lanes * size, 0xFF, np.uint8), np.arange(lanes) * size

    def _at(self, addresses: np.ndarray, size: int, lanes: np.ndarray | None) -> np.ndarray:
        addresses = addresses.astype(np.int64)
        if (addresses < 0).any() or (addresses + size > self.size).any():
            raise IndexError(f"local memory beyond {self.size} bytes")
        return (addresses + (self.first if lanes is None else self.first[lanes]))[:, None] + np.arange(size)

    def load(self, m: Any, ins: Instruction, addresses: np.ndarray, size: int, lanes: np.ndarray | None) -> np.ndarray:
        return self.bytes[self._at(addresses, size, lanes)].view(RAW[size]).reshape(-1)

    def store(
        self, m: Any, ins: Instruction, addresses: np.ndarray, values: np.ndarray, lanes: np.ndarray | None
    ) -> None:
        self.bytes[self._at(addresses, values.itemsize, lanes)] = values.view(np.uint8).reshape(len(values), -1)


@dataclasses.dataclass
class Reading:
    """Shared memory that an asynchronous operation reads until its group is waited for, by warp or thread `who` of the batch."""

    granules: np.ndarray
    warp: int  # of the CTA
    who: int
    group: int


@dataclasses.dataclass
class Copy:
    at: np.ndarray
    data: np.ndarray
    lanes: np.ndarray
    group: np.ndarray  # a lane's groups are counted from 0
