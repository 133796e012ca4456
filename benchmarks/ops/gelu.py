"""GELU, alone and with a bias. Bound by memory: one read and one write forward, two reads and one write backward."""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks.harness.measure import Absent, Work, needs
from benchmarks.harness.op import Draw, Op

SIZES = {
    "gpu": [{"rows": 32768, "width": 3072}, {"rows": 32768, "width": 6400}],
    "cpu": [{"rows": 1024, "width": 3072}],
    "dry": [{"rows": 5, "width": 48}],
}
GROWTH = {"gpu": {"rows": (512, 2048, 8192, 32768)}}


def traffic(reads):
    return lambda s, b: Work(
        15.0 * s["rows"] * s["width"], reads * s["rows"] * s["width"] * b, s["rows"] * s["width"] * b
    )


def inputs(size, draw: Draw):
    return (draw.normal(size["rows"], size["width"]),)


def inputs_with_bias(size, draw: Draw):
    return draw.normal(size["rows"], size["width"]), draw.normal(size["width"])


def liger(case):
    needs("liger_kernel")
    raise Absent("has GELU only in GEGLU, times a second input")


MODES = {"forward": traffic(1), "backward": traffic(2)}
GELU = Op(
    "gelu",
    inputs,
    MODES,
    SIZES,
    gradients=(0,),
    growth=GROWTH,
    peers={"F.gelu": lambda case: lambda x: F.gelu(x, approximate="tanh"), "Liger": liger},
)
BIAS_GELU = Op("bias_gelu", inputs_with_bias, MODES, SIZES, gradients=(0, 1))
OPS = (GELU, BIAS_GELU)
