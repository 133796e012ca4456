"""Logic, shifts, fields and permutations of bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from .operands import DTYPES, Operands
from .parse import SIZES, PtxError


class Bits(Operands):
    def op_not(self, ins):
        return self.simple(ins, np.logical_not if "pred" in ins.mods else np.invert)

    def op_cnot(self, ins):
        return self.simple(ins, lambda a: (a == 0).astype(a.dtype))

    def op_and(self, ins):
        return self.simple(ins, np.bitwise_and)

    def op_or(self, ins):
        return self.simple(ins, np.bitwise_or)

    def op_xor(self, ins):
        return self.simple(ins, np.bitwise_xor)

    def op_shl(self, ins):
        return self.shift(ins, np.left_shift)

    def op_shr(self, ins):
        return self.shift(ins, np.right_shift)

    def shift(self, ins, compute):
        type_ = self.type_of(ins)
        to, a, amount = ins.operands
        dtype, bits = DTYPES[type_], 8 * SIZES[type_]
        a, amount = self.source(a, type_), self.source(amount, "u32")
        limit = bits - 1 if dtype.kind == "i" else bits

        def shifted(a, amount):
            small = np.minimum(amount, limit).astype(dtype)
            if dtype.kind == "i":
                return compute(a, small)
            return np.where(small < bits, compute(a, np.minimum(small, bits - 1).astype(dtype)), 0).astype(dtype)

        if not isinstance(amount, np.ndarray) and int(amount) < bits:
            return self.assign(to, type_, compute, a, dtype.type(amount))
        return self.assign(to, type_, shifted, a, amount)

    def op_shf(self, ins):
        left, wrap = "l" in ins.mods, "wrap" in ins.mods
        to, low, high, amount = ins.operands

        def compute(low, high, amount):
            both = (np.asarray(high, np.uint64) << np.uint64(32)) | low
            n = (amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype(np.uint64)
            out = (both << n) >> np.uint64(32) if left else both >> n
            return out.astype(np.uint32)

        return self.assign(to, "b32", compute, *(self.source(o, "b32") for o in (low, high, amount)))

    def op_bfe(self, ins):
        type_ = self.type_of(ins)
        to, a, at, length = ins.operands
        bits, signed, dtype = 8 * SIZES[type_], type_[0] == "s", DTYPES[type_]
        unsigned = DTYPES[f"u{bits}"]

        def compute(a, at, length):
            at, length = np.minimum(at & 255, bits).astype(np.int64), np.minimum(length & 255, bits).astype(np.int64)
            raw = np.asarray(a).view(unsigned) if isinstance(a, np.ndarray) else unsigned.type(int(a) & (2**bits - 1))
            moved = np.where(at < bits, raw >> np.minimum(at, bits - 1).astype(unsigned), 0).astype(unsigned)
            full = length >= bits
            ones = np.where(
                full,
                unsigned.type(2**bits - 1),
                (unsigned.type(1) << np.minimum(length, bits - 1).astype(unsigned)) - unsigned.type(1),
            )
            out = moved & ones.astype(unsigned)
            if signed:
                top = np.minimum(at + length - 1, bits - 1)
                sign = np.where(length > 0, (raw >> np.maximum(top, 0).astype(unsigned)) & unsigned.type(1), 0).astype(
                    bool
                )
                out = np.where(sign, out | ~ones.astype(unsigned), out)
            return out.view(dtype)

        return self.assign(
            to, type_, compute, self.source(a, type_), self.source(at, "u32"), self.source(length, "u32")
        )

    def op_bfi(self, ins):
        type_ = self.type_of(ins)
        to, a, into, at, length = ins.operands
        bits, dtype = 8 * SIZES[type_], DTYPES[type_]

        def compute(a, into, at, length):
            at, length = np.minimum(at & 255, bits).astype(np.int64), np.minimum(length & 255, bits).astype(np.int64)
            ones = np.where(
                length >= bits,
                dtype.type(2**bits - 1),
                (dtype.type(1) << np.minimum(length, bits - 1).astype(dtype)) - dtype.type(1),
            )
            place = np.minimum(at, bits - 1).astype(dtype)
            field = np.where(at < bits, ones.astype(dtype) << place, 0).astype(dtype)
            return (into & ~field) | ((a << place) & field)

        sources = (self.source(a, type_), self.source(into, type_), self.source(at, "u32"), self.source(length, "u32"))
        return self.assign(to, type_, compute, *sources)

    def op_prmt(self, ins):
        if set(ins.mods) - {"b32"}:
            raise PtxError("mode")

        def compute(a, b, selector):
            both = (np.asarray(b, np.uint64) << np.uint64(32)) | a
            out: Any = np.uint64(0)
            for i in range(4):
                nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
                byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
                byte = np.where(
                    nibble & np.uint32(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte
                )
                out = out | (byte << np.uint64(8 * i))
            return out.astype(np.uint32)

        return self.assign(ins.operands[0], "b32", compute, *(self.source(o, "b32") for o in ins.operands[1:]))

    def op_lop3(self, ins):
        to, *sources, table = ins.operands
        bits = table.bits

        def compute(a, b, c):
            out: Any = np.uint32(0)
            for i in range(8):
                if bits >> i & 1:
                    out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
            return out

        return self.assign(to, "b32", compute, *(self.source(o, "b32") for o in sources))

    def op_popc(self, ins):
        return self.assign(ins.operands[0], "u32", np.bitwise_count, self.source(ins.operands[1], self.type_of(ins)))

    def op_clz(self, ins):
        type_ = self.type_of(ins)
        bits = 8 * SIZES[type_]

        def compute(a):
            out = np.full(np.shape(a), bits, np.uint32)
            for i in range(bits):
                out[(a >> a.dtype.type(i)) & a.dtype.type(1) != 0] = bits - 1 - i
            return out

        return self.assign(ins.operands[0], "u32", compute, self.source(ins.operands[1], type_))

    def op_brev(self, ins):
        def compute(a):
            out = np.zeros_like(a)
            for i in range(32):
                out |= ((a >> np.uint32(i)) & np.uint32(1)) << np.uint32(31 - i)
            return out

        return self.simple(ins, compute, "b32")
