"""Softmax with a causal mask over attention scores, and over a vocabulary. Bound by memory: one read and one write of what is
visible forward (a causal row reads half, on average, and writes all), two reads and one write backward."""

from __future__ import annotations

import torch

from benchmarks.harness.measure import Work, needs
from benchmarks.harness.op import Draw, Op


def causal_work(reads):
    def work(s, b):
        size = s["heads"] * s["T"] * s["T"] * b
        return Work(5.0 * size / b, reads * size / 2, size)

    return work


def wide_work(reads):
    return lambda s, b: Work(5.0 * s["rows"] * s["V"], reads * s["rows"] * s["V"] * b, s["rows"] * s["V"] * b)


def scores(size, draw: Draw):
    return (draw.normal(1, size["heads"], size["T"], size["T"], std=4.0),)


def rows(size, draw: Draw):
    return (draw.normal(size["rows"], size["V"]),)


def liger(case):
    needs("liger_kernel")
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    return LigerSoftmaxFunction.apply


def quack(case):
    needs("quack", "quack-kernels")
    from quack.softmax import softmax

    return softmax


CAUSAL = Op(
    "softmax",
    scores,
    {"forward": causal_work(1), "backward": causal_work(2)},
    {"gpu": [{"heads": 96, "T": 1024}], "cpu": [{"heads": 12, "T": 512}], "dry": [{"heads": 2, "T": 24}]},
    gradients=(0,),
    growth={
        "gpu": {"T": (128, 256, 512, 1024, 2048)},
    },
    options={"scale": 0.125, "causal": True},
)
WIDE = Op(
    "softmax",
    rows,
    {"forward": wide_work(1), "backward": wide_work(2)},
    {"gpu": [{"rows": 8192, "V": 50257}], "cpu": [{"rows": 64, "V": 50257}], "dry": [{"rows": 3, "V": 65}]},
    gradients=(0,),
    peers={"torch.softmax": lambda case: lambda x: torch.softmax(x, -1), "Liger": liger, "quack": quack},
)
OPS = (CAUSAL, WIDE)
