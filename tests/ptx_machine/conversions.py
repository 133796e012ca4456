"""Comparisons, selections, conversions between types, and functions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .floats import bf16, from_bf16, ftz, round_integer, tf32, to_odd
from .operands import DTYPES, Operands
from .parse import SIZES, Pair, PtxError, Reg

_COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_COMPARE |= {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}  # of unsigned integers


class Conversions(Operands):
    @staticmethod
    def test(name: str, is_float: bool) -> Callable[[Any, Any], Any]:
        if is_float and name in ("num", "nan"):
            return (
                (lambda a, b: np.isnan(a) | np.isnan(b))
                if name == "nan"
                else (lambda a, b: ~(np.isnan(a) | np.isnan(b)))
            )
        if is_float and name.endswith("u"):  # or unordered
            # not (a opposite b)
            opposite = {"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}[name[:-1]]
            if opposite == "ne":
                return lambda a, b: (a == b) | np.isnan(a) | np.isnan(b)
            if opposite == "eq":
                return lambda a, b: ~(a == b)
            compare = _COMPARE[opposite]
            return lambda a, b: ~compare(a, b)
        if is_float and name == "ne":  # ordered
            return lambda a, b: (a < b) | (a > b)
        return _COMPARE[name]

    def packed_setp(self, ins, to, a, b, type_):
        """Two predicates of two halves."""
        if ins.mods[1] in ("and", "or", "xor") or not isinstance(to, Pair):
            raise PtxError("packed comparison")
        test, decode = self.test(ins.mods[0], True), from_bf16 if type_ == "bf16x2" else (lambda x: x.view(np.float16))
        targets = self.target(to.first, "pred"), self.target(to.second, "pred")
        halves = [np.broadcast_to(x, self.b.lanes) if not isinstance(x, np.ndarray) else x for x in (a, b)]

        def run(mask):
            for i, t in enumerate(targets):
                x, y = (
                    decode(h.view(np.uint16)[i::2])
                    if h.flags.c_contiguous
                    else decode(np.ascontiguousarray(h).view(np.uint16)[i::2].copy())
                    for h in halves
                )
                np.copyto(t, test(x, y), where=True if mask is None else mask)

        return (lambda: run(None)), run

    def op_setp(self, ins):
        type_ = self.type_of(ins)
        to, a, b, *rest = ins.operands
        name = ins.mods[0]
        a, b = self.source(a, type_), self.source(b, type_)
        if type_ in ("bf16x2", "f16x2"):
            return self.packed_setp(ins, to, a, b, type_)
        if type_ == "bf16":
            a, b = _lazy(from_bf16, a), _lazy(from_bf16, b)
        is_float = type_[0] == "f" or type_ == "bf16"
        flush = ftz if "ftz" in ins.mods and type_ == "f32" else (lambda x: x)
        test = self.test(name, is_float)
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(ins.mods[1])
        third = self.predicate(rest[0]) if rest and isinstance(rest[0], Reg) else None
        first, second = (to.first, to.second) if isinstance(to, Pair) else (to, None)
        first, second = self.target(first, "pred"), self.target(second, "pred") if second else None

        def compute():
            p = test(flush(a() if callable(a) else a), flush(b() if callable(b) else b))
            q = None if second is None else ~p
            if combine is not None:
                c = third()
                p, q = combine(p, c), None if q is None else combine(q, c)
            return p, q

        def full():
            p, q = compute()
            if first is not None:
                first[...] = p
            if second is not None:
                second[...] = q

        def masked(mask):
            p, q = compute()
            if first is not None:
                np.copyto(first, p, where=mask)
            if second is not None:
                np.copyto(second, q, where=mask)

        return full, masked

    def op_selp(self, ins):
        type_ = self.type_of(ins)
        to, a, b, p = ins.operands
        p = self.predicate(p)
        return self.assign(to, type_, lambda a, b: np.where(p(), a, b), self.source(a, type_), self.source(b, type_))

    def op_slct(self, ins):
        to, a, b, c = ins.operands
        type_ = ins.mods[-2]
        sources = self.source(a, type_), self.source(b, type_), self.source(c, ins.mods[-1])
        return self.assign(to, type_, lambda a, b, c: np.where(c >= 0, a, b), *sources)

    def op_cvt(self, ins):
        types = [m for m in ins.mods if m in SIZES]
        if len(types) != 2:
            raise PtxError("types")
        to_type, from_type = types
        mods = set(ins.mods) - set(types)
        unknown = mods - {"rn", "rz", "rni", "rzi", "rmi", "rpi", "rna", "sat", "ftz", "satfinite", "relu", "rm", "rp"}
        if unknown:
            raise PtxError(f"{unknown}")
        rounding = next((m for m in ins.mods if m in ("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna")), None)
        to, *values = ins.operands
        if to_type in ("bf16x2", "f16x2"):
            if from_type != "f32" or rounding != "rn" or mods - {"rn", "relu"}:
                raise PtxError("conversion")
            high, low = (self.source(v, "f32") for v in values)
            one = (
                bf16
                if to_type == "bf16x2"
                else (lambda x: np.asarray(x, np.float32).astype(np.float16).view(np.uint16))
            )
            relu = (
                (lambda x: np.where(x > 0, x, np.where(np.isnan(x), x, np.float32(0))))
                if "relu" in mods
                else (lambda x: x)
            )
            compute = lambda h, lo: (one(relu(h)).astype(np.uint32) << np.uint32(16)) | one(relu(lo))  # noqa: E731
            return self.assign(to, "b32", compute, high, low)
        value = self.source(values[0], from_type)
        source_float, to_float = (
            from_type in ("f16", "f32", "f64", "bf16"),
            to_type in ("f16", "f32", "f64", "bf16", "tf32"),
        )
        decode = from_bf16 if from_type == "bf16" else ftz if "ftz" in mods and from_type == "f32" else (lambda x: x)
        dtype = DTYPES[to_type]
        if to_float:
            if to_type == "tf32":
                if rounding != "rna":
                    raise PtxError("rounding")
                return self.assign(to, "b32", lambda x: tf32(np.asarray(x, np.float32)), value)
            if rounding in ("rz", "rm", "rp"):
                raise PtxError("rounding")
            whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.get(rounding or "", lambda x: x)
            clamp = (lambda x: np.nan_to_num(np.clip(x, 0, 1), nan=0.0)) if "sat" in mods else (lambda x: x)
            if to_type == "bf16":
                if not source_float and SIZES[from_type] <= 4:
                    return self.assign(to, "b16", lambda x: bf16(to_odd(np.asarray(x, np.float64), 0.0)), value)
                if from_type not in ("f32", "f16", "bf16"):
                    raise PtxError("conversion")
                return self.assign(to, "b16", lambda x: bf16(clamp(whole(decode(x)))), value)
            if from_type == "f64" and to_type == "f16":
                raise PtxError("conversion")
            flush = ftz if "ftz" in mods and to_type == "f32" else (lambda x: x)
            return self.assign(to, to_type, lambda x: flush(clamp(whole(decode(x))).astype(dtype)), value)
        if source_float:
            return self.assign(to, to_type, lambda x: round_integer(decode(x), rounding, dtype), value)
        if "sat" in mods:
            low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
            compute = lambda x: np.clip(x.astype(object), low, high).astype(dtype)  # noqa: E731
            return self.assign(to, to_type, compute, value)
        return self.assign(to, to_type, lambda x: x.astype(dtype), value)

    def op_cvta(self, ins):
        if "shared" in ins.mods:
            raise PtxError("generic addresses")  # those of local memory are its own here
        return self.copies([(self.target(ins.operands[0], "b64"), self.source(ins.operands[1], "b64"))])

    def op_ex2(self, ins):
        return self.floats(ins, np.exp2)

    def op_lg2(self, ins):
        return self.floats(ins, np.log2)

    def op_rcp(self, ins):
        return self.floats(ins, np.reciprocal)

    def op_sqrt(self, ins):
        return self.floats(ins, np.sqrt)

    def op_rsqrt(self, ins):
        return self.floats(ins, lambda x: (1.0 / np.sqrt(x.astype(np.float64))).astype(x.dtype))

    def op_sin(self, ins):
        return self.floats(ins, np.sin)

    def op_cos(self, ins):
        return self.floats(ins, np.cos)

    def op_tanh(self, ins):
        return self.floats(ins, np.tanh)


def _lazy(convert, value):
    return (lambda: convert(value)) if isinstance(value, np.ndarray) else convert(value)
