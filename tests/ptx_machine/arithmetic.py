"""Sums, products, quotients and extremes of integers and floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .floats import to_odd
from .operands import DTYPES, Operands
from .parse import Instruction, PtxError


class Arithmetic(Operands):
    def arithmetic(self, ins: Instruction, compute: Callable[..., Any]):
        if {"rz", "rm", "rp"} & set(ins.mods):
            raise PtxError("rounding mode")
        if "cc" in ins.mods:
            return self.with_carry(ins)
        return self.floats(ins, compute) or self.simple(ins, compute)

    def with_carry(self, ins):
        """add.cc, addc, sub.cc, subc, mad.cc, madc on 32 bits: into, through and out of the carry flag."""
        type_ = self.type_of(ins)
        if type_ not in ("u32", "s32", "b32"):
            raise PtxError("carry of other than 32 bits")
        to, *sources = ins.operands
        sources = [self.source(o, "u32") for o in sources]
        name, takes, gives = ins.name.rstrip("c")[:3], ins.name.endswith("c"), "cc" in ins.mods
        flag, high = self.carry, "hi" in ins.mods
        if type_ == "s32" and high:
            raise PtxError("signed high product with carry")
        target, half, low = self.target(to, "u32"), np.uint64(32), np.uint64(0xFFFFFFFF)

        def compute():
            a, b, *c = (np.asarray(s, np.uint64) for s in sources)
            if name == "mad":
                product = a * b
                total = (product >> half if high else product & low) + c[0]
            else:
                total = a + b if name == "add" else a - b
            if takes:
                total = total - flag if name == "sub" else total + flag
            return (total & low).astype(np.uint32), (total >> half) & np.uint64(1)

        def full():
            value, carry = compute()
            target[...] = value
            if gives:
                flag[...] = carry

        def masked(mask):
            value, carry = compute()
            np.copyto(target, value, where=mask)
            if gives:
                np.copyto(flag, carry, where=mask)

        return full, masked

    op_addc = op_subc = op_madc = with_carry

    def op_add(self, ins):
        return self.arithmetic(ins, np.add)

    def op_sub(self, ins):
        return self.arithmetic(ins, np.subtract)

    def op_mul(self, ins):
        type_ = self.type_of(ins)
        if type_[0] in "fb":
            return self.arithmetic(ins, np.multiply)
        if "lo" in ins.mods:
            return self.simple(ins, np.multiply)
        if "wide" in ins.mods:
            wide = f"{type_[0]}{2 * int(type_[1:])}"
            a, b = (self.source(o, type_) for o in ins.operands[1:])
            dtype = DTYPES[wide]
            return self.assign(ins.operands[0], wide, lambda a, b: np.multiply(a, b, dtype=dtype), a, b)
        return self.simple(ins, _high_product(type_))

    def op_mad(self, ins):
        type_ = self.type_of(ins)
        if type_[0] == "f":
            return self.op_fma(ins)
        if "cc" in ins.mods:
            return self.with_carry(ins)
        to, a, b, c = ins.operands
        if "lo" in ins.mods:
            return self.simple(ins, lambda a, b, c: a * b + c)
        a, b = self.source(a, type_), self.source(b, type_)
        if "wide" in ins.mods:
            wide = f"{type_[0]}{2 * int(type_[1:])}"
            dtype = DTYPES[wide]
            return self.assign(to, wide, lambda a, b, c: np.multiply(a, b, dtype=dtype) + c, a, b, self.source(c, wide))
        high = _high_product(type_)
        return self.assign(to, type_, lambda a, b, c: high(a, b) + c, a, b, self.source(c, type_))

    def op_fma(self, ins):
        type_ = self.type_of(ins)
        if {"rz", "rm", "rp"} & set(ins.mods):
            raise PtxError("rounding mode")
        double = np.float64
        if type_ == "f64":
            return self.simple(ins, _fma64)
        if type_ == "f32":
            return self.simple(ins, lambda a, b, c: (np.multiply(a, b, dtype=double) + c).astype(np.float32))
        if type_ == "f16":
            return self.simple(ins, lambda a, b, c: (np.multiply(a, b, dtype=double) + c).astype(np.float16))
        if type_ in ("bf16", "bf16x2", "f16x2"):
            # exact product and sum in float64, rounded to float32 by odd so that the second rounding is right
            return self.floats(ins, lambda a, b, c: to_odd(np.multiply(a, b, dtype=double), c))
        raise PtxError("type")

    def op_div(self, ins):
        type_ = self.type_of(ins)
        if type_[0] == "f":
            return self.simple(ins, np.divide)
        return self.simple(ins, _quotient)

    def op_rem(self, ins):
        return self.simple(ins, lambda a, b: a - _quotient(a, b) * b)

    def op_neg(self, ins):
        return self.arithmetic(ins, np.negative)

    def op_abs(self, ins):
        return self.arithmetic(ins, np.abs)

    def op_min(self, ins):
        return self.extreme(ins, np.minimum, np.fmin)

    def op_max(self, ins):
        return self.extreme(ins, np.maximum, np.fmax)

    def extreme(self, ins, with_nan, without):
        """A float min or max gives the other operand of a NaN, unless .NaN; and -0 < +0."""
        type_ = self.type_of(ins)
        if type_ in ("s16x2", "u16x2"):
            return self.floats(ins, with_nan)
        if type_[0] not in "fb":
            return self.simple(ins, with_nan)
        if "xorsign" in ins.mods:
            raise PtxError("xorsign")
        base = with_nan if "NaN" in ins.mods else without
        prefer_negative = with_nan is np.minimum

        def compute(*values):
            out = values[0]
            for other in values[1:]:
                a, out = out, base(out, other)
                zeros = (a == 0) & (other == 0)
                if np.any(zeros):
                    negative = (
                        (np.signbit(a) | np.signbit(other)) if prefer_negative else (np.signbit(a) & np.signbit(other))
                    )
                    out = np.where(zeros, np.where(negative, -out * 0 - 0.0, 0.0).astype(out.dtype), out)
            return out

        return self.floats(ins, compute)

    def op_copysign(self, ins):
        return self.simple(ins, lambda a, b: np.copysign(b, a))  # the sign of a on b

    def op_testp(self, ins):
        test = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda a: ~np.isnan(a)}
        kind = next(m for m in ins.mods if m in test)
        return self.assign(ins.operands[0], "pred", test[kind], self.source(ins.operands[1], self.type_of(ins)))


def _quotient(a: Any, b: Any) -> Any:
    """Truncated towards zero; of a division by zero, all ones."""
    a, b = np.asarray(a), np.asarray(b)
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    if a.dtype.kind == "i":
        q = np.abs(a) // np.abs(safe)
        q = np.where((a < 0) != (safe < 0), -q, q)
    else:
        q = a // safe
    return np.where(b == 0, np.array(-1).astype(a.dtype), q).astype(a.dtype)


def _high_product(type_: str) -> Callable[[Any, Any], Any]:
    bits, signed = int(type_[1:]), type_[0] == "s"
    if bits <= 32:
        wide, dtype = DTYPES[f"{type_[0]}{2 * bits}"], DTYPES[type_]
        return lambda a, b: (np.multiply(a, b, dtype=wide) >> wide.type(bits)).astype(dtype)

    def high(a, b):
        a, b = np.asarray(a), np.asarray(b)
        x, y = a.astype(np.uint64), b.astype(np.uint64)
        low = np.uint64(0xFFFFFFFF)
        half = np.uint64(32)
        x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
        middle = x1 * y0 + (x0 * y0 >> half)
        other = x0 * y1 + (middle & low)
        out = x1 * y1 + (middle >> half) + (other >> half)
        if signed:
            out = out - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
            return out.astype(np.int64)
        return out

    return high


def _fma64(a: Any, b: Any, c: Any) -> Any:
    if np.finfo(np.longdouble).nmant >= 63:
        return (np.multiply(a, b, dtype=np.longdouble) + c).astype(np.float64)
    return a * b + c
