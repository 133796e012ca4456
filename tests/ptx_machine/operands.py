"""Operands of PTX instructions as arrays of a batch's threads, and assignments to them.

An instruction is decoded once for a batch into two functions: one for all threads, one that takes a mask of those that are there.
"""

from __future__ import annotations

import dataclasses
import operator
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .floats import bf16, from_bf16, ftz
from .parse import SIZES, Imm, Instruction, PtxError, Reg, Symbol, Vector

DTYPES = {name: np.dtype(f"u{size}") for name, size in SIZES.items() if size <= 8}
DTYPES |= {f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)}
DTYPES |= {f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)} | {"pred": np.dtype(bool)}

# Parameters whose address is taken lie this far apart, from here on.
PARAMETER_BYTES = 4096


@dataclasses.dataclass
class Step:
    """An instruction ready to run. control: "branch", "barrier", "exit" or none; then the machine decides what is next."""

    full: Callable[[], None] | None
    masked: Callable[[np.ndarray], None] | None
    control: str = ""
    target: int = 0  # where a branch goes; a barrier's number
    predicate: Callable[[], np.ndarray] | None = None

    def taken(self, mask: np.ndarray | None) -> np.ndarray | None:
        """Which threads a control instruction concerns; None: all that are here."""
        if self.predicate is None:
            return None
        here = self.predicate()
        here = here.copy() if mask is None else here & mask
        return None if here.all() else here


class Operands:
    """What decoding an instruction needs of its batch."""

    def __init__(self, batch: Any) -> None:
        self.b, self.k = batch, batch.kernel
        self.rows = (-1, 32)
        self.carry = np.zeros(batch.lanes, np.uint64)

    def predicate(self, reg: Reg) -> Callable[[], np.ndarray]:
        array = self.b.registers[reg.name]
        return (lambda: ~array) if reg.negated else (lambda: array)

    def source(self, operand: Any, type_: str) -> Any:
        """An array of the batch's threads, or a scalar."""
        dtype = DTYPES[type_]
        if isinstance(operand, Reg):
            array = self.b.registers[operand.name]
            if operand.negated:
                raise PtxError("a negated operand")
            if array.dtype != dtype and np.bool_ in (array.dtype, dtype):
                raise PtxError(f"{operand.name} as {type_}")
            if array.itemsize < dtype.itemsize:
                raise PtxError(f"{operand.name} is narrower than {type_}")
            view = array.view(dtype)
            return view if array.itemsize == dtype.itemsize else view[:: array.itemsize // dtype.itemsize]
        if isinstance(operand, Imm):
            if dtype == np.bool_:
                return np.bool_(operand.bits != 0)
            if operand.is_float and dtype.kind == "f" and dtype.itemsize * 8 != operand.width:
                format_ = "<f" if operand.width == 32 else "<d"
                return dtype.type(struct.unpack(format_, operand.bits.to_bytes(operand.width // 8, "little"))[0])
            bits = operand.bits & ((1 << 8 * dtype.itemsize) - 1)
            return np.frombuffer(bits.to_bytes(dtype.itemsize, "little"), dtype)[0]
        if isinstance(operand, Symbol):
            return self.symbol(operand.name, dtype)
        raise PtxError(f"operand {operand}")

    def symbol(self, name: str, dtype: np.dtype) -> Any:
        b = self.b
        if name in self.k.shared:
            return dtype.type(self.k.shared[name][0])
        if name in self.k.local:
            return dtype.type(self.k.local[name][0])
        if name in b.launch.map_addresses:
            return dtype.type(b.launch.map_addresses[name])
        if name in b.launch.variables:
            return dtype.type(b.launch.variables[name])
        special, _, axis = name.partition(".")
        axis_index = "xyz".find(axis) if axis else 0
        lane = np.arange(b.lanes)
        if special == "%tid":
            return (lane % b.threads if axis_index == 0 else lane * 0).astype(dtype)
        if special == "%ntid":
            return dtype.type(b.threads if axis_index == 0 else 1)
        if special == "%ctaid":
            array = np.zeros(b.lanes, dtype)
            b.indices.append((array, axis_index))
            return array
        if special == "%nctaid":
            return dtype.type(b.launch.grid[axis_index])
        if special == "%laneid":
            return (lane % 32).astype(dtype)
        if special == "%warpid":
            return b.lane_warp.astype(dtype)
        if special in ("%smid", "%clusterid", "%cluster_ctaid", "%cluster_ctarank"):
            return dtype.type(0)
        if special in ("%nclusterid", "%cluster_nctaid", "%cluster_nctarank"):
            return dtype.type(1)
        if special.startswith("%lanemask_"):
            compare = {"eq": operator.eq, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
            bit = np.arange(32)
            table = [sum(1 << int(i) for i in bit if compare[special[10:]](i, me)) for me in range(32)]
            return np.array(table, np.uint32)[lane % 32].astype(dtype)
        names = [parameter.name for parameter in b.kernel.params]
        if name in names:  # its address, in a space of its own
            return dtype.type((names.index(name) + 1) * PARAMETER_BYTES)
        raise PtxError(f"unknown name {name}")

    def target(self, operand: Any, type_: str) -> np.ndarray | None:
        """Where to assign; a register wider than the type is extended by its sign or by zeros."""
        if operand is None:
            return None
        if not isinstance(operand, Reg):
            raise PtxError(f"destination {operand}")
        array, dtype = self.b.registers[operand.name], DTYPES[type_]
        if array.dtype == np.bool_:
            return array
        if array.itemsize == dtype.itemsize:
            return array.view(dtype)
        if array.itemsize < dtype.itemsize or dtype.kind == "f":
            raise PtxError(f"{operand.name} can't hold {type_}")
        return array.view(np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{array.itemsize}"))

    def assign(self, operand: Any, type_: str, compute: Callable[..., Any], *sources: Any) -> tuple[Callable, Callable]:
        """destination = compute(*sources)"""
        to = self.target(operand, type_)
        if (
            isinstance(compute, np.ufunc)
            and to.dtype == DTYPES[type_]
            and any(isinstance(s, np.ndarray) for s in sources)
        ):
            if len(sources) == 2:
                a, c = sources
                return (lambda: compute(a, c, out=to)), (lambda mask: np.copyto(to, compute(a, c), where=mask))
            return (lambda: compute(*sources, out=to)), (lambda mask: np.copyto(to, compute(*sources), where=mask))

        def full() -> None:
            to[...] = compute(*sources)

        def masked(mask: np.ndarray) -> None:
            np.copyto(to, compute(*sources), where=mask, casting="unsafe")

        return full, masked

    def type_of(self, ins: Instruction) -> str:
        return ins.type

    @staticmethod
    def copies(pairs: list[tuple[np.ndarray, Any]]):
        if len(pairs) == 1:
            to, value = pairs[0]
            return (lambda: np.copyto(to, value)), (lambda mask: np.copyto(to, value, where=mask))

        def full() -> None:
            for to, value in pairs:
                to[...] = value

        def masked(mask: np.ndarray) -> None:
            for to, value in pairs:
                np.copyto(to, value, where=mask)

        return full, masked

    def simple(self, ins: Instruction, compute: Callable[..., Any], type_: str | None = None):
        """All operands of the instruction's one type."""
        type_ = type_ or self.type_of(ins)
        if "ftz" in ins.mods and type_ == "f32":
            plain = compute
            compute = lambda *a: ftz(plain(*map(ftz, a)))  # noqa: E731
        if "sat" in ins.mods and type_[0] == "f":
            unlimited = compute
            compute = lambda *a: np.nan_to_num(np.clip(unlimited(*a), 0, 1), nan=0.0)  # noqa: E731
        return self.assign(ins.operands[0], type_, compute, *(self.source(o, type_) for o in ins.operands[1:]))

    def floats(self, ins: Instruction, compute: Callable[..., Any]):
        """The same for all float types: packed and bf16 ones by float32 and rounding."""
        type_ = self.type_of(ins)
        if type_ in ("f32", "f64", "f16"):
            return self.simple(ins, compute)
        if type_ == "bf16":
            return self.simple(ins, lambda *a: bf16(compute(*map(from_bf16, a))))
        if type_ in ("f16x2", "bf16x2"):
            half = type_[:-2]

            def packed(*a: Any) -> np.ndarray:
                parts = [np.atleast_1d(np.ascontiguousarray(x)).view(np.uint16) for x in a]
                if half == "bf16":
                    out = bf16(compute(*map(from_bf16, parts)))
                else:
                    out = compute(*(p.view(np.float16) for p in parts)).astype(np.float16).view(np.uint16)
                return np.ascontiguousarray(out).view(np.uint32)

            return self.simple(ins, packed)
        if type_ in ("s16x2", "u16x2"):
            half = np.int16 if type_[0] == "s" else np.uint16
            return self.simple(
                ins, lambda *a: compute(*(np.atleast_1d(np.ascontiguousarray(x)).view(half) for x in a)).view(np.uint32)
            )
        return None

    def op_mov(self, ins: Instruction):
        type_ = self.type_of(ins)
        to, value = ins.operands
        if isinstance(to, Vector):
            part = f"b{8 * SIZES[type_] // len(to.items)}"
            whole = np.ascontiguousarray(self.source(value, type_)).view(DTYPES[part]).reshape(-1, len(to.items))
            pairs = [(self.target(t, part), whole[:, i]) for i, t in enumerate(to.items) if t is not None]
            return self.copies(pairs)
        if isinstance(value, Vector):
            part = f"b{8 * SIZES[type_] // len(value.items)}"
            whole = self.target(to, type_).view(DTYPES[part]).reshape(-1, len(value.items))
            if any(isinstance(t, Reg) and t.name == to.name for t in value.items):
                raise PtxError("packs itself")
            return self.copies([(whole[:, i], self.source(t, part)) for i, t in enumerate(value.items)])
        return self.copies([(self.target(to, type_), self.source(value, type_))])
