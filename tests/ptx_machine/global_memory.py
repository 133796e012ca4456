"""Global memory of a launch, with the checkers that watch every access.

A checker's shadow says, for each granule (the widest power of two of bytes that no access has been narrower than), who wrote
it last and who has read it since, and when: time counts memory instructions and barriers. Two accesses conflict if one is a
write, different threads made them and nothing orders them. What orders: a barrier between them, for threads of one CTA;
a release and an acquire of one address by atomics, for CTAs; and for grids the end of the one before, unless the later one is a
dependent launch: its threads know of it from their own griddepcontrol.wait on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .allocation import READ, WATCHED, WRITTEN, Allocation
from .floats import RAW
from .parse import Instruction
from .report import Report

_READS_KEPT = 1 << 22  # logged granules of an allocation that nobody has written yet


class GlobalMemory:
    """The allocations that a launch knows, and what its threads did to them."""

    def __init__(self, allocations: Iterable[Allocation], report: Report, races: bool = True) -> None:
        self.report, self.races = report, races
        self.allocations: list[Allocation] = []
        for allocation in allocations:
            self.add(allocation)

    def add(self, allocation: Allocation) -> None:
        self.allocations.append(allocation)
        self.allocations.sort(key=lambda a: a.start)
        self.starts = np.array([a.start for a in self.allocations], np.uint64)
        self.ends = np.array([a.end for a in self.allocations], np.uint64)

    def begin(self, threads: int, ctas: int, synchronises: bool) -> None:
        """A launch of `ctas` programs of `threads` each."""
        self.threads, self.ctas = threads, ctas
        for allocation in self.allocations:
            allocation.begin()
        # known[a, b]: up to when the accesses of CTA b are known to come before what CTA a does now
        self.known = np.full((ctas, ctas), -1, np.int64) if synchronises else None
        self.released: dict[int, np.ndarray] = {}

    def touched(self, before: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """By address of the allocation: what this launch has done to its bytes, and what grids `before` it did."""
        out = dict(before)
        for allocation in self.allocations:
            self._drain(allocation)
            flags = allocation.touched(before.get(allocation.start))
            if flags is not None:
                out[allocation.start] = flags
        return out

    def locate(
        self, m: Any, ins: Instruction, addresses: np.ndarray, size: int, lanes: np.ndarray | None, verb: str
    ) -> list:
        """[(allocation, selected or None for all, offsets)]; accesses outside every allocation are reported and left out."""
        low, high = int(addresses.min()), int(addresses.max())
        bad = np.uint64(size - 1) & addresses if size > 1 else None
        if bad is not None and bad.any():
            lane = int(np.flatnonzero(bad)[0])
            self.report.add(
                "misaligned",
                ins,
                f"{verb} of {size} bytes at {int(addresses[lane]):#x} by {m.who(lanes, lane)}",
                int(np.count_nonzero(bad)),
            )
        for allocation in self.allocations:
            if allocation.start <= low and high + size <= allocation.end:
                return [(allocation, None, (addresses - np.uint64(allocation.start)).astype(np.int64))]
        which = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        inside = (which >= 0) & (addresses + np.uint64(size) <= self.ends[which])
        if not inside.all():
            wrong = np.flatnonzero(~inside)
            address = int(addresses[wrong[0]])
            place = self.nearest(address)
            self.report.add(
                "out of bounds",
                ins,
                f"{verb} of {size} bytes at {address:#x}, {place}, by {m.who(lanes, int(wrong[0]))}",
                len(wrong),
            )
        pieces = []
        for index in np.unique(which[inside]):
            chosen = np.flatnonzero(inside & (which == index))
            allocation = self.allocations[index]
            pieces.append((allocation, chosen, (addresses[chosen] - np.uint64(allocation.start)).astype(np.int64)))
        return pieces

    def nearest(self, address: int) -> str:
        near = min(self.allocations, key=lambda a: min(abs(address - a.start), abs(address - a.end)), default=None)
        return near.place(address - near.start) if near else "no allocation"

    def _as_raced(
        self, m: Any, a: Allocation, offsets: np.ndarray, lanes: np.ndarray | None, values: np.ndarray
    ) -> np.ndarray:
        """In a replay, other values for those who read what another thread writes unordered."""
        if a.replaced:
            me = m.thread_ids(lanes).tolist()
            size = values.itemsize
            found = [next((a.raced[o] for o in range(i, i + size) if o in a.raced), None) for i in offsets.tolist()]
            wrong = np.array([f is not None and f[0] != t and m.clock > f[1] for f, t in zip(found, me, strict=True)])
            if wrong.any():
                values = values.copy()
                values.view(np.uint8).reshape(len(values), -1)[wrong] = 0x11
        return values

    @staticmethod
    def _gather(allocation: Allocation, offsets: np.ndarray, size: int) -> np.ndarray:
        if allocation.start % size == 0 and not (offsets & (size - 1)).any():
            return allocation.views[size][offsets // size]
        return allocation.bytes[offsets[:, None] + np.arange(size)].view(RAW[size]).reshape(-1)

    @staticmethod
    def _scatter(allocation: Allocation, offsets: np.ndarray, size: int, values: np.ndarray) -> None:
        if allocation.start % size == 0 and not (offsets & (size - 1)).any():
            allocation.views[size][offsets // size] = values
        else:
            allocation.bytes[offsets[:, None] + np.arange(size)] = values.view(np.uint8).reshape(-1, size)

    def load(self, m: Any, ins: Instruction, addresses: np.ndarray, size: int, lanes: np.ndarray | None) -> np.ndarray:
        pieces = self.locate(m, ins, addresses, size, lanes, "read")
        if len(pieces) == 1 and pieces[0][1] is None:
            allocation, _, offsets = pieces[0]
            self._read(m, ins, allocation, offsets, size, lanes)
            return self._as_raced(m, allocation, offsets, lanes, self._gather(allocation, offsets, size))
        out = np.full(len(addresses) * size, 0xFF, np.uint8).view(RAW[size])
        for allocation, chosen, offsets in pieces:
            self._read(m, ins, allocation, offsets, size, chosen if lanes is None else lanes[chosen])
            out[chosen] = self._gather(allocation, offsets, size)
        return out

    def store(
        self, m: Any, ins: Instruction, addresses: np.ndarray, values: np.ndarray, lanes: np.ndarray | None
    ) -> None:
        size = values.itemsize
        for allocation, chosen, offsets in self.locate(m, ins, addresses, size, lanes, "write"):
            some = values if chosen is None else values[chosen]
            self._write(
                m,
                ins,
                allocation,
                offsets,
                some,
                lanes if chosen is None else chosen if lanes is None else lanes[chosen],
            )

    def _unordered(self, time: np.ndarray, other: np.ndarray, me: np.ndarray, bar: np.ndarray) -> np.ndarray:
        """Whether accesses at `time` by threads `other` (-1: none) aren't my own nor known to come before mine."""
        theirs, mine = other // self.threads, me // self.threads
        before = bar
        if self.known is not None:
            before = np.where(theirs == mine, bar, self.known[mine, np.maximum(theirs, 0)])
            return (other >= 0) & (other != me) & (time > before)
        return (other >= 0) & (other != me) & ((theirs != mine) | (time > bar))

    def _read(
        self, m: Any, ins: Instruction, a: Allocation, offsets: np.ndarray, size: int, lanes: np.ndarray | None
    ) -> None:
        if a.valid is not None:
            ok = a.valid[offsets] & a.valid[offsets + size - 1]
            if not ok.all():
                lane = int(np.flatnonzero(~ok)[0])
                self.report.add(
                    "uninitialised",
                    ins,
                    f"read of {a.place(int(offsets[lane]))}, never written, by {m.who(lanes, lane)}",
                    int(np.count_nonzero(~ok)),
                )
        if not self.races or a.size > WATCHED:
            return
        if a.unfinished is not None:
            self._known_to_have_ended(m, ins, a, offsets, size, lanes, "read")
        at, count = a.granules(offsets, size)
        me, bar = m.thread_ids(lanes), m.barrier_times(lanes)
        if count > 1:
            me, bar = np.repeat(me, count), np.repeat(bar, count)
        if a.written:
            writer = a.writer[at]
            bad = self._unordered(a.write_time[at], writer, me, bar)
            within = bad & (writer // 32 == me // 32)
            bad &= ~within
            if within.any():
                self._within_a_warp(ins, a, int(at[np.flatnonzero(within)[0]]) * a.granule, np.count_nonzero(within))
            if bad.any():
                i = int(np.flatnonzero(bad)[0])
                self._race(
                    m,
                    ins,
                    a,
                    int(at[i]) * a.granule,
                    "read",
                    int(me[i]),
                    "written",
                    int(writer[i]),
                    np.count_nonzero(bad),
                )
                self._remember(a, at[bad], writer[bad], a.write_time[at][bad])
        a.reads.append((at, me, m.clock, bar))
        a.reads_kept += len(at)
        if a.written or a.reads_kept > _READS_KEPT:
            self._drain(a)

    def _known_to_have_ended(
        self, m: Any, ins: Instruction, a: Allocation, offsets: np.ndarray, size: int, lanes: Any, verb: str
    ) -> None:
        """No thread touches what a grid before writes, nor writes what it reads, ahead of its own griddepcontrol.wait."""
        early = ~(m.waited if lanes is None else m.waited[lanes])
        if not early.any():
            return
        flags = np.bitwise_or.reduce(a.unfinished[offsets[:, None] + np.arange(size)], axis=1)
        bad = early & (flags & (WRITTEN if verb == "read" else WRITTEN | READ) != 0)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            does = "writes" if flags[i] & WRITTEN else "reads"
            self.report.add(
                "dependent launch",
                ins,
                f"{a.place(int(offsets[i]))} {verb} by {m.who(lanes, i)} before its griddepcontrol.wait; a grid before {does} it",
                int(np.count_nonzero(bad)),
            )

    def _drain(self, a: Allocation) -> None:
        if a.granule == 0:
            return
        if self.known is not None:
            self._drain_by_cta(a)
            return
        for at, me, time, bar in a.reads:
            # what is ordered before this read needs no remembering: who comes after this comes after that
            before = (a.read_time[at] <= bar) & (a.first_reader[at] // self.threads == me // self.threads)
            before &= a.last_reader[at] // self.threads == me // self.threads
            gone = at[before]
            a.first_reader[gone], a.last_reader[gone] = np.iinfo(np.int64).max, -1
            np.minimum.at(a.first_reader, at, me)
            np.maximum.at(a.last_reader, at, me)
            a.read_time[at] = time
        a.reads, a.reads_kept = [], 0

    def _drain_by_cta(self, a: Allocation) -> None:
        """Where atomics order CTAs, each one's reads must be known apart."""
        if a.cta_time is None:
            a.cta_time = np.full((self.ctas, len(a.writer)), -1, np.int64)
            a.cta_reader = np.full((self.ctas, len(a.writer)), -1, np.int64)
        for at, me, time, bar in a.reads:
            cta = me // self.threads
            new = np.where((a.cta_time[cta, at] <= bar) | (a.cta_reader[cta, at] == me), me, -2)
            a.cta_reader[cta, at] = new
            several = (a.cta_reader[cta, at] != me) | (new == -2)
            a.cta_reader[cta[several], at[several]] = -2
            a.cta_time[cta, at] = time
        a.reads, a.reads_kept = [], 0

    def _read_by_others(self, a: Allocation, at: np.ndarray, me: np.ndarray, bar: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of each granule that `me` writes: whether read unordered, by whom, since when a read is that, whether in the warp."""
        mine = me // self.threads
        if self.known is None:
            first, last = a.first_reader[at], a.last_reader[at]
            others = (last >= 0) & ((first != me) | (last != me))
            one_warp = (first // 32 == me // 32) & (last // 32 == me // 32)
            same = (first // self.threads == mine) & (last // self.threads == mine)
            bad = others & (~same | (a.read_time[at] > bar))
            return (
                bad & ~one_warp,
                np.where(first // 32 != me // 32, first, last),
                np.where(same, bar, -1),
                bad & one_warp,
            )
        reader = a.cta_reader[mine, at]
        bad, since = (a.cta_time[mine, at] > bar) & (reader != me), bar.copy()
        reader = np.where(reader < 0, me, reader)
        for cta in np.unique(mine):
            chosen = np.flatnonzero(mine == cta)
            late = a.cta_time[:, at[chosen]] > self.known[cta][:, None]
            late[cta] = False
            found = chosen[late.any(0)]
            other = late.argmax(0)[late.any(0)]
            bad[found], reader[found] = (
                True,
                other * self.threads + np.maximum(a.cta_reader[other, at[found]] % self.threads, 0),
            )
            since[found] = self.known[cta][other]
        one_warp = (reader // 32 == me // 32) & (a.cta_reader[mine, at] >= 0)
        return bad & ~one_warp, reader, since, bad & one_warp

    def _write(
        self, m: Any, ins: Instruction, a: Allocation, offsets: np.ndarray, values: np.ndarray, lanes: Any
    ) -> None:
        size = values.itemsize
        if not self.races or a.size > WATCHED:
            self._scatter(a, offsets, size, values)
            if a.valid is not None:
                a.valid[offsets[:, None] + np.arange(size)] = True
            return
        if a.unfinished is not None:
            self._known_to_have_ended(m, ins, a, offsets, size, lanes, "written")
        at, count = a.granules(offsets, size)
        self._drain(a)
        me, bar = m.thread_ids(lanes), m.barrier_times(lanes)
        if count > 1:
            me, bar = np.repeat(me, count), np.repeat(bar, count)
        writer = a.writer[at]
        bad = self._unordered(a.write_time[at], writer, me, bar)
        within = bad & (writer // 32 == me // 32)
        bad &= ~within
        if within.any():
            self._within_a_warp(ins, a, int(at[np.flatnonzero(within)[0]]) * a.granule, np.count_nonzero(within))
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            same = np.array_equal(self._gather(a, offsets, size).view("u1"), values.view("u1"))
            self._race(
                m,
                ins,
                a,
                int(at[i]) * a.granule,
                "written",
                int(me[i]),
                "written",
                int(writer[i]),
                np.count_nonzero(bad),
                same,
            )
        bad, reader, since, within = self._read_by_others(a, at, me, bar)
        if within.any():
            self._within_a_warp(ins, a, int(at[np.flatnonzero(within)[0]]) * a.granule, np.count_nonzero(within))
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            self._race(
                m, ins, a, int(at[i]) * a.granule, "written", int(me[i]), "read", int(reader[i]), np.count_nonzero(bad)
            )
            self._remember(a, at[bad], me[bad], since[bad])
        a.writer[at], a.write_time[at], a.written = me, m.clock, True
        self._scatter(a, offsets, size, values)
        if a.valid is not None:
            a.valid[offsets[:, None] + np.arange(size)] = True
        twice = a.writer[at] != me
        if twice.any():
            i = int(np.flatnonzero(twice)[0])
            same = np.array_equal(self._gather(a, offsets, size).view("u1"), values.view("u1"))
            self._race(
                m,
                ins,
                a,
                int(at[i]) * a.granule,
                "written",
                int(me[i]),
                "written",
                int(a.writer[at][i]),
                np.count_nonzero(twice),
                same,
            )

    def _within_a_warp(self, ins: Instruction, a: Allocation, offset: int, count: int) -> None:
        self.report.add(
            "global race within a warp",
            ins,
            f"{a.place(offset)}: lanes of one warp read and write it, ordered by nothing but the warp's own program",
            int(count),
            True,
        )

    @staticmethod
    def _remember(a: Allocation, granules: np.ndarray, writers: np.ndarray, since: np.ndarray) -> None:
        if len(a.raced) < 100_000:
            for granule, *what in zip(granules.tolist(), writers.tolist(), since.tolist(), strict=True):
                a.raced.update(dict.fromkeys(range(granule * a.granule, (granule + 1) * a.granule), tuple(what)))

    def _race(
        self,
        m: Any,
        ins: Instruction,
        a: Allocation,
        offset: int,
        verb: str,
        me: int,
        did: str,
        other: int,
        count: int,
        same: bool = False,
    ) -> None:
        who = [f"CTA {t // self.threads} thread {t % self.threads}" for t in (me, other)]
        writes = verb == did == "written"
        kind = "global race, same value" if same else "global write race" if writes else "global race"
        self.report.add(
            kind, ins, f"{a.place(offset)} {verb} by {who[0]}, {did} by {who[1]}, unordered", int(count), same
        )

    def check_prefetch(
        self, m: Any, ins: Instruction, addresses: np.ndarray, sizes: np.ndarray, lanes: np.ndarray
    ) -> None:
        """Of bytes [address, address + size) in multiples of 16, for each lane."""
        for i, (address, size) in enumerate(zip(addresses.tolist(), sizes.tolist(), strict=True)):
            if address % 16 or size % 16:
                self.report.add("misaligned", ins, f"prefetch of {size} bytes at {address:#x} by {m.who(lanes, i)}")
            elif not any(a.start <= address and address + size <= a.end for a in self.allocations):
                place = self.nearest(address)
                self.report.add("out of bounds", ins, f"prefetch of {size} bytes at {place} by {m.who(lanes, i)}")

    # Atomics: their own accesses never race; those with release and acquire order the plain ones around them.

    def atomic(
        self, m: Any, ins: Instruction, address: int, size: int, lane: int, release: bool, acquire: bool
    ) -> np.ndarray | None:
        """The one element at `address` to read and replace, or None where there is none."""
        lanes = np.array([lane])
        for allocation, _, offsets in self.locate(m, ins, np.array([address], np.uint64), size, lanes, "atomic"):
            if allocation.valid is not None:
                if not allocation.valid[offsets[0]]:
                    self.report.add(
                        "uninitialised", ins, f"atomic on {allocation.place(int(offsets[0]))}, never written"
                    )
                allocation.valid[offsets[0] : offsets[0] + size] = True
            if self.known is not None:
                cta = int(m.thread_ids(lanes)[0]) // self.threads
                if acquire and address in self.released:
                    np.maximum(self.known[cta], self.released[address], out=self.known[cta])
                if release:
                    mine = self.known[cta].copy()
                    mine[cta] = m.clock
                    before = self.released.get(address)
                    self.released[address] = mine if before is None else np.maximum(mine, before)
            at = int(offsets[0])
            return allocation.bytes[at : at + size]
        return None
