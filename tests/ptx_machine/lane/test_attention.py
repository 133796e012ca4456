"""Attention and attention over a cache on the machine."""

from __future__ import annotations

import pytest
import torch
from compare import assert_as_accurate_as_torch
from ptx_machine.lane.precision import PRECISIONS, Precision, compare, randn

import fastgpt_kernels as kernels
from fastgpt import reference

ATTENTION = {
    "1x2x256x64 causal": {"shape": (1, 2, 256, 256, 64)},
    "1x2x130x64": {"shape": (1, 2, 130, 130, 64), "causal": False},
    "1x1x100x80 causal": {"shape": (1, 1, 100, 100, 80)},
    "1x1x150x128 causal": {"shape": (1, 1, 150, 150, 128)},
    "T=40 S=170 D=64 causal": {"shape": (1, 2, 40, 170, 64)},
    "T=150 S=70 D=96 causal": {"shape": (1, 1, 150, 70, 96)},
    "1x1x1x16": {"shape": (1, 1, 1, 1, 16)},
    "1x2x140x64 causal p=0.2": {"shape": (1, 2, 140, 140, 64), "p": 0.2},
    "T=70 S=90 D=80 p=0.2": {"shape": (1, 1, 70, 90, 80), "causal": False, "p": 0.2},
}


def attention(arch: int, precision: Precision, shape: tuple[int, ...], causal: bool = True, p: float = 0.0) -> None:
    B, H, T, S, D = shape
    inputs = [randn(B, H, n, D) for n in (T, S, S)]
    if not p:
        compare(arch, precision, kernels.attention, lambda *t: reference.attention(*t, causal), inputs, causal=causal)
        return
    options = {"dropout_p": p, "seed": 5}
    with precision.machine(arch):  # equal scores of values that are one at their own key: the mask itself
        eye = torch.eye(S).expand(B, H, S, S)
        mask = kernels.attention(torch.zeros(B, H, T, S), eye, eye, causal=False, **options) > 0
    assert abs(mask.double().mean().item() - (1 - p)) < 0.02

    def replayed(q, k, v):
        return (reference.attention_probabilities(q, k, causal) * mask / (1 - p)) @ v

    compare(arch, precision, kernels.attention, replayed, inputs, causal=causal, **options)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, p, marks=pytest.mark.one_of(f"attention {p} {'p' in ATTENTION[name]}"))
        for name in ATTENTION
        for p in PRECISIONS
    ],
)
def test_attention_is_as_accurate_as_torch(arch, name, precision):
    attention(arch, PRECISIONS[precision], **ATTENTION[name])


@pytest.mark.one_of("attention packed")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_attention_of_a_packed_qkv(arch, precision):
    B, T, H, D = 2, 140, 2, 64

    def of(module):
        return lambda x: module.attention(*x.permute(2, 0, 3, 1, 4).unbind()).transpose(1, 2).reshape(B, T, H * D)

    compare(arch, PRECISIONS[precision], of(kernels), of(reference), [randn(B, T, 3, H, D)])


DECODE = {
    "B=3 T=1 S=300 D=64": ((3, 2, 1, 300, 64), [300, 0, 77]),
    "B=2 T=4 S=200 D=80": ((2, 2, 4, 200, 80), [200, 3]),
    "B=1 T=19 S=150 D=128": ((1, 1, 19, 150, 128), [149]),
}


@pytest.mark.parametrize(
    ("name", "precision"),
    [pytest.param(n, p, marks=pytest.mark.one_of(f"decode_attention {p}")) for n in DECODE for p in PRECISIONS],
)
def test_attention_over_a_cache_sees_its_length_alone(arch, name, precision):
    (B, H, T, S, D), lengths = DECODE[name]
    precision = PRECISIONS[precision]
    q, k, v = (randn(B, H, n, D).to(precision.dtype) for n in (T, S, S))
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = float("nan"), float("nan")
    lengths = torch.tensor(lengths, dtype=torch.int32)
    with precision.machine(arch):
        ours = kernels.decode_attention(q, k, v, lengths)
    with precision.torchs():
        plain = reference.decode_attention(q, k, v, lengths)
    exact = reference.decode_attention(q.double(), k.double(), v.double(), lengths)
    assert_as_accurate_as_torch(ours, plain, exact)
