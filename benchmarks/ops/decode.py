"""Decode attention: one new query a row against a long cache. Bound by memory: every key and value up to the length once."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness.measure import Work
from benchmarks.harness.op import Draw, Op

SIZES = {
    "gpu": [{"B": B, "H": 12, "S": 1024, "D": 64} for B in (1, 8, 32, 128)],
    "cpu": [{"B": 8, "H": 12, "S": 1024, "D": 64}],
    "dry": [{"B": 2, "H": 2, "S": 70, "D": 16}],
}
GROWTH = {
    "gpu": {"S": (128, 256, 512, 1024, 4096, 16384)},
}


def work(s, b):
    cache = 2 * s["B"] * s["H"] * s["S"] * s["D"]
    return Work(2.0 * cache, cache * b, s["B"] * s["H"] * s["D"] * b)


def inputs(size, draw: Draw):
    B, H, S, D = size["B"], size["H"], size["S"], size["D"]
    lengths = torch.full((B,), S, dtype=torch.int32, device=draw.ids(1, 1).device)  # full: what the bytes count
    return draw.normal(B, H, 1, D), draw.normal(B, H, S, D), draw.normal(B, H, S, D), lengths


def sdpa(case):
    """On the filled part of the cache, which a host that knows the lengths can slice."""
    return lambda q, k, v, lengths: F.scaled_dot_product_attention(q, k, v)


def masked_sdpa(case):
    """Lengths on the device: what a captured graph needs."""

    def call(q, k, v, lengths):
        visible = torch.arange(k.shape[2], device=k.device) < lengths[:, None, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)

    return call


DECODE = Op(
    "decode_attention",
    inputs,
    {"forward": work},
    SIZES,
    growth=GROWTH,
    peers={"SDPA": sdpa, "SDPA, masked": masked_sdpa},
)
OPS = (DECODE,)
