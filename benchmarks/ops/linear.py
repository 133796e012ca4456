"""GPT-2's matrix products with their epilogues. Bound by tensor cores: 2 M N K FLOPs a product, one forward and two backward;
an activation's derivative, the bias and its gradient ride along. `mlp` is two layers, four times as wide between them."""

from __future__ import annotations

import functools
import importlib

import torch
import torch.nn.functional as F

from benchmarks.harness.measure import Absent, Work, needs_cuda
from benchmarks.harness.op import Draw, Op
from fastgpt import reference

# QKV, attention projection, up, down of GPT-2 124M at 16 x 1024 tokens; up of 1.5B
LAYERS = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
SIZES = {
    "gpu": [*({"M": 16384, "K": k, "N": n} for k, n in LAYERS), {"M": 8192, "K": 1600, "N": 6400}],
    "cpu": [{"M": 512, "K": 768, "N": 3072}],
    "dry": [{"M": 5, "K": 32, "N": 48}],
}
GROWTH = {
    "gpu": {"M": (1, 16, 128, 1024, 4096, 16384)},
    "cpu": {"M": (32, 128)},
}
MLP_GROWTH = {
    "gpu": {"C": (256, 512, 1024, 2048, 4096)},
    "cpu": {"C": (192, 384)},
}
MLP_SIZES = {
    "gpu": [{"M": 16384, "C": 768}, {"M": 8192, "C": 1600}],
    "cpu": [{"M": 512, "C": 768}],
    "dry": [{"M": 5, "C": 16}],
}


def product(passes):
    """passes: 1 forward, 2 backward. What is read: both operands of each product; what is written: its result."""

    def work(s, b):
        x, weight, y = s["M"] * s["K"], s["N"] * s["K"], s["M"] * s["N"]
        read, written = (x + weight, y) if passes == 1 else (2 * y + x + weight, x + weight)
        return Work(2.0 * passes * s["M"] * s["K"] * s["N"], read * b, written * b)

    return work


def layers(passes):
    def work(s, b):
        one = product(passes)({"M": s["M"], "K": s["C"], "N": 4 * s["C"]}, b)
        return Work(*(2 * part for part in one))

    return work


def inputs(size, draw: Draw):
    K, N = size["K"], size["N"]
    return draw.normal(size["M"], K), draw.normal(N, K, std=K**-0.5), draw.normal(N)


def mlp_inputs(size, draw: Draw):
    M, C = size["M"], size["C"]
    up, down = (4 * C, C), (C, 4 * C)
    weights = [t for n, k in (up, down) for t in (draw.normal(n, k, std=k**-0.5), draw.normal(n))]
    return draw.normal(M, C), *weights


def residual_inputs(size, draw: Draw):
    return *mlp_inputs(size, draw), draw.normal(size["M"], size["C"]).float()


def with_residual(module):
    """A block's: residuals are fp32 beside a branch in 16 bits, as under autocast."""
    return lambda *tensors: module().mlp(*tensors[:5], residual=tensors[5])


def residual_layers(passes):
    """The residual, and y or its gradient, in fp32: read once and written once; the gradient is what came."""

    def work(s, b):
        inner, one = layers(passes)(s, b), 4 * s["M"] * s["C"]
        narrow = s["M"] * s["C"] * b
        if passes == 1:
            return Work(inner.flops, inner.read + one, inner.written + one - narrow)
        return Work(inner.flops, inner.read + one - narrow, inner.written)

    return work


def library_epilogue(case):
    """cuBLASLt's own fused bias and tanh GELU; forward only."""
    needs_cuda("cuBLASLt's epilogue")
    if case.mode != "forward":
        raise Absent("has no gradient")
    return lambda x, weight, bias: torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


def tuned(case):
    """torch.compile with its templates timed against the library: what Inductor's own Triton comes to."""
    needs_cuda("torch.compile, max-autotune")
    if case.mode != "forward" or [case.size[name] for name in ("M", "K", "N")] != [16384, 768, 3072]:
        raise Absent("tuned for one size's forward alone: it takes a minute")
    torch._dynamo.reset()
    function = functools.partial(reference.linear, activation=case.size.get("activation"))
    return torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs")


MODES = {"forward": product(1), "backward": product(2)}
# Without an activation the op is torch's own on a GPU, and there is nothing to measure.
PLAIN = Op(
    "linear",
    inputs,
    MODES,
    {**SIZES, "gpu": []},
    gradients=(0, 1, 2),
    growth={"cpu": GROWTH["cpu"]},
    peers={"F.linear": lambda case: F.linear},
)
GELU = Op(
    "linear",
    inputs,
    MODES,
    {scale: [size for size in sizes if size["N"] > size["K"] or scale == "dry"] for scale, sizes in SIZES.items()},
    gradients=(0, 1, 2),
    growth={"gpu": GROWTH["gpu"]},
    options={"activation": "gelu_tanh"},
    peers={"cuBLASLt epilogue": library_epilogue, "torch.compile, max-autotune": tuned},
)
MLP = Op(
    "mlp",
    mlp_inputs,
    {"forward": layers(1), "backward": layers(2)},
    MLP_SIZES,
    gradients=(0, 1, 2, 3, 4),
    growth=MLP_GROWTH,
)
RESIDUAL = Op(
    "mlp",
    residual_inputs,
    {"forward": residual_layers(1), "backward": residual_layers(2)},
    {"cpu": [], **{scale: [{**size, "residual": 1} for size in MLP_SIZES[scale]] for scale in ("gpu", "dry")}},
    gradients=(0, 1, 2, 3, 4, 5),
    direct=with_residual(lambda: importlib.import_module("fastgpt_kernels")),
    plain=with_residual(lambda: reference),
)
OPS = (PLAIN, GELU, MLP, RESIDUAL)
