"""Cross-entropy over GPT-2's vocabulary, and the same behind the head's projection; loss and gradients together, since the
kernels finish the gradient while the logits are at hand. cross_entropy is bound by memory: logits in, gradient out.
linear_cross_entropy is bound by tensor cores: three products of 2 N V C FLOPs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness.measure import Absent, Work, needs
from benchmarks.harness.op import Draw, Op


def logits_work(s, b):
    size = s["N"] * s["V"] * b
    return Work(10.0 * s["N"] * s["V"], size, size)


def head_work(s, b):
    x, weight = s["N"] * s["C"], s["V"] * s["C"]
    return Work(6.0 * s["N"] * s["V"] * s["C"], (x + weight) * b, (x + weight) * b)


def logits(size, draw: Draw):
    return draw.normal(size["N"], size["V"], std=3.0), draw.ids(size["V"], size["N"])


def hidden(size, draw: Draw):
    return (
        draw.normal(size["N"], size["C"]),
        draw.normal(size["V"], size["C"], std=0.02),
        draw.ids(size["V"], size["N"]),
    )


def liger(case):
    """On a copy: it writes the gradient over its logits, which are the other providers' too."""
    needs("liger_kernel")
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, targets: liger_cross_entropy(logits.clone(), targets)


def quack(case):
    needs("quack", "quack-kernels")
    from quack.cross_entropy import cross_entropy

    return lambda logits, targets: cross_entropy(logits, targets, reduction="mean")


def liger_linear(case):
    needs("liger_kernel")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda x, weight, targets: liger_fused_linear_cross_entropy(x, weight, targets)


def cut_linear(case):
    """Without its filter, which leaves gradients out that bf16 wouldn't show; https://github.com/apple/ml-cross-entropy."""
    needs("cut_cross_entropy")
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, weight, targets: linear_cross_entropy(x, weight, targets, filter_eps=None)


def torch_linear(case):
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return lambda x, weight, targets: F.linear_cross_entropy(x, weight, targets)


CROSS_ENTROPY = Op(
    "cross_entropy",
    logits,
    {"both": logits_work},
    {
        "gpu": [{"N": 8192, "V": 50257}, {"N": 8192, "V": 50304}],
        "cpu": [{"N": 128, "V": 50257}],
        "dry": [{"N": 3, "V": 65}],
    },
    gradients=(0,),
    growth={
        "gpu": {"V": (1024, 4096, 16384, 65536), "N": (512, 2048, 8192, 16384)},
        "cpu": {"V": (4096, 16384)},
    },
    peers={"F.cross_entropy": lambda case: F.cross_entropy, "Liger, on a copy of the logits": liger, "quack": quack},
)
LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    hidden,
    {"both": head_work},
    {
        "gpu": [
            {"N": 8192, "V": 50257, "C": 768},
            {"N": 16384, "V": 50257, "C": 768},
            {"N": 8192, "V": 50257, "C": 1600},
        ],
        "cpu": [{"N": 64, "V": 50257, "C": 768}],
        "dry": [{"N": 3, "V": 65, "C": 16}],
    },
    gradients=(0, 1),
    peers={"F.linear_cross_entropy": torch_linear, "Liger": liger_linear, "cut-cross-entropy": cut_linear},
)
OPS = (CROSS_ENTROPY, LINEAR_CROSS_ENTROPY)
