"""Loads, stores, copies and atomics."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from . import boxes
from .floats import bf16, from_bf16
from .operands import DTYPES, PARAMETER_BYTES, Operands
from .parse import SIZES, Address, Instruction, PtxError, Reg, Vector


class Accesses(Operands):
    def address(self, operand: Address, type_: str) -> Callable[[], np.ndarray]:
        base = self.source(operand.base, type_)
        offset = DTYPES[type_].type(operand.offset & (2**32 - 1 if type_ == "u32" else 2**64 - 1))
        if not isinstance(base, np.ndarray):
            value = np.full(self.b.lanes, (int(base) + operand.offset), DTYPES[type_])
            return lambda: value
        return (lambda: base + offset) if operand.offset else (lambda: base)

    def space(self, ins: Instruction) -> str:
        return next(
            (m.split("::")[0] for m in ins.mods if m.split("::")[0] in ("global", "shared", "param", "local", "const")),
            "generic",
        )

    def memory(self, space: str) -> Callable[[], Any]:
        """That of the launch, asked for anew."""
        b = self.b
        return {"shared": lambda: b.shared, "local": lambda: b.local}.get(space, lambda: b.memory)

    def op_ld(self, ins):
        space, type_ = self.space(ins), self.type_of(ins)
        to = ins.operands[0].items if isinstance(ins.operands[0], Vector) else (ins.operands[0],)
        targets = [None if t is None else self.target(t, type_) for t in to]
        dtype, size = DTYPES[type_], SIZES[type_] * len(to)
        where = ins.operands[1]
        if space == "param" and isinstance(where.base, Reg):
            return self.chosen_parameter(self.address(where, "u64"), targets, dtype)
        if space == "param":
            values = np.zeros(len(to), dtype)
            self.b.parameters.append((values, where.base.name, where.offset))
            return self.copies([(target, values[i : i + 1]) for i, target in enumerate(targets)])
        if space not in ("global", "shared", "const", "local"):
            raise PtxError(f"{space} memory")
        b, memory = self.b, self.memory(space)
        address = self.address(where, "u32" if space in ("shared", "local") and self._narrow(where) else "u64")
        if space == "global" and {"acquire", "relaxed", "volatile"} & set(ins.mods):
            return self.synchronising(ins, address, targets, [], dtype, "acquire" in ins.mods)
        count, pieces = len(to), max(size // 16, 1)
        part = size // pieces
        per = count // pieces

        def load(lanes):
            b.launch.clock += 1
            at = address() if lanes is None else address()[lanes]
            for piece in range(pieces):
                offset = at if piece == 0 else at + at.dtype.type(piece * part)
                raw = memory().load(b, ins, offset, part, lanes).view(dtype).reshape(-1, per)
                for i in range(per):
                    to = targets[piece * per + i]
                    if to is None:
                        continue
                    if lanes is None:
                        to[...] = raw[:, i]
                    else:
                        to[lanes] = raw[:, i]

        return (lambda: load(None)), (lambda mask: load(np.flatnonzero(mask)))

    def chosen_parameter(self, address, targets, dtype):
        """A load of whichever parameter each lane has the address of."""
        b = self.b

        def load(lanes):
            at = address() if lanes is None else address()[lanes]
            for one in np.unique(at):
                name = b.kernel.params[int(one) // PARAMETER_BYTES - 1].name
                offset = int(one) % PARAMETER_BYTES
                values = np.frombuffer(b.launch.parameters[name], dtype, len(targets), offset)
                here = np.flatnonzero(at == one) if lanes is None else lanes[at == one]
                for target, value in zip(targets, values, strict=True):
                    target[here] = value

        return (lambda: load(None)), (lambda mask: load(np.flatnonzero(mask)))

    @staticmethod
    def _narrow(where: Address) -> bool:
        return not isinstance(where.base, Reg) or (
            where.base.name.startswith("%r") and not where.base.name.startswith("%rd")
        )

    def op_st(self, ins):
        space, type_ = self.space(ins), self.type_of(ins)
        where, value = ins.operands[:2]
        items = value.items if isinstance(value, Vector) else (value,)
        dtype, size = DTYPES[type_], SIZES[type_] * len(items)
        sources = [self.source(v, type_) for v in items]
        if space not in ("global", "shared", "local"):
            raise PtxError(f"{space} memory")
        b, memory = self.b, self.memory(space)
        address = self.address(where, "u32" if space in ("shared", "local") and self._narrow(where) else "u64")
        if space == "global" and {"release", "relaxed", "volatile"} & set(ins.mods):
            return self.synchronising(ins, address, [], sources, dtype, "release" in ins.mods)
        pieces = max(size // 16, 1)
        part, per = size // pieces, len(items) // pieces
        raw = np.dtype("c16") if part == 16 else np.dtype(f"u{part}")

        def store(lanes):
            b.launch.clock += 1
            at = address() if lanes is None else address()[lanes]
            for piece in range(pieces):
                values = np.empty((len(at), per), dtype)
                for i in range(per):
                    s = sources[piece * per + i]
                    values[:, i] = s if lanes is None or not isinstance(s, np.ndarray) else s[lanes]
                offset = at if piece == 0 else at + at.dtype.type(piece * part)
                memory().store(b, ins, offset, values.view(raw).reshape(-1), lanes)

        return (lambda: store(None)), (lambda mask: store(np.flatnonzero(mask)))

    def synchronising(self, ins, address, targets, sources, dtype, orders):
        """A load or store that is an atomic access of one element."""
        b = self.b
        if len(targets) + len(sources) != 1:
            raise PtxError("vectors")

        def run(lanes):
            b.launch.clock += 1
            b.spun = True
            at = address()
            for lane in lanes.tolist():
                cell = b.memory.atomic(
                    b, ins, int(at[lane]), dtype.itemsize, lane, bool(sources) and orders, bool(targets) and orders
                )
                if cell is None:
                    continue
                if targets:
                    targets[0][lane] = cell.view(dtype)[0]
                else:
                    cell.view(dtype)[0] = sources[0][lane] if isinstance(sources[0], np.ndarray) else sources[0]

        return (lambda: run(np.arange(b.lanes))), (lambda mask: run(np.flatnonzero(mask)))

    def op_cp(self, ins):
        b = self.b
        if "bulk" in ins.mods:
            return boxes.bulk(self, ins)
        if "async" not in ins.mods or "mbarrier" in ins.mods:
            raise PtxError("kind of copy")
        if "commit_group" in ins.mods:

            def commit(mask):
                b.groups_committed[mask] += 1

            return (lambda: np.add(b.groups_committed, 1, b.groups_committed)), commit
        if "wait_group" in ins.mods or "wait_all" in ins.mods:
            all_ = "wait_all" in ins.mods
            allowed = 0 if all_ else ins.operands[0].bits

            def wait(lanes):
                b.launch.clock += 1
                if all_:  # as if committed
                    b.groups_committed[slice(None) if lanes is None else lanes] += 1
                b.shared.wait(b, lanes, allowed)

            return (lambda: wait(None)), (lambda mask: wait(np.flatnonzero(mask)))
        to, source, size, *rest = ins.operands
        size = size.bits
        to, source = self.address(to, "u32"), self.address(source, "u64")
        given = (
            self.source(rest[0], "u32")
            if rest and not (isinstance(rest[0], Reg) and rest[0].name.startswith("%rd"))
            else np.uint32(size)
        )
        raw = np.dtype("c16") if size == 16 else np.dtype(f"u{size}")

        def copy(lanes):
            b.launch.clock += 1
            lanes = np.arange(b.lanes) if lanes is None else lanes
            wanted = given[lanes] if isinstance(given, np.ndarray) else np.full(len(lanes), given)
            data = np.zeros(len(lanes), raw)
            if ((wanted != 0) & (wanted != size)).any():
                raise PtxError("a copy of part of its size")
            read = np.flatnonzero(wanted)
            if len(read):
                data[read] = b.memory.load(b, ins, source()[lanes[read]], size, lanes[read])
            b.shared.copy(b, ins, to()[lanes], data, lanes)

        return (lambda: copy(None)), (lambda mask: copy(np.flatnonzero(mask)))

    def op_atom(self, ins):
        return self.atomic(ins, ins.operands[0], ins.operands[1], ins.operands[2:])

    def op_red(self, ins):
        return self.atomic(ins, None, ins.operands[0], ins.operands[1:])

    def atomic(self, ins, to, where, values):
        shared = self.space(ins) == "shared"
        if self.space(ins) not in ("global", "shared"):
            raise PtxError("space")
        type_ = self.type_of(ins)
        dtype = DTYPES[type_]
        vector = isinstance(to, Vector) or isinstance(values[0], Vector)
        if vector:
            raise PtxError("vector atomics")
        name = next(m for m in ins.mods if m in ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec"))
        sources = [self.source(v, type_) for v in values]
        target, b = None if to is None else self.target(to, type_), self.b
        address = self.address(where, "u32" if shared and self._narrow(where) else "u64")
        release, acquire = bool({"release", "acq_rel"} & set(ins.mods)), bool({"acquire", "acq_rel"} & set(ins.mods))
        update = {
            "add": lambda old, v: old + v,
            "exch": lambda old, v: v,
            "and": operator.and_,
            "or": operator.or_,
            "xor": operator.xor,
            "min": np.fmin,
            "max": np.fmax,
            "cas": lambda old, c, v: np.where(old == c, v, old),
            "inc": lambda old, v: np.where(old >= v, 0, old + dtype.type(1)),
            "dec": lambda old, v: np.where((old == 0) | (old > v), v, old - dtype.type(1)),
        }[name]
        if type_ == "bf16" and name == "add":
            update = lambda old, v: bf16(from_bf16(old) + from_bf16(v))  # noqa: E731
        elif type_ == "bf16x2" or type_ == "f16x2":
            raise PtxError("packed atomics")

        def run(lanes):
            b.launch.clock += 1
            b.spun = not shared
            at = address()
            for lane in lanes.tolist():
                if shared:
                    cell = b.shared.atomic(b, ins, at[lane : lane + 1], dtype.itemsize, lane)
                else:
                    cell = b.memory.atomic(b, ins, int(at[lane]), dtype.itemsize, lane, release, acquire)
                if cell is None:
                    continue
                old = cell.view(dtype)[0]
                new = update(old, *(s[lane] if isinstance(s, np.ndarray) else s for s in sources))
                cell.view(dtype)[0] = new
                if target is not None:
                    target[lane] = old

        return (lambda: run(np.arange(b.lanes))), (lambda mask: run(np.flatnonzero(mask)))
