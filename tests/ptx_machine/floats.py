"""Float formats that numpy hasn't got, and words of raw bits."""

from __future__ import annotations

from typing import Any

import numpy as np

RAW = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8"), 16: np.dtype("c16")}  # by bytes
_TINY = np.float32(np.finfo(np.float32).tiny)


def from_bf16(bits: Any) -> np.ndarray:
    """uint16 -> float32"""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16(x: Any) -> np.ndarray:
    """float32 -> uint16, to nearest even; NaN becomes 0x7fff."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    out = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(x)
    return np.where(nan, np.uint16(0x7FFF), out) if nan.any() else out


def tf32(x: np.ndarray) -> np.ndarray:
    """float32 -> bits of the nearest tf32, ties away from zero."""
    bits = x.view(np.uint32)
    out = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), out, bits)


def ftz(x: Any) -> Any:
    """Denormals to zeros of their sign."""
    small = np.abs(x) < _TINY
    if not np.any(small):
        return x
    return np.where(small, np.copysign(np.float32(0), x), x)


def round_integer(x: Any, rounding: str | None, dtype: np.dtype) -> np.ndarray:
    """Float -> integer, saturating; NaN gives zero."""
    x = np.asarray(x)
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](x.astype(np.float64))
    info = np.iinfo(dtype)
    out = np.where(np.isnan(whole), 0.0, whole)
    low, high = out <= float(info.min), out >= float(info.max)
    out = np.where(low | high, 0.0, out).astype(dtype)
    return np.where(low, info.min, np.where(high, info.max, out)).astype(dtype)


def to_odd(product: np.ndarray, c: Any) -> np.ndarray:
    """product + c in float32, rounded to odd, whose 24 bits are enough for a later right rounding to 8 or 11."""
    exact = product + c
    out = exact.astype(np.float32)
    back = out.astype(np.float64)
    bits = out.view(np.uint32)
    wrong = (back != exact) & np.isfinite(out) & (bits & np.uint32(1) == 0)
    towards = np.where(np.abs(back) > np.abs(exact), np.uint32(0xFFFFFFFF), np.uint32(1))
    return np.where(wrong, bits + towards, bits).astype(np.uint32).view(np.float32)
