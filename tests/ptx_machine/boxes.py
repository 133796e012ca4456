"""Copies of boxes by the tensor memory accelerator of sm90, and the mbarriers that say when they have come.

A box on its way arrives when a thread has seen the phase of its mbarrier complete.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .parse import Address, Imm, PtxError
from .wgmma import swizzled

_SWIZZLE_BITS = {0: 0, 1: 1, 2: 2, 3: 3}  # of a tensor map: none, 32, 64, 128 bytes


@dataclasses.dataclass
class TensorMap:
    """A tensor in global memory and the box that a copy moves; dimensions from the outermost."""

    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    itemsize: int
    box: tuple[int, ...]
    swizzle: int


@dataclasses.dataclass
class Barrier:
    count: int
    pending: int
    time: int  # of its initialisation
    warp: int  # that made it
    bytes: int = 0
    phase: int = 0
    arriving: list = dataclasses.field(default_factory=list)  # boxes of this phase
    arrived: list = dataclasses.field(default_factory=list)  # of earlier ones, that nobody has waited for
    waits: dict = dataclasses.field(default_factory=dict)  # when each warp last looked

    def check_use(self, b: Any, ins: Any, lanes: np.ndarray) -> None:
        """Made before, by a barrier between, for all but the warp that made it."""
        warps = np.unique(b.lane_warp[lanes]).tolist()
        if self.time > b.barrier_time[b.lane_cta[lanes[0]]] and warps != [self.warp]:
            b.report.add("mbarrier", ins, f"used by warps {warps}, made by warp {self.warp}, no barrier between")
        self.waits.update(dict.fromkeys(warps, b.launch.clock))

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count
            self.arrived += self.arriving
            self.arriving = []


def mbarrier(d: Any, ins: Any):
    b = d.b
    operation = ins.mods[0]
    where = next(o for o in ins.operands if isinstance(o, Address))
    address = d.address(where, "u32")
    if operation in ("init", "inval", "arrive"):
        amount = d.source(ins.operands[-1], "u32") if operation != "inval" else None

        def each(lanes: np.ndarray) -> None:
            b.launch.clock += 1
            at = address()
            for lane in lanes.tolist():
                key = int(b.lane_cta[lane]), int(at[lane])
                n = 0 if amount is None else int(amount[lane] if isinstance(amount, np.ndarray) else amount)
                if operation == "init":
                    b.mbarriers[key] = Barrier(n, n, b.launch.clock, int(b.lane_warp[lane]))
                    continue
                if key not in b.mbarriers:
                    b.report.add("mbarrier", ins, f"no barrier at shared byte {key[1]:#x}")
                    continue
                barrier = b.mbarriers[key]
                if operation == "arrive":
                    barrier.check_use(b, ins, np.array([lane]))
                if operation == "inval":
                    late = [
                        w for w, t in barrier.waits.items() if t > b.barrier_time[key[0]] and w != b.lane_warp[lane]
                    ]
                    if late:
                        b.report.add(
                            "mbarrier", ins, f"invalidated while warps {late} may still look at it: no barrier between"
                        )
                    if barrier.arriving or barrier.arrived:
                        b.report.add("mbarrier", ins, "invalidated with copies that nobody waited for")
                    del b.mbarriers[key]
                    continue
                if "expect_tx" in ins.mods:
                    barrier.bytes += n
                    barrier.pending -= 1
                else:
                    barrier.pending -= n if isinstance(ins.operands[-1], Imm) else 1
                if barrier.pending < 0:
                    b.report.add("mbarrier", ins, "more arrivals than its count")
                barrier.settle()

        return (lambda: each(np.arange(b.lanes))), (lambda mask: each(np.flatnonzero(mask)))
    if operation not in ("try_wait", "test_wait") or "parity" not in ins.mods:
        raise PtxError("kind of mbarrier operation")
    to, parity = d.target(ins.operands[0], "pred"), d.source(ins.operands[2], "u32")

    def wait(lanes: np.ndarray) -> None:
        b.launch.clock += 1
        key = (b.lane_cta[lanes] << 33) | (address()[lanes].astype(np.int64) << 1)
        key |= (parity[lanes] if isinstance(parity, np.ndarray) else parity).astype(np.int64) & 1
        done = np.zeros(len(lanes), bool)
        for value in np.unique(key):
            barrier = b.mbarriers.get((int(value) >> 33, int(value) >> 1 & 0xFFFFFFFF))
            if barrier is None:
                b.report.add("mbarrier", ins, f"no barrier at shared byte {int(value) >> 1 & 0xFFFFFFFF:#x}")
                done[key == value] = True
                continue
            barrier.check_use(b, ins, lanes[key == value])
            if barrier.phase != int(value) & 1:
                done[key == value] = True
                for box in barrier.arrived:
                    b.shared.deliver(*box)
                barrier.arrived = []
        b.spun = not done.all()
        to[lanes] = done

    return (lambda: wait(np.arange(b.lanes))), (lambda mask: wait(np.flatnonzero(mask)))


def prefetch(d: Any, ins: Any):
    """cp.async.bulk.prefetch.L2: nothing but a check that the bytes are there, and aligned as it asks."""
    if "prefetch" not in ins.mods or "global" not in ins.mods:
        raise PtxError("kind of copy")
    b, address, size = d.b, d.address(ins.operands[0], "u64"), d.source(ins.operands[1], "u32")

    def check(lanes: np.ndarray) -> None:
        sizes = size[lanes] if isinstance(size, np.ndarray) else np.full(len(lanes), size)
        b.memory.check_prefetch(b, ins, address()[lanes], sizes, lanes)

    return (lambda: check(np.arange(b.lanes))), (lambda mask: check(np.flatnonzero(mask)))


def bulk(d: Any, ins: Any):
    """cp.async.bulk.tensor, to shared memory and back, and the groups of the way back."""
    b = d.b
    if "commit_group" in ins.mods:

        def commit(lanes):
            b.boxes_committed[lanes] += 1

        return (lambda: commit(slice(None))), (lambda mask: commit(mask))
    if "wait_group" in ins.mods:
        allowed = ins.operands[0].bits

        def wait(mask):
            b.launch.clock += 1
            here = np.ones(b.lanes, bool) if mask is None else mask
            b.shared.finish(b, "box", lambda r: here[r.who] and r.group < b.boxes_committed[r.who] - allowed)

        return (lambda: wait(None)), wait
    if "tensor" not in ins.mods:
        return prefetch(d, ins)
    loads = isinstance(ins.operands[0], Address) and not ins.operands[0].coords
    if not loads and len(ins.operands) != 2:
        raise PtxError("kind of copy")
    near, far = ins.operands[:2] if loads else (ins.operands[1], ins.operands[0])
    shared, table = d.address(near, "u32"), d.source(far.base, "u64")
    coordinates = [d.source(c, "s32") for c in far.coords[0].items][::-1]  # from the outermost
    barrier_at = d.address(ins.operands[2], "u32") if loads else None

    def elements(lane: int) -> tuple:
        """(global addresses, shared offsets of the elements, which are inside, the map)"""
        map_address = int(table[lane] if isinstance(table, np.ndarray) else table)
        tensor = b.launch.tensor_maps.get(map_address)
        if tensor is None:
            raise PtxError("no tensor map there")
        start = [int(c[lane] if isinstance(c, np.ndarray) else c) for c in coordinates]
        offsets, inside, place = np.zeros(1, np.int64), np.ones(1, bool), np.zeros(1, np.int64)
        for first, box, size, stride in zip(start, tensor.box, tensor.shape, tensor.strides, strict=True):
            i = first + np.arange(box)
            offsets = (offsets[:, None] + i * stride).reshape(-1)
            inside = (inside[:, None] & (i >= 0) & (i < size)).reshape(-1)
            place = (place[:, None] * box + np.arange(box)).reshape(-1)
        at = int(shared()[lane])
        bits = _SWIZZLE_BITS[tensor.swizzle]
        if at % (128 << bits if bits else 16):
            b.report.add("misaligned", ins, f"a box at shared byte {at:#x}")
        where = swizzled(at + place * tensor.itemsize, bits)
        return tensor.base + offsets * tensor.itemsize, where, inside, tensor

    def run(lanes: np.ndarray) -> None:
        b.launch.clock += 1
        for lane in lanes.tolist():
            addresses, where, inside, tensor = elements(lane)
            size = tensor.itemsize
            raw = np.dtype(f"u{size}")
            if int(where.max()) + size > b.shared.size:
                b.report.add(
                    "out of bounds", ins, f"a box up to shared byte {int(where.max()):#x} of {b.shared.size:#x}"
                )
                continue
            where = where + int(b.lane_cta[lane]) * b.shared.stride
            chunks = np.unique(where // 16) * 16
            repeated = np.full(len(chunks), lane)
            chosen = np.flatnonzero(inside)
            if loads:
                data = np.zeros(len(where), raw)
                if len(chosen):
                    data[chosen] = b.memory.load(
                        b, ins, addresses[chosen].astype(np.uint64), size, np.full(len(chosen), lane)
                    )
                index, _ = b.shared.check_write(b, ins, chunks, 16, repeated, None)
                if index is not None:
                    b.shared.write[index] = b.shared.IN_FLIGHT
                barrier = b.mbarriers.get((int(b.lane_cta[lane]), int(barrier_at()[lane])))
                if barrier is None:
                    b.report.add("mbarrier", ins, f"no barrier at shared byte {int(barrier_at()[lane]):#x}")
                    continue
                barrier.check_use(b, ins, np.array([lane]))
                barrier.arriving.append((where, data, chunks))
                barrier.bytes -= len(where) * size
                barrier.settle()
            else:
                b.shared.check_read(b, ins, chunks, 16, repeated)
                b.shared.begin(b, ins, "box", chunks, 16, int(b.lane_warp[lane]), lane, int(b.boxes_committed[lane]))
                if len(chosen):
                    data = b.shared.views[size][where[chosen] // size]
                    b.memory.store(b, ins, addresses[chosen].astype(np.uint64), data, np.full(len(chosen), lane))

    return (lambda: run(np.arange(b.lanes))), (lambda mask: run(np.flatnonzero(mask)))
