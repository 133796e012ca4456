"""Products of warp groups (wgmma.mma_async) of sm90.

Descriptors of shared matrices as in CUTLASS (include/cute/arch/mma_sm90_desc.hpp): start, leading and stride offsets in 16 bytes,
and a swizzle that XORs the 16-byte index within 128 bytes of an address with the index of its 128-byte row.

A product's result stands in its registers at once: that ptxas keeps registers that are on their way apart is no matter of PTX.
What it reads of shared memory it goes on reading until its warp waits for its group; writes in between are reported.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .parse import Imm, PtxError, Reg, Vector
from .tensor_core import bf16_pair, f16_pair, s8_four, tf32_word

_SWIZZLE_BITS = {0: 0, 1: 3, 2: 2, 3: 1}  # none, 128, 64, 32 bytes


def swizzled(addresses: np.ndarray, bits: int) -> np.ndarray:
    return addresses ^ ((addresses >> 7 & ((1 << bits) - 1)) << 4)


def _offsets(rows: int, k: int, itemsize: int, major_mn: bool, lbo: int, sbo: int, bits: int) -> np.ndarray:
    """Byte offsets [rows, k] from a descriptor's start, before the swizzle."""
    r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
    per = 16 // itemsize  # elements of 16 bytes
    wide = 1 << bits  # 16-byte units of a swizzled row
    if not major_mn:
        if bits == 0:
            return r % 8 * 16 + r // 8 * sbo + c // per * lbo + c % per * itemsize
        return r % 8 * (16 * wide) + r // 8 * sbo + c * itemsize
    unit = r // per
    if bits == 0:
        return unit * sbo + c % 8 * 16 + c // 8 * lbo + r % per * itemsize
    return unit % wide * 16 + unit // wide * lbo + c % 8 * (16 * wide) + c // 8 * sbo + r % per * itemsize


class _Matrix:
    """An operand [rows, k] in shared memory."""

    def __init__(self, d: Any, register: Any, rows: int, k: int, itemsize: int, major_mn: bool) -> None:
        self.d, self.rows, self.k, self.itemsize, self.major_mn = d, rows, k, itemsize, major_mn
        self.descriptors = d.source(register, "b64")

    def addresses(self, groups: np.ndarray) -> np.ndarray:
        """[groups, rows, k]: bytes from the start of each CTA's shared memory."""
        words = self.descriptors.reshape(-1, 128)[groups]
        if (words != words[:, :1]).any():
            raise PtxError("a descriptor that differs within a warp group")
        words = words[:, 0].astype(np.int64)
        out = np.empty((len(groups), self.rows, self.k), np.int64)
        for shape in np.unique(words >> 16):
            lbo, sbo, mode = (int(shape) & 0x3FFF) << 4, (int(shape) >> 16 & 0x3FFF) << 4, int(shape) >> 46 & 3
            if int(shape) >> 33 & 7:
                raise PtxError("a descriptor's base offset")
            chosen = words >> 16 == shape
            table = _offsets(self.rows, self.k, self.itemsize, self.major_mn, lbo, sbo, _SWIZZLE_BITS[mode])
            out[chosen] = swizzled(((words[chosen] & 0x3FFF) << 4)[:, None, None] + table, _SWIZZLE_BITS[mode])
        return out

    def chunks(self, addresses: np.ndarray) -> np.ndarray:
        """[groups, rows', k']: one address for each 16 bytes that are read."""
        per = 16 // self.itemsize
        return addresses[:, ::per] if self.major_mn else addresses[:, :, ::per]


def wgmma(d: Any, ins: Any):
    b = d.b
    if "fence" in ins.mods:
        return (lambda: None), (lambda mask: None)
    if "commit_group" in ins.mods:

        def commit(mask):
            b.products_committed[mask.reshape(-1, 32).any(1)] += 1

        return (lambda: np.add(b.products_committed, 1, out=b.products_committed)), commit
    if "wait_group" in ins.mods:
        allowed = ins.operands[0].bits

        def wait(mask):
            b.launch.clock += 1
            here = np.ones(b.lanes // 32, bool) if mask is None else mask.reshape(-1, 32).any(1)
            b.shared.finish(b, "product", lambda r: here[r.who] and r.group < b.products_committed[r.who] - allowed)

        return (lambda: wait(None)), wait
    if "mma_async" not in ins.mods or "sp" in ins.mods:
        raise PtxError("kind of wgmma")
    shape = next(m for m in ins.mods if re.fullmatch(r"m64n\d+k\d+", m))
    n, k = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", shape).groups())
    type_d, type_a, type_b = ins.mods[ins.mods.index(shape) + 1 :][:3]
    if (
        type_d != ("s32" if type_a == "s8" else "f32")
        or type_a != type_b
        or type_a not in ("bf16", "f16", "tf32", "s8")
    ):
        raise PtxError("types")
    itemsize = {"tf32": 4, "s8": 1}.get(type_a, 2)
    decode = {"bf16": bf16_pair, "f16": f16_pair, "tf32": tf32_word, "s8": s8_four}[type_a]
    sums = np.float64 if type_a == "s8" else np.float32
    acc, a, right, scale_d, *rest = ins.operands
    signs, trans = ([1, 1], []) if type_a == "s8" else ([i.bits for i in rest[:2]], [i.bits for i in rest[2:]])
    signs = [s - (1 << 64) if s > 1 << 63 else s for s in signs]
    in_registers = isinstance(a, Vector)
    trans_a, trans_b = (0, trans[0] if trans else 0) if in_registers else (trans or [0, 0])
    to = [d.target(r, type_d) for r in acc.items]
    groups_total = b.lanes // 128
    if b.threads % 128:
        raise PtxError("threads aren't whole warp groups")
    left = None if in_registers else _Matrix(d, a, 64, k, itemsize, bool(trans_a))
    registers = [d.source(r, "b32") for r in a.items] if in_registers else []
    right = _Matrix(d, right, n, k, itemsize, bool(trans_b))
    keep = d.predicate(scale_d) if isinstance(scale_d, Reg) else None
    always = isinstance(scale_d, Imm) and scale_d.bits != 0
    group_cta = np.arange(groups_total) * 128 // b.threads
    group_warp = np.arange(groups_total) * 4 % (b.threads // 32)  # within its CTA

    def fetch(matrix: _Matrix, groups: np.ndarray, per_warp: bool) -> np.ndarray:
        addresses = matrix.addresses(groups)
        if addresses.min() < 0 or addresses.max() + itemsize > b.shared.size:
            b.report.add(
                "out of bounds",
                ins,
                f"a product reads shared bytes up to {int(addresses.max()):#x} of {b.shared.size:#x}",
            )
            addresses = np.clip(addresses, 0, b.shared.size - itemsize)
        base = group_cta[groups] * b.shared.stride
        if b.shared.races:
            chunks = matrix.chunks(addresses) // 16 * 16 + base[:, None, None]
            watch(chunks, groups, per_warp, matrix)
        bits = b.shared.views[itemsize][(addresses + base[:, None, None]) // itemsize]
        if itemsize == 1:
            return bits.view(np.int8).astype(np.float64)
        if itemsize == 4:
            return (bits & np.uint32(0xFFFFE000)).view(np.float32)
        if type_a == "bf16":
            return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return bits.view(np.float16).astype(np.float32)

    def watch(chunks: np.ndarray, groups: np.ndarray, per_warp: bool, matrix: _Matrix) -> None:
        """Each warp reads all of the right operand and its 16 rows of the left."""
        for i, group in enumerate(groups.tolist()):
            for warp in range(4):
                some = chunks[i]
                if per_warp:
                    step = len(some) // 4
                    some = some[warp * step : (warp + 1) * step]
                at = np.ascontiguousarray(some).reshape(-1)
                lane = group * 128 + warp * 32
                b.shared.check_read(b, ins, at, 16, np.full(len(at), lane))
                b.shared.begin(
                    b,
                    ins,
                    "product",
                    at,
                    16,
                    int(group_warp[group]) + warp,
                    lane // 32,
                    int(b.products_committed[lane // 32]),
                )

    def run(mask: np.ndarray | None) -> None:
        b.launch.clock += 1
        groups = np.arange(groups_total)
        if mask is not None:
            rows = mask.reshape(-1, 128)
            if (rows.any(1) & ~rows.all(1)).any():
                b.report.add("divergent warp", ins, "only a part of a warp group executes it")
            groups = groups[rows.any(1)]
        if in_registers:
            per = k // 8  # elements of a register
            x = np.empty((groups_total, 4, 2, 8, 2, 4, per), sums)  # group, warp, half, g, k half, t, element
            for i, r in enumerate(registers):
                x[:, :, i % 2, :, i // 2] = decode(r, b.lanes).reshape(groups_total, 4, 8, 4, per)
            x = x.reshape(groups_total, 64, k)[groups]
        else:
            x = fetch(left, groups, not trans_a)
        y = fetch(right, groups, False)
        out = np.matmul(x, y.transpose(0, 2, 1))
        if signs[0] * signs[1] < 0:
            out = -out
        out = out.reshape(len(groups), 4, 2, 8, n // 8, 4, 2)
        kept = None if keep is None else keep().reshape(-1, 4, 8, 4)[groups]
        for i, t in enumerate(to):
            place = t.reshape(-1, 4, 8, 4)
            value = out[:, :, i // 2 % 2, :, i // 4, :, i % 2]
            if always:
                value = value + place[groups]
            elif kept is not None:
                value = np.where(kept, value + place[groups], value)
            place[groups] = value

    return (lambda: run(None)), run
