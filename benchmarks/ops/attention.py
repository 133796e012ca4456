"""Causal attention at GPT-2's shapes. Bound by tensor cores: 4 B H T^2 D FLOPs forward and 10 backward, half of that for the
causal mask; every operand read once, every result written once."""

from __future__ import annotations

import functools
import importlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.measure import Absent, Work, device, needs, needs_cuda
from benchmarks.harness.op import Draw, Op, kernel
from fastgpt import reference

SIZES = {
    "gpu": [
        {"B": 16, "H": 12, "T": 1024, "D": 64},
        {"B": 8, "H": 25, "T": 1024, "D": 64},
        {"B": 4, "H": 12, "T": 4096, "D": 64},
        {"B": 8, "H": 16, "T": 1024, "D": 128},
    ],
    "cpu": [{"B": 1, "H": 12, "T": 512, "D": 64}],
    "dry": [{"B": 1, "H": 2, "T": 20, "D": 16}],
}
GROWTH = {
    "gpu": {"T": (128, 256, 512, 1024, 2048, 4096), "B": (1, 4, 16, 64)},
    "cpu": {"T": (128, 256, 1024), "B": (2, 4)},
}


def work(products, read, written):
    """products of [T, T] with D a head; tensors of [B, H, T, D] that are read and written."""

    def of(s, b):
        elements = s["B"] * s["H"] * s["T"] * s["D"] * b
        flops = products * 2.0 * s["B"] * s["H"] * s["T"] ** 2 * s["D"] / 2
        return Work(flops, read * elements, written * elements)

    return of


def inputs(size, draw: Draw):
    """Queries, keys and values as slices of a packed projection, as the model has them."""
    packed = draw.normal(size["B"], size["T"], 3, size["H"], size["D"])
    return tuple(packed.permute(2, 0, 3, 1, 4).unbind(0))


def sdpa(backend):
    def make(case):
        if backend is SDPBackend.CUDNN_ATTENTION:
            needs_cuda("cuDNN")

        def call(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return call

    return make


def written_out(case):
    """The formula with its [T, T] matrix in memory, which is what models had before flash attention."""
    if case.size["B"] * case.size["H"] * case.size["T"] ** 2 > 3e9:
        raise Absent("its [T, T] matrices would be over 6 GB each")

    def call(q, k, v):
        T = q.shape[-2]
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ v

    return call


def flex(case):
    """FlexAttention, compiled, with a causal block mask made beforehand."""
    needs_cuda("FlexAttention")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = case.size["T"]
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device="cuda")
    torch._dynamo.reset()
    return functools.partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


def flash_package(module):
    """The function of Dao-AILab's packages, which want [B, T, H, D]; https://github.com/Dao-AILab/flash-attention."""

    def make(case):
        needs(module)
        function = importlib.import_module(module).flash_attn_func

        def call(q, k, v):
            out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return call

    return make


ATTENTION = Op(
    "attention",
    inputs,
    {"forward": work(2, 3, 1), "backward": work(5, 5, 3)},
    SIZES,
    gradients=(0, 1, 2),
    growth=GROWTH,
    peers={
        "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
        "SDPA math": sdpa(SDPBackend.MATH),
        "FlexAttention": flex,
        "flash-attn 2": flash_package("flash_attn"),
        "flash-attn 3": flash_package("flash_attn_interface"),
        "written out": written_out,
    },
)


def packed_inputs(size, draw: Draw):
    """Rows of documents of one length, and the first key that each query sees."""
    q, k, v = inputs(size, draw)
    return q, k, v, first_keys(size, q.device)[None].repeat(size["B"], 1)


def first_keys(size, where):
    places = torch.arange(size["T"], device=where, dtype=torch.int32)
    return places - places % size["document"]


def packed_work(products, read, written):
    """As `work`, but of the pairs that are seen: T (document + 1) / 2 a head."""

    def of(s, b):
        elements = s["B"] * s["H"] * s["T"] * s["D"] * b
        flops = products * 2.0 * s["B"] * s["H"] * s["D"] * s["T"] * (s["document"] + 1) / 2
        return Work(flops, read * elements + 4.0 * s["B"] * s["T"], written * elements)

    return of


def masked_sdpa(case):
    """torch's, with a mask [T, T] of documents made beforehand."""
    T = case.size["T"]
    keys = torch.arange(T, device=device())
    mask = (keys <= keys[:, None]) & (keys >= first_keys(case.size, device())[:, None])
    return lambda q, k, v, first: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def packed_flex(case):
    """FlexAttention, compiled, with a block mask of documents made beforehand."""
    needs_cuda("FlexAttention")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, first = case.size["T"], first_keys(case.size, device())
    mask = create_block_mask(lambda b, h, q, k: (q >= k) & (k >= first[q]), None, None, T, T, device="cuda")
    torch._dynamo.reset()
    call = functools.partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)
    return lambda q, k, v, first: call(q, k, v)


def packed_kernels(q, k, v, first):
    # Whoever records launches has tensors without data, which dispatch would give to the reference.
    call = importlib.import_module("fastgpt_kernels").attention if q.is_meta else kernel("attention")
    return call(q, k, v, first=first)


LONG = {"B": 4, "H": 12, "T": 4096, "D": 64}
PACKED = Op(
    "packed_attention",
    packed_inputs,
    {"forward": packed_work(2, 3, 1), "backward": packed_work(5, 5, 3)},
    {
        "gpu": [
            *({"B": 16, "H": 12, "T": 1024, "D": 64, "document": n} for n in (64, 256, 1024)),
            *({**LONG, "document": n} for n in (64, 256, 1024, 4096)),
        ],
        "cpu": [{"B": 1, "H": 4, "T": 1024, "D": 64, "document": n} for n in (64, 1024)],
        "dry": [{"B": 1, "H": 2, "T": 20, "D": 16, "document": 5}],
    },
    gradients=(0, 1, 2),
    peers={"SDPA masked": masked_sdpa, "FlexAttention": packed_flex},
    direct=packed_kernels,
    plain=lambda q, k, v, first: reference.attention(q, k, v, first=first),
)
OPS = (ATTENTION, PACKED)
