"""Matrix fragments: mma.sync, ldmatrix and stmatrix.

A warp's fragment of a matrix is spread over its lanes: lane = 4 * group + t. Products are of the operands' exact values; sums are
float32's in the order that numpy's matrix product takes, where the hardware's are of aligned, truncated terms: both within the
rounding of a float32 accumulation.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .parse import PtxError


def mma(d: Any, ins: Any):
    shape = next(m for m in ins.mods if re.fullmatch(r"m\d+n\d+k\d+", m))
    m, n, k = map(int, re.findall(r"\d+", shape))
    if "row" not in ins.mods or "col" not in ins.mods or "sp" in ins.mods:
        raise PtxError("layout")
    type_d, type_a, type_b, type_c = [m for m in ins.mods[ins.mods.index("col") + 1 :] if m != "satfinite"][:4]
    to, a, b, c = (o.items for o in ins.operands[:4])
    if (m, n) == (8, 8) and type_a == "f64":
        return _mma_f64(d, to, a, b, c, k)
    if (m, n) != (16, 8) or type_a != type_b or type_d != type_c or type_d not in ("f32", "s32", "f64"):
        raise PtxError("shape or types")
    per = {"bf16": 2, "f16": 2, "tf32": 1, "s8": 4, "u8": 4, "f64": 1}[type_a]  # of k in a register
    register = "f64" if type_a == "f64" else "b32"
    regs_a, regs_b = [d.source(r, register) for r in a], [d.source(r, register) for r in b]
    regs_c, regs_d = [d.source(r, type_c) for r in c], [d.target(r, type_d) for r in to]
    warps = d.b.lanes // 32
    halves = k // (4 * per)  # registers along k
    if len(a) != 2 * halves or len(b) != halves or len(c) != 4:
        raise PtxError("registers")
    accumulate = np.float32 if type_d == "f32" else np.float64
    fa = np.empty((warps, 2, 8, halves, 4, per), accumulate)
    fb = np.empty((warps, halves, 4, per, 8), accumulate)
    fc = np.empty((warps, 2, 8, 4, 2), accumulate)
    decode = {"bf16": bf16_pair, "f16": f16_pair, "tf32": tf32_word, "s8": s8_four, "u8": u8_four, "f64": _words}[
        type_a
    ]

    def compute() -> np.ndarray:
        for i, r in enumerate(regs_a):  # rows group, group + 8; then the next columns
            fa[:, i % 2, :, i // 2] = decode(r, warps * 32).reshape(warps, 8, 4, per)
        for i, r in enumerate(regs_b):
            fb[:, i] = decode(r, warps * 32).reshape(warps, 8, 4, per).transpose(0, 2, 3, 1)
        for i, r in enumerate(regs_c):
            fc[:, i // 2, :, :, i % 2] = r.reshape(warps, 8, 4) if isinstance(r, np.ndarray) else r
        out = np.matmul(fa.reshape(warps, 16, k), fb.reshape(warps, k, 8))
        out += fc.reshape(warps, 16, 8)
        if type_d == "s32":  # saturates, or so far from wrapping that it is all one
            out = np.clip(out, -(2**31), 2**31 - 1)
        return out.reshape(warps, 2, 8, 4, 2)

    def full() -> None:
        out = compute()
        for i, to in enumerate(regs_d):
            to.reshape(warps, 8, 4)[...] = out[:, i // 2, :, :, i % 2]

    def masked(mask: np.ndarray) -> None:
        d.whole_warps(ins, mask)
        out = compute()
        for i, to in enumerate(regs_d):
            np.copyto(
                to.reshape(warps, 8, 4), out[:, i // 2, :, :, i % 2], where=mask.reshape(warps, 8, 4), casting="unsafe"
            )

    return full, masked


def _words(r: Any, lanes: int) -> np.ndarray:
    return r if isinstance(r, np.ndarray) else np.full(lanes, r)


def bf16_pair(r: Any, lanes: int) -> np.ndarray:
    r = _words(r, lanes)
    out = np.empty((lanes, 2), np.uint32)
    np.left_shift(r, np.uint32(16), out[:, 0])
    np.bitwise_and(r, np.uint32(0xFFFF0000), out[:, 1])
    return out.view(np.float32)


def f16_pair(r: Any, lanes: int) -> np.ndarray:
    return _words(r, lanes).view(np.float16).astype(np.float32)


def tf32_word(r: Any, lanes: int) -> np.ndarray:
    return (_words(r, lanes) & np.uint32(0xFFFFE000)).view(np.float32)


def s8_four(r: Any, lanes: int) -> np.ndarray:
    return _words(r, lanes).view(np.int8)


def u8_four(r: Any, lanes: int) -> np.ndarray:
    return _words(r, lanes).view(np.uint8)


def _mma_f64(d: Any, to: Any, a: Any, b: Any, c: Any, k: int):
    """m8n8k4: a (group, t), b (t, group), c (group, 2 t + i)."""
    if k != 4:
        raise PtxError("shape")
    a, b = d.source(a[0], "f64"), d.source(b[0], "f64")
    c, to = [d.source(r, "f64") for r in c], [d.target(r, "f64") for r in to]
    warps = d.b.lanes // 32

    def compute() -> np.ndarray:
        left, right = (_words(x, warps * 32).reshape(warps, 8, 4) for x in (a, b))
        out = np.matmul(left, right.transpose(0, 2, 1)).reshape(warps, 8, 4, 2)
        return out + np.stack([_words(x, warps * 32).reshape(warps, 8, 4) for x in c], -1)

    def full() -> None:
        out = compute()
        for i in range(2):
            to[i].reshape(warps, 8, 4)[...] = out[..., i]

    def masked(mask: np.ndarray) -> None:
        out = compute()
        for i in range(2):
            np.copyto(to[i].reshape(warps, 8, 4), out[..., i], where=mask.reshape(warps, 8, 4))

    return full, masked


def _matrix_op(d: Any, ins: Any) -> tuple[int, bool]:
    count = int(next(m for m in ins.mods if re.fullmatch(r"x[124]", m))[1:])
    if "m8n8" not in ins.mods or "b16" not in ins.mods:
        raise PtxError("shape")
    return count, "trans" in ins.mods


def ldmatrix(d: Any, ins: Any):
    """Lane 8 i + j has the address of row j of matrix i; a row is 16 bytes."""
    count, trans = _matrix_op(d, ins)
    to = [d.target(r, "b32") for r in ins.operands[0].items]
    address, b = d.address(ins.operands[1], "u32"), d.b
    warps = b.lanes // 32
    rows = (np.arange(warps)[:, None] * 32 + np.arange(8 * count)).reshape(-1)  # lanes whose address counts

    def load(mask: np.ndarray | None) -> np.ndarray:
        b.launch.clock += 1
        lanes = rows
        if mask is not None:
            d.whole_warps(ins, mask)
            lanes = rows[mask[rows]]
        some = b.shared.load(b, ins, address()[lanes], 16, lanes)
        if mask is None:
            data = some
        else:
            data = np.zeros(warps * 8 * count, np.complex128)
            data[mask[rows]] = some
        if trans:
            data = data.view(np.uint16).reshape(warps, count, 8, 8).transpose(1, 0, 3, 2)
            return np.ascontiguousarray(data).view(np.uint32).reshape(count, warps * 32)
        return data.view(np.uint32).reshape(warps, count, 32).transpose(1, 0, 2)

    def full() -> None:
        out = load(None)
        for i, t in enumerate(to):
            if t is not None:
                t[...] = out[i].reshape(-1)

    def masked(mask: np.ndarray) -> None:
        out = load(mask)
        for i, t in enumerate(to):
            if t is not None:
                np.copyto(t, out[i].reshape(-1), where=mask)

    return full, masked


def stmatrix(d: Any, ins: Any):
    count, trans = _matrix_op(d, ins)
    values = [d.source(r, "b32") for r in ins.operands[1].items]
    address, b = d.address(ins.operands[0], "u32"), d.b
    warps = b.lanes // 32
    rows = (np.arange(warps)[:, None] * 32 + np.arange(8 * count)).reshape(-1)

    def store(mask: np.ndarray | None) -> None:
        b.launch.clock += 1
        data = np.stack([_words(v, b.lanes).reshape(warps, 32) for v in values], 1)  # warps, count, lanes
        if trans:
            data = np.ascontiguousarray(data).view(np.uint16).reshape(warps, count, 8, 8).transpose(0, 1, 3, 2)
        data = np.ascontiguousarray(data).view(np.complex128).reshape(-1)
        lanes = rows
        if mask is not None:
            d.whole_warps(ins, mask)
            lanes, data = rows[mask[rows]], data[mask[rows]]
        b.shared.store(b, ins, address()[lanes], data, lanes)

    return (lambda: store(None)), store
