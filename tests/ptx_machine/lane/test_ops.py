"""Every op, forward and backward, with production tiles, at GPT-2's widths and at odd ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from ptx_machine.lane.precision import PRECISIONS, Precision, compare, randn

import fastgpt_kernels as kernels
from fastgpt import reference

WITHOUT_PRODUCTS = ("bf16", "fp16", "fp32")
ALL = (*WITHOUT_PRODUCTS, "tf32")
CASES: dict[str, tuple[Callable, tuple[str, ...]]] = {}


def case(op: str, label: str, precisions: tuple[str, ...] = ALL, **arguments):
    """Decorator, or a call with the function: a case of `op` that `check(arch, precision, **arguments)` checks."""

    def add(check: Callable) -> Callable:
        CASES[f"{op} {label}"] = functools.partial(check, **arguments), precisions
        return check

    return add


def kept(mask: torch.Tensor, p: float) -> torch.Tensor:
    """The mask, of which 1 - p should be other than zero to three standard deviations."""
    share = (mask != 0).double().mean().item()
    assert abs(share - (1 - p)) < 3 * (p * (1 - p) / mask.numel()) ** 0.5 + 1e-3, share
    return mask


def layer_norm(arch: int, precision: Precision, rows: int, width: int, bias: bool = True) -> None:
    inputs = [randn(rows, width), randn(width), randn(width) if bias else None]
    compare(arch, precision, kernels.layer_norm, reference.layer_norm, inputs)


for rows, width in ((37, 768), (37, 1600), (5, 63), (1, 768), (300, 100)):
    case("layer_norm", f"{rows}x{width}", WITHOUT_PRODUCTS, rows=rows, width=width, bias=width != 100)(layer_norm)


def add_layer_norm(arch: int, precision: Precision, rows: int, width: int, p: float) -> None:
    inputs = [randn(rows, width), randn(rows, width), randn(width), randn(width)]
    dropped, options = 1.0, {}
    if p:
        options = {"dropout_p": p, "seed": 3}
        ones, zeros = (f((rows, width), dtype=precision.dtype) for f in (torch.ones, torch.zeros))
        with precision.machine(arch):
            _, mask = kernels.add_layer_norm(ones, zeros, *(t.to(precision.dtype) for t in inputs[2:]), **options)
        dropped = kept(mask, p)

    def replayed(x, residual, weight, bias):
        return reference.add_layer_norm(x * (dropped.to(x.dtype) if p else 1.0), residual, weight, bias)

    compare(arch, precision, kernels.add_layer_norm, replayed, inputs, **options)


for rows, width, p in ((37, 768, 0.0), (37, 1600, 0.1), (19, 768, 0.1), (5, 63, 0.0)):
    case("add_layer_norm", f"{rows}x{width} p={p}", WITHOUT_PRODUCTS, rows=rows, width=width, p=p)(add_layer_norm)


@case("dropout_add", "37x768", WITHOUT_PRODUCTS, rows=37, width=768)
@case("dropout_add", "5x99", WITHOUT_PRODUCTS, rows=5, width=99)
def dropout_add(arch: int, precision: Precision, rows: int, width: int) -> None:
    options = {"dropout_p": 0.1, "seed": 3}
    with precision.machine(arch):
        ones, zeros = (f((rows, width), dtype=precision.dtype) for f in (torch.ones, torch.zeros))
        mask = kept(kernels.dropout_add(ones, zeros, **options), 0.1)
    inputs = [randn(rows, width), randn(rows, width)]
    compare(arch, precision, kernels.dropout_add, lambda x, y: x * mask.to(x.dtype) + y, inputs, **options)


@case("softmax", "2x2x65x65 causal", WITHOUT_PRODUCTS, shape=(2, 2, 65, 65), causal=True)
@case("softmax", "5x1000", WITHOUT_PRODUCTS, shape=(5, 1000))
@case("softmax", "2x50257", WITHOUT_PRODUCTS, shape=(2, 50257))
@case("softmax", "3x1", WITHOUT_PRODUCTS, shape=(3, 1))
def softmax(arch: int, precision: Precision, shape: tuple[int, ...], causal: bool = False) -> None:
    def plain(x):
        return reference.softmax(x, 0.3, causal)

    compare(arch, precision, kernels.softmax, plain, [randn(*shape)], scale=0.3, causal=causal)


@case("gelu", "19x3072", WITHOUT_PRODUCTS, rows=19, width=3072, approximate="tanh")
@case("gelu", "7x101 exact", WITHOUT_PRODUCTS, rows=7, width=101, approximate="none")
def gelu(arch: int, precision: Precision, rows: int, width: int, approximate: str) -> None:
    inputs = [randn(rows, width)]
    compare(arch, precision, kernels.gelu, lambda x: reference.gelu(x, approximate), inputs, approximate=approximate)


@case("bias_gelu", "19x3072", WITHOUT_PRODUCTS, rows=19, width=3072, approximate="tanh")
@case("bias_gelu", "7x101 exact", WITHOUT_PRODUCTS, rows=7, width=101, approximate="none")
def bias_gelu(arch: int, precision: Precision, rows: int, width: int, approximate: str) -> None:
    def plain(x, bias):
        return reference.bias_gelu(x, bias, approximate)

    inputs = [randn(rows, width), randn(width)]
    compare(arch, precision, kernels.bias_gelu, plain, inputs, approximate=approximate)


@case("linear", "200x96->144", rows=200, k=96, n=144)
@case("linear", "70x63->50, unaligned", rows=70, k=63, n=50, bias=False)
@case("linear", "1x128->256 gelu", rows=1, k=128, n=256, activation="gelu")
@case("linear", "130x128->256 relu", rows=130, k=128, n=256, activation="relu")
@case("linear", "130x128->256 gelu_tanh", rows=130, k=128, n=256, activation="gelu_tanh")
@case("linear", "65x768->64", rows=65, k=768, n=64)
def linear(
    arch: int, precision: Precision, rows: int, k: int, n: int, activation: str | None = None, bias: bool = True
) -> None:
    inputs = [randn(rows, k), randn(n, k, scale=k**-0.5), randn(n) if bias else None]

    def plain(x, weight, bias):
        return reference.linear(x, weight, bias, activation)

    compare(arch, precision, kernels.linear, plain, inputs, activation=activation)


@case("mlp", "150x64 gelu_tanh", rows=150, width=64, activation="gelu_tanh")
@case("mlp", "33x72 gelu", rows=33, width=72, activation="gelu")
@case("mlp", "1x64 relu", rows=1, width=64, activation="relu")
def mlp(arch: int, precision: Precision, rows: int, width: int, activation: str) -> None:
    wide = 4 * width
    w1, w2 = randn(wide, width, scale=width**-0.5), randn(width, wide, scale=width**-0.5 / 2)
    inputs = [randn(rows, width), w1, randn(wide), w2, randn(width)]

    def plain(*tensors):
        return reference.mlp(*tensors, activation)

    compare(arch, precision, kernels.mlp, plain, inputs, activation=activation)


@case("cross_entropy", "7x50257", WITHOUT_PRODUCTS, rows=7, vocabulary=50257, reduction="mean")
@case("cross_entropy", "7x333 sum", WITHOUT_PRODUCTS, rows=7, vocabulary=333, reduction="sum")
@case("cross_entropy", "7x1000 smoothed", WITHOUT_PRODUCTS, rows=7, vocabulary=1000, label_smoothing=0.1, z_loss=1e-3)
def cross_entropy(arch: int, precision: Precision, rows: int, vocabulary: int, **options) -> None:
    targets = torch.randint(vocabulary, (rows,))
    targets[::5] = -100

    def of(module):
        return lambda logits: module.cross_entropy(logits, targets, **options)

    compare(arch, precision, of(kernels), of(reference), [randn(rows, vocabulary)])


@case("linear_cross_entropy", "40x64 V=1000", rows=40, width=64, vocabulary=1000)
@case("linear_cross_entropy", "33x72 V=1001, no bias", rows=33, width=72, vocabulary=1001, bias=False)
@case("linear_cross_entropy", "9x64 V=500 smoothed", rows=9, width=64, vocabulary=500, label_smoothing=0.1, z_loss=1e-3)
def linear_cross_entropy(
    arch: int, precision: Precision, rows: int, width: int, vocabulary: int, bias: bool = True, **options
) -> None:
    targets = torch.randint(vocabulary, (rows,))
    targets[::5] = -100
    inputs = [randn(rows, width), randn(vocabulary, width, scale=width**-0.5), randn(vocabulary) if bias else None]

    def of(module):
        return lambda x, weight, bias: module.linear_cross_entropy(x, weight, targets, bias, **options)

    compare(arch, precision, of(kernels), of(reference), inputs)


@case("embedding", "2x33x768", WITHOUT_PRODUCTS, width=768)
@case("embedding", "2x33x100 p=0.1", WITHOUT_PRODUCTS, width=100, p=0.1)
def embedding(arch: int, precision: Precision, width: int, p: float = 0.0) -> None:
    idx = torch.randint(40, (2, 33))
    options = {"dropout_p": p, "seed": 5} if p else {}
    mask = None
    if p:
        with precision.machine(arch):
            ones, zeros = torch.ones(40, width, dtype=precision.dtype), torch.zeros(36, width, dtype=precision.dtype)
            mask = kept(kernels.embedding(idx, ones, zeros, **options), p)

    def plain(tokens, positions):
        x = reference.embedding(idx, tokens, positions)
        return x if mask is None else x * mask.to(x.dtype)

    def ours(tokens, positions):
        return kernels.embedding(idx, tokens, positions, **options)

    compare(arch, precision, ours, plain, [randn(40, width), randn(36, width)])


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, p, marks=pytest.mark.one_of(f"{check.func.__name__} {p}"))
        for name, (check, precisions) in CASES.items()
        for p in precisions
    ],
)
def test_an_op_is_as_accurate_as_torch(arch, name, precision):
    CASES[name][0](arch, PRECISIONS[precision])


def test_a_product_of_padded_rows_finds_numbers_behind_them(arch, monkeypatch):
    """A CPU's bf16 product may read what lies between rows, times 0: never NaN (https://github.com/uxlfoundation/oneDNN/issues/5717)."""
    plain, read = torch.mm, []

    def mm(a, b, **options):
        read.extend(torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).isfinite().all() for t in (a, b))
        return plain(a, b, **options)

    monkeypatch.setattr(torch, "mm", mm)
    x, weight = (randn(n, 72).bfloat16().requires_grad_() for n in (33, 1001))
    with PRECISIONS["bf16"].machine(arch):
        kernels.linear_cross_entropy(x, weight, torch.randint(1001, (33,)))
    assert len(read) == 4
    assert all(read)
