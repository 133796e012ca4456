"""Token and position embeddings with their sum. Bound by memory: a row of each table in, one out; backward, the incoming
gradient in and both tables' gradients out, the unused rows of the token table as zeros."""

from __future__ import annotations

from benchmarks.harness.measure import Work
from benchmarks.harness.op import Draw, Op


def forward(s, b):
    rows = s["B"] * s["T"] * s["C"] * b
    return Work(0.0, rows + s["T"] * s["C"] * b + 8 * s["B"] * s["T"], rows)


def backward(s, b):
    return Work(0.0, s["B"] * s["T"] * s["C"] * b, (s["V"] + s["T"]) * s["C"] * b)


def inputs(size, draw: Draw):
    return (
        draw.ids(size["V"], size["B"], size["T"]),
        draw.normal(size["V"], size["C"]),
        draw.normal(size["T"], size["C"]),
    )


EMBEDDING = Op(
    "embedding",
    inputs,
    {"forward": forward, "backward": backward},
    {
        "gpu": [{"B": 32, "T": 1024, "C": 768, "V": 50257}, {"B": 8, "T": 1024, "C": 1600, "V": 50257}],
        "cpu": [{"B": 1, "T": 1024, "C": 768, "V": 50257}],
        "dry": [{"B": 2, "T": 6, "C": 16, "V": 33}],
    },
    gradients=(1, 2),
)
OPS = (EMBEDDING,)
