"""Arithmetic of the machine against torch and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from compare import ProductsInSequence
from ptx_machine.instrument.programs import (
    on,
    reduce_kernel,
)
from ptx_machine.parse import PtxError


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64]
)
@pytest.mark.parametrize("n", [1, 1000, 5000])
def test_add(arch, n, dtype):
    x, y = (torch.randn(n) * 20).to(dtype), (torch.randn(n) * 20).to(dtype)
    with on(arch) as m:
        out = torch.empty(n, dtype=dtype)
        m.run(add_kernel, (triton.cdiv(n, 256),), x, y, out, n, BLOCK=256)
    assert torch.equal(out, x + y)


@triton.jit
def softmax_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    v = tl.load(x + row * n + i, mask=i < n, other=float("-inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(out + row * n + i, e / tl.sum(e, 0), mask=i < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax(arch, dtype):
    x = torch.randn(5, 1000).to(dtype)
    with on(arch) as m:
        out = torch.empty_like(x)
        m.run(softmax_kernel, (5,), x, out, 1000, BLOCK=1024, num_warps=8)
    torch.testing.assert_close(out, x.softmax(-1), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(64, 32), (16, 256), (256, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_reductions(arch, shape, axis, dtype):
    x = (torch.randn(shape) * 1000).to(dtype)
    n = shape[1 - axis]
    with on(arch) as m:
        sums, tops, places, lows = (torch.empty(n, dtype=t) for t in (dtype, dtype, torch.int32, dtype))
        m.run(reduce_kernel, (1,), x, sums, tops, places, lows, M=shape[0], N=shape[1], AXIS=axis)
    torch.testing.assert_close(sums, x.sum(axis).to(dtype), rtol=1e-5, atol=1e-2)
    assert torch.equal(tops, x.amax(axis))
    assert torch.equal(lows, x.amin(axis))
    assert torch.equal(x.gather(axis, places.long().unsqueeze(axis)).squeeze(axis), tops)


@triton.jit
def math_kernel(x, out, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n)
    if FUNCTION == "exp":
        v = tl.exp(v)
    elif FUNCTION == "exp2":
        v = tl.exp2(v)
    elif FUNCTION == "log":
        v = tl.log(tl.abs(v))
    elif FUNCTION == "log2":
        v = tl.log2(tl.abs(v))
    elif FUNCTION == "sin":
        v = tl.sin(v)
    elif FUNCTION == "cos":
        v = tl.cos(v)
    elif FUNCTION == "sqrt":
        v = tl.sqrt(tl.abs(v))
    elif FUNCTION == "rsqrt":
        v = tl.rsqrt(tl.abs(v))
    elif FUNCTION == "erf":
        v = tl.erf(v)
    elif FUNCTION == "floor":
        v = tl.floor(v)
    elif FUNCTION == "ceil":
        v = tl.ceil(v)
    elif FUNCTION == "sigmoid":
        v = tl.sigmoid(v)
    elif FUNCTION == "reciprocal":
        v = 1.0 / v
    tl.store(out + i, v, mask=i < n)


FUNCTIONS = ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "erf", "floor", "ceil", "sigmoid", "reciprocal")


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_a_function_that_it_cannot_call_raises(arch, name):
    x = torch.zeros(5, dtype=torch.float64)
    with on(arch) as m, pytest.raises(PtxError, match=r"no \.func"):
        m.run(math_kernel, (1,), x, x, 5, FUNCTION=name, BLOCK=256)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in (*FUNCTIONS, "sin", "cos")),
        *((name, torch.float64) for name in FUNCTIONS),
    ],
)
def test_functions(arch, name, dtype):
    x = torch.cat(
        [torch.randn(500) * 5, torch.tensor([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 1e-40])]
    ).to(dtype)
    with on(arch) as m:
        out = torch.empty_like(x)
        m.run(math_kernel, (2,), x, out, len(x), FUNCTION=name, BLOCK=256)
    inside = x.abs() if name in ("log", "log2", "sqrt", "rsqrt") else x
    flushes = dtype == torch.float32 and name in ("rsqrt", "log", "reciprocal", "ceil")  # denormals, by design
    want = getattr(torch, name)(inside.double())
    loose = 2e-6 if dtype == torch.float32 else 1e-14
    keep = slice(None, -1) if flushes else slice(None)
    torch.testing.assert_close(out.double()[keep], want[keep], rtol=loose, atol=loose, equal_nan=True)


@triton.jit
def integer_kernel(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a // b)
    tl.store(out + n + i, a % b)
    tl.store(out + 2 * n + i, a * b)
    tl.store(out + 3 * n + i, (a & b) ^ (a | b))
    tl.store(out + 4 * n + i, a >> (b & 7))
    tl.store(out + 5 * n + i, a << (b & 7))
    tl.store(out + 6 * n + i, tl.minimum(a, b) - tl.maximum(a, b))
    tl.store(out + 7 * n + i, ~a)
    tl.store(out + 8 * n + i, a // 7)
    tl.store(out + 9 * n + i, a % 96)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8])
def test_integers(arch, dtype):
    n = 512
    low = 0 if dtype == torch.uint8 else torch.iinfo(dtype).min // 2
    x = torch.randint(low, torch.iinfo(dtype).max // 2, (n,)).to(dtype)
    y = torch.randint(1, 120, (n,)).to(dtype) * (1 if dtype == torch.uint8 else -1) ** torch.arange(n).to(dtype)
    with on(arch) as m:
        out = torch.empty(10, n, dtype=dtype)
        m.run(integer_kernel, (1,), x, y, out, n=n)
    a, b = x.numpy(), y.numpy()
    q = np.trunc(a.astype(object) / b) if dtype != torch.int64 else None
    del q
    t = np.array(
        [abs(int(p)) // abs(int(r)) * (1 if (p < 0) == (r < 0) else -1) for p, r in zip(a, b, strict=True)]
    ).astype(a.dtype)
    seven = np.array([abs(int(p)) // 7 * (1 if p >= 0 else -1) for p in a]).astype(a.dtype)
    ninety_six = np.array([int(p) - int(abs(int(p)) // 96 * (1 if p >= 0 else -1)) * 96 for p in a]).astype(a.dtype)
    want = [
        t,
        a - t * b,
        a * b,
        (a & b) ^ (a | b),
        a >> (b & 7),
        a << (b & 7),
        np.minimum(a, b) - np.maximum(a, b),
        ~a,
        seven,
        ninety_six,
    ]
    for i, w in enumerate(want):
        assert np.array_equal(out[i].numpy(), w), i


@triton.jit
def wide_product_kernel(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.umulhi(tl.load(x + i), tl.load(y + i)))


@pytest.mark.parametrize("bits", [32, 64])
def test_high_products(arch, bits):
    rng = np.random.default_rng(0)
    dtype = np.dtype(f"u{bits // 8}")
    a, b = (rng.integers(0, 2**bits, 256, dtype=dtype) for _ in range(2))
    with on(arch) as m:
        tensors = [torch.from_numpy(v.view(f"i{bits // 8}").copy()) for v in (a, b)]
        out = torch.empty_like(tensors[0])
        m.run(wide_product_kernel, (1,), *tensors, out, n=256)
    want = np.array([int(p) * int(q) >> bits for p, q in zip(a, b, strict=True)], dtype)
    assert np.array_equal(out.numpy().view(dtype), want)


@triton.jit
def convert_kernel(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


HALVES, WIDER = (torch.float16, torch.bfloat16), (torch.float64, torch.int8, torch.int32, torch.int64, torch.float32)


@pytest.mark.parametrize(
    ("source", "to"),
    [
        *((source, to) for source in (torch.float32, *HALVES, torch.int32) for to in (*HALVES, *WIDER)),
        *((torch.float64, to) for to in WIDER),  # to halves by float32, in Triton, which rounds twice
    ],
)
def test_conversions(arch, source, to):
    x = (torch.randn(512) * 30).to(source)
    if source.is_floating_point and to.is_floating_point:
        x[:6] = torch.tensor(
            [0.0, float("inf"), float("-inf"), float("nan"), 1e-7, 1.00390625], dtype=torch.float64
        ).to(source)
    with on(arch) as m:
        out = torch.empty(512, dtype=to)
        m.run(convert_kernel, (1,), x, out, n=512)
    torch.testing.assert_close(out, x.to(to), rtol=0, atol=0, equal_nan=True)


@triton.jit
def random_kernel(out, floats, normal, seed, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.randint(seed, i))
    tl.store(floats + i, tl.rand(seed, i))
    tl.store(normal + i, tl.randn(seed, i))


def philox(seed, offset, rounds=10):
    c, k = [offset, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


def test_random_numbers(arch):
    seed = 123456789012345
    with on(arch) as m:
        out, floats, normal = torch.empty(1024, dtype=torch.int32), torch.empty(1024), torch.empty(1024)
        m.run(random_kernel, (1,), out, floats, normal, seed, n=1024)
    assert out.numpy().view(np.uint32).tolist() == [philox(seed, i) for i in range(1024)]
    assert 0.45 < floats.mean() < 0.55
    assert abs(normal.mean()) < 0.1
    assert 0.9 < normal.std() < 1.1


def test_the_products_that_kernels_are_held_to():
    """Summed in order, each product fused: too large an error of them would let any kernel pass."""
    ones = torch.ones(1, 64)
    weight = torch.cat([torch.tensor([[2.0**24]]), ones], 1)  # which one more, after it, doesn't change
    x, y, bias = torch.randn(5, 300), torch.randn(300, 7), torch.randn(7)
    exact = x.double() @ y.double()
    with ProductsInSequence():
        behind = torch.cat([ones, ones[:, :1]], 1) @ weight.T
        before = torch.cat([ones, ones[:, :1]], 1) @ weight.flip(1).T
        product, added = x @ y, torch.addmm(bias, x, y)
        half = x.half() @ y.half()
    assert (behind.item(), before.item()) == (2.0**24, 2.0**24 + 64)
    assert not torch.equal(product, exact.float())
    assert ((product - exact).abs() <= 300 * 2.0**-24 * (x.double().abs() @ y.double().abs())).all()  # 300 roundings
    assert torch.equal(added, product + bias)
    assert torch.equal(half, x.half() @ y.half())
