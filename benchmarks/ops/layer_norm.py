"""LayerNorm, alone and behind a residual addition. Bound by memory: 2 passes over [rows, width] forward and 3 backward alone,
4 and 4 with the residual (two sums in, two out; dy, dtotal and total in, one gradient out)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from benchmarks.harness.measure import Absent, Work, needs
from benchmarks.harness.op import Draw, Op

SIZES = {
    "gpu": [{"rows": 32768, "width": width} for width in (768, 1600)],
    "cpu": [{"rows": 2048, "width": 768}],
    "dry": [{"rows": 5, "width": 48}],
}
GROWTH = {
    "gpu": {"width": (256, 512, 768, 1600, 4096, 8192), "rows": (512, 2048, 8192, 32768, 131072)},
    "cpu": {"width": (256, 3072)},
    "dry": {"width": (16, 32, 64)},
}


def traffic(read, written):
    """That many passes over [rows, width]; the vectors of a width are left out."""
    return lambda s, b: Work(8.0 * s["rows"] * s["width"], *(n * s["rows"] * s["width"] * b for n in (read, written)))


def inputs(size, draw: Draw, count: int = 1):
    rows, width = size["rows"], size["width"]
    return (*(draw.normal(rows, width) for _ in range(count)), draw.normal(width), draw.normal(width))


def native(case):
    return lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias)


def liger(case):
    needs("liger_kernel")
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-5)


def quack(case):
    """Its forward, which takes weight and bias in float32."""
    needs("quack", "quack-kernels")
    if case.mode != "forward":
        raise Absent("its LayerNorm has no autograd function")
    from quack.rmsnorm import layernorm_fwd

    return lambda x, weight, bias: layernorm_fwd(x, weight.float(), bias.float(), eps=1e-5)


def native_sum(case):
    def call(x, residual, weight, bias):
        total = torch.add(residual, x)
        return F.layer_norm(total, weight.shape, weight, bias), total

    return call


LAYER_NORM = Op(
    "layer_norm",
    inputs,
    {"forward": traffic(1, 1), "backward": traffic(2, 1)},
    SIZES,
    gradients=(0, 1, 2),
    growth=GROWTH,
    peers={"F.layer_norm": native, "Liger": liger, "quack": quack},
)
ADD_LAYER_NORM = Op(
    "add_layer_norm",
    functools.partial(inputs, count=2),
    {"forward": traffic(2, 2), "backward": traffic(3, 1)},
    SIZES,
    gradients=(0, 1, 2, 3),
    peers={"add, F.layer_norm": native_sum},
)
OPS = (LAYER_NORM, ADD_LAYER_NORM)
