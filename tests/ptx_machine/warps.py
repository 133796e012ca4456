"""What the lanes of a warp do together."""

from __future__ import annotations

import numpy as np

from .operands import DTYPES, Operands
from .parse import Pair, PtxError


class Warps(Operands):
    def op_shfl(self, ins):
        mode = next(m for m in ins.mods if m in ("bfly", "up", "down", "idx"))
        to, value, b, c, _ = ins.operands if len(ins.operands) == 5 else (*ins.operands, None)
        to, ok = (to.first, to.second) if isinstance(to, Pair) else (to, None)
        to, ok = self.target(to, "b32"), None if ok is None else self.target(ok, "pred")
        value, batch, lane = self.source(value, "b32"), self.b, np.arange(32)
        b, c = self.source(b, "u32"), self.source(c, "u32")
        fixed = not isinstance(b, np.ndarray) and not isinstance(c, np.ndarray)

        def pick():
            bb = b.reshape(self.rows) if isinstance(b, np.ndarray) else b
            cc = c.reshape(self.rows) if isinstance(c, np.ndarray) else c
            bb, limit, segment = (
                (bb & np.uint32(31)).astype(np.int64),
                (cc & np.uint32(31)).astype(np.int64),
                (cc >> np.uint32(8) & np.uint32(31)).astype(np.int64),
            )
            largest = (lane & segment) | (limit & ~segment)
            smallest = lane & segment
            if mode == "up":
                j = lane - bb
                good = j >= largest
            elif mode == "down":
                j = lane + bb
                good = j <= largest
            elif mode == "bfly":
                j = lane ^ bb
                good = j <= largest
            else:
                j = smallest | (bb & ~segment)
                good = j <= largest
            return np.where(good, j, lane), good

        chosen = pick() if fixed else None
        flat = None
        if fixed:
            flat = (np.arange(batch.lanes) & ~31) + np.tile(chosen[0], batch.lanes // 32)

        def compute():
            if flat is not None:
                return value[flat] if isinstance(value, np.ndarray) else np.broadcast_to(value, batch.lanes), chosen[1]
            j, good = pick()
            rows = np.broadcast_to(value, batch.lanes).reshape(self.rows)
            return np.take_along_axis(rows, np.broadcast_to(j, rows.shape), 1).reshape(-1), good

        def full():
            v, good = compute()
            to[...] = v
            if ok is not None:
                ok.reshape(self.rows)[...] = good

        def masked(mask):
            self.whole_warps(ins, mask)
            v, good = compute()
            np.copyto(to, v, where=mask)
            if ok is not None:
                np.copyto(ok.reshape(self.rows), good, where=mask.reshape(self.rows))

        return full, masked

    def whole_warps(self, ins, mask) -> None:
        """A collective of all lanes that only some of a warp execute waits for the rest, or has no defined result."""
        rows = mask.reshape(self.rows)
        some = rows.any(1) & ~rows.all(1)
        if some.any():
            warp = int(np.flatnonzero(some)[0])
            self.b.report.add(
                "divergent warp",
                ins,
                f"only {int(rows[warp].sum())} lanes of a warp execute it, {self.b.who(None, warp * 32)}",
                int(some.sum()),
            )

    def collective(self, ins, to, type_, compute):
        """compute(rows of warps) -> one value a warp."""
        target = self.target(to, type_).reshape(self.rows)

        def full():
            target[...] = compute(None)[:, None]

        def masked(mask):
            rows = mask.reshape(self.rows)
            np.copyto(target, compute(rows)[:, None], where=rows)

        return full, masked

    def op_vote(self, ins):
        kind = next(m for m in ins.mods if m in ("all", "any", "uni", "ballot"))
        to, p = ins.operands[:2]
        read = self.predicate(p)

        def compute(active):
            rows = read().reshape(self.rows)
            if kind == "all":
                return (rows if active is None else rows | ~active).all(1)
            inside = rows if active is None else rows & active
            if kind == "any":
                return inside.any(1)
            if kind == "ballot":
                return (inside * (np.uint64(1) << np.arange(32, dtype=np.uint64))).sum(1).astype(np.uint32)
            raise PtxError("vote.uni")

        return self.collective(ins, to, "b32" if kind == "ballot" else "pred", compute)

    def op_activemask(self, ins):
        bits = np.uint64(1) << np.arange(32, dtype=np.uint64)

        def compute(active):
            rows = np.ones((self.b.lanes // 32, 32), bool) if active is None else active
            return (rows * bits).sum(1).astype(np.uint32)

        return self.collective(ins, ins.operands[0], "b32", compute)

    def op_redux(self, ins):
        type_ = self.type_of(ins)
        to, value = ins.operands[:2]
        value = self.source(value, type_)
        name = next(m for m in ins.mods if m in ("add", "min", "max", "and", "or", "xor"))
        reduce = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[name]

        def compute(active):
            if active is not None:
                self.whole_warps(ins, active.reshape(-1))
            return reduce.reduce(np.broadcast_to(value, self.b.lanes).reshape(self.rows), axis=1).astype(DTYPES[type_])

        return self.collective(ins, to, type_, compute)

    def op_elect(self, ins):
        """The lowest lane that is here."""
        to, p = (
            (ins.operands[0].first, ins.operands[0].second)
            if isinstance(ins.operands[0], Pair)
            else (ins.operands[0], None)
        )
        to = None if to is None else self.target(to, "b32").reshape(self.rows)
        p = None if p is None else self.target(p, "pred").reshape(self.rows)

        def run(mask):
            rows = np.ones((self.b.lanes // 32, 32), bool) if mask is None else mask.reshape(self.rows)
            first = rows.argmax(1)[:, None]
            if to is not None:
                np.copyto(to, first.astype(np.uint32), where=rows)
            if p is not None:
                np.copyto(p, np.arange(32) == first, where=rows)

        return (lambda: run(None)), run

    def op_createpolicy(self, ins):
        return self.copies([(self.target(ins.operands[0], "b64"), np.uint64(0))])
