"""Device functions with two or more users: the activations, their derivatives, random bits and the dropout mask.

Written without libdevice, which the interpreter lacks, and computed in the dtype that comes in (fp32, fp64).
A constexpr stands on the right of each operator, since on the left the interpreter takes it for the whole expression.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from ._launch import INTERPRETING

# GPT-2's GELU is x (1 + tanh(u)) / 2 = x / (1 + exp(-2u)), and exp(-2u) = exp2(x (_TANH_1 + _TANH_3 x^2)).
_TANH_1 = tl.constexpr(-2.302208198144325)  # -2 sqrt(2 / pi) log2(e)
_TANH_3 = tl.constexpr(-0.10294323958002348)  # 0.044715 of that
_TANH_SLOPE_0 = tl.constexpr(1.5957691216057308)  # 2 du/dx = _TANH_SLOPE_0 + _TANH_SLOPE_2 x^2
_TANH_SLOPE_2 = tl.constexpr(0.21406444881780074)
_RSQRT_2 = tl.constexpr(0.7071067811865476)
_RSQRT_2PI = tl.constexpr(0.3989422804014327)
_MINUS_HALF_LOG2E = tl.constexpr(-0.7213475204444817)

# The fewest with which Philox4x32 passes BigCrush (Salmon et al., 2011, table 2); FlashAttention's LayerNorm has 7 too.
_PHILOX_ROUNDS = tl.constexpr(7)

_ASSEMBLY = tl.constexpr(not INTERPRETING)


@triton.jit
def activation(x, ACTIVATION: tl.constexpr):
    """ACTIVATION(x) for "gelu_tanh", "gelu", "relu" or None; x fp32 or fp64."""
    if ACTIVATION == "gelu_tanh":
        # 1 / (1 + exp(-2u)) keeps its relative accuracy where 1 + tanh(u) cancels
        y = x / (tl.exp2(x * (x * x * _TANH_3 + _TANH_1)) + 1.0)
    elif ACTIVATION == "gelu":
        y = x * 0.5 * (tl.erf(x * _RSQRT_2) + 1.0)
    elif ACTIVATION == "relu":
        y = tl.where(x < 0.0, 0.0, x)  # not maximum: NaN must pass
    else:
        tl.static_assert(ACTIVATION is None, "ACTIVATION must be gelu_tanh, gelu, relu or None")
        y = x
    return y


@triton.jit
def activation_grad(x, ACTIVATION: tl.constexpr):
    """The derivative of ACTIVATION at x."""
    if ACTIVATION == "gelu_tanh":
        square = x * x
        e = tl.exp2(x * (square * _TANH_3 + _TANH_1))
        s = 1.0 / (e + 1.0)
        # d/dx x s = s + x s (1 - s) 2 du/dx; 1 - s as e s is free of cancellation, and where e overflows s is 0 already
        dy = s + x * s * (tl.minimum(e, 1e30) * s) * (square * _TANH_SLOPE_2 + _TANH_SLOPE_0)
    elif ACTIVATION == "gelu":
        dy = (tl.erf(x * _RSQRT_2) + 1.0) * 0.5 + x * _RSQRT_2PI * tl.exp2(x * x * _MINUS_HALF_LOG2E)
    elif ACTIVATION == "relu":
        dy = tl.where(x <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION is None, "ACTIVATION must be gelu_tanh, gelu, relu or None")
        dy = tl.full(x.shape, 1.0, x.dtype)
    return dy


@triton.jit
def _product(x, FACTOR: tl.constexpr):
    """x * FACTOR as uint64, for uint32 x: one instruction, where the compiler makes two or more of a product's halves."""
    if _ASSEMBLY:
        if is_cuda():
            return tl.inline_asm_elementwise(
                "mul.wide.u32 $0, $1, $2;", "=l,r,n", [x, FACTOR], dtype=tl.uint64, is_pure=True, pack=1
            )
        else:
            return x.to(tl.uint64) * FACTOR
    else:
        return x.to(tl.uint64) * FACTOR


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Four tensors of 32 random bits, Philox4x32 of counters c0 .. c3 (int32) with the bits of `seed` as its key: tl.philox's."""
    key = seed.to(tl.uint64)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    c0, c1 = c0.to(tl.uint32, bitcast=True), c1.to(tl.uint32, bitcast=True)
    c2, c3 = c2.to(tl.uint32, bitcast=True), c3.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(_PHILOX_ROUNDS):
        a, b = _product(c0, 0xD2511F53), _product(c2, 0xCD9E8D57)
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def random_word(seed, offsets, c2, c3):
    """32 random bits for each of `offsets` (int64), a pure function of all four; c2 and c3 tell streams apart.

    Philox4x32 makes four words a counter, and offset o takes word o % 4 of counter o // 4: where a thread holds runs of four
    offsets that the compiler sees start at a multiple of four, it merges their four calls into one.
    """
    zero = (offsets * 0).to(tl.int32)
    low, high = (offsets >> 2).to(tl.int32), (offsets >> 34).to(tl.int32)
    r0, r1, r2, r3 = philox(seed, low, high, zero + c2.to(tl.int32), zero + c3.to(tl.int32))
    word = (offsets & 3).to(tl.int32)
    return tl.where(word < 2, tl.where(word == 0, r0, r1), tl.where(word == 2, r2, r3))


@triton.jit
def dropout_keep(seed, offsets, p):
    """Whether the elements at `offsets` (int64: each one's index in its logical tensor) survive dropout.

    A pure function of (seed, offset), so the backward pass draws the same mask. Runs of four merge where rows are padded to a
    power of two, plus tl.arange.
    """
    zero = tl.full((), 0, tl.int32)
    bits = random_word(seed, offsets, zero, zero)
    # the 24 high bits as a uniform number of [0, 1): exact in fp32
    return (bits >> 8).to(tl.float32) * (1.0 / 16777216.0) >= p


@triton.jit
def dropout(x, seed, offsets, p, keep_scale):
    """x where kept, times keep_scale, which is 1 / (1 - p)."""
    # a product and not a choice, so that NaN and Inf in a dropped place show, as in torch
    return x * tl.where(dropout_keep(seed, offsets, p), keep_scale, 0.0)
