"""What the kernels of one new token are made of: device functions that turn rows of W into outputs.

`decode_token` launches one of them after another. The rows of a weight are loaded by one function and used by another, so that
a caller can wait in between for what they are multiplied with.
Buffers, shapes and dtypes: see decode_token.
"""

import triton
import triton.language as tl

from ._math import activation as _activation

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(w_ptr, bias_ptr, rows, end, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """W[rows, :K] and bias[rows]; zeros from row `end` on, and no traffic for them.

    evict_first: the next token's reading comes after all other weights, when no cache has them still.
    """
    cols = tl.arange(0, BLOCK_K)
    w = tl.load(
        w_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :],
        mask=(rows < end)[:, None] & (cols < K)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    if bias_ptr is None:
        bias = tl.zeros(rows.shape, tl.float32)
    else:
        bias = tl.load(bias_ptr + rows, mask=rows < end, other=0.0).to(tl.float32)
    return w, bias


@triton.jit
def load_scales(scales_ptr, rows, end):
    """What each of the rows of an int8 W is multiplied with; ones where W is what it says."""
    if scales_ptr is None:
        scales = tl.full(rows.shape, 1.0, tl.float32)
    else:
        scales = tl.load(scales_ptr + rows, mask=rows < end, other=0.0)
    return scales


@triton.jit
def times_rows(w, y, scales):
    """scales * (w . y) for w [ROWS, BLOCK_K] and y [BLOCK_K]."""
    products = tl.sum(w.to(tl.float32) * y[None, :], 1)
    if scales is not None:
        products *= scales
    return products


@triton.jit
def normed(x, scale_ptr, shift_ptr, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """LayerNorm of x [BLOCK_C], whose columns from C on are zero; they stay zero."""
    cols = tl.arange(0, BLOCK_C)
    mean = tl.sum(x, 0) / C
    x = tl.where(cols < C, x - mean, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / C + eps) * tl.load(scale_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        y += tl.load(shift_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    return y


@triton.jit
def combined(
    part_ptr, lse_ptr, b, length, splits, H: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The attention's output [BLOCK_C] of row b from its splits, in their order."""
    # Columns that share a head and, in fp32, a 16-byte load also share a weight.
    GROUP: tl.constexpr = 4 if C // H % 4 == 0 else 1
    cols, groups, s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_C // GROUP) * GROUP, tl.arange(0, BLOCK_S)[:, None]
    used = s * SPLIT < length
    lse = tl.load(
        lse_ptr + (b * splits + s) * H + (groups // (C // H))[None, :],
        mask=used & (groups < C)[None, :],
        other=float("-inf"),
    )
    parts = tl.load(part_ptr + (b * splits + s) * C + cols[None, :], mask=used & (cols < C)[None, :], other=0.0)
    m = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(m == float("-inf"), 0.0, m)[None, :])
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total == 0.0, 1.0, total)[None, :]
    weights = tl.reshape(weights[:, :, None].broadcast_to(BLOCK_S, BLOCK_C // GROUP, GROUP), BLOCK_S, BLOCK_C)
    return tl.sum(weights * parts, 0)


@triton.jit
def qkv_rows(
    which, rows, end, w, bias, scales, first, writes_x,
    tokens_ptr, positions_ptr, table_ptr, places_ptr, x_ptr, scale_ptr, shift_ptr, eps,
    q_ptr, k_ptr, v_ptr, stride_b, stride_h, stride_s,
    C: tl.constexpr, H: tl.constexpr, BLOCK_C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Queries (which = 0), keys (1) or values (2) from norm(x); in the `first` layer x is made from the tables."""
    D: tl.constexpr = C // H
    cols = tl.arange(0, BLOCK_C)
    for b in tl.static_range(B):
        position = tl.load(positions_ptr + b).to(tl.int64)
        if first:
            token = tl.maximum(tl.load(tokens_ptr + b), 0)  # what a broken row drew
            x = tl.load(table_ptr + token * C + cols, mask=cols < C, other=0.0).to(tl.float32)
            x += tl.load(places_ptr + position * C + cols, mask=cols < C, other=0.0).to(tl.float32)
            if writes_x:
                tl.store(x_ptr + b * C + cols, x, mask=cols < C)
        else:
            x = tl.load(x_ptr + b * C + cols, mask=cols < C, other=0.0)
        y = normed(x, scale_ptr, shift_ptr, eps, C, BLOCK_C)
        out = times_rows(w, y, scales) + bias
        at = b * stride_b + position * stride_s + rows // D * stride_h + rows % D
        if which == 0:
            tl.store(q_ptr + b * C + rows, out, mask=rows < end)
        elif which == 1:
            tl.store(k_ptr + at, out.to(k_ptr.dtype.element_ty), mask=rows < end)
        else:
            tl.store(v_ptr + at, out.to(v_ptr.dtype.element_ty), mask=rows < end)


@triton.jit
def attend_tile(
    tile, positions_ptr, q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, stride_b, stride_h, stride_s, splits,
    C: tl.constexpr, H: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One split of one head of one row: tile counts splits first, then heads, then rows."""
    D: tl.constexpr = C // H
    split, h = tile % splits, tile // splits % H
    b = (tile // (splits * H)).to(tl.int64)
    length = tl.load(positions_ptr + b) + 1
    if split * SPLIT < length:
        d = tl.arange(0, BLOCK_D)
        keys = split * SPLIT + tl.arange(0, SPLIT)
        mask = (keys < length)[:, None] & (d < D)[None, :]
        at = b * stride_b + h * stride_h + keys.to(tl.int64)[:, None] * stride_s + d[None, :]
        k = tl.load(k_ptr + at, mask=mask, other=0.0)
        v = tl.load(v_ptr + at, mask=mask, other=0.0)
        q = tl.load(q_ptr + b * C + h * D + d, mask=d < D, other=0.0)
        scores = tl.sum(k.to(tl.float32) * q[None, :], 1) * (LOG2_E * D**-0.5)
        scores = tl.where(keys < length, scores, float("-inf"))
        m = tl.max(scores, 0)
        p = tl.exp2(scores - m)
        total = tl.sum(p, 0)
        out = tl.sum(p[:, None] * v.to(tl.float32), 0) / total
        tl.store(part_ptr + (b * splits + split) * C + h * D + d, out, mask=d < D)
        tl.store(lse_ptr + (b * splits + split) * H + h, m + tl.log2(total))


@triton.jit
def matrix_rows(
    rows, end, w, bias, scales, x_ptr, scale_ptr, shift_ptr, eps, h_ptr, part_ptr, lse_ptr, positions_ptr, splits,
    out_ptr, N,
    K: tl.constexpr, BLOCK_K: tl.constexpr, H: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr,
    B: tl.constexpr, INPUT: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """out[b, rows] = activation(INPUT[b] . w + bias), or that added to out. INPUT: "norm" of x, "parts", or "hidden"."""
    cols = tl.arange(0, BLOCK_K)
    for b in tl.static_range(B):
        if INPUT == "norm":
            x = tl.load(x_ptr + b * K + cols, mask=cols < K, other=0.0)
            y = normed(x, scale_ptr, shift_ptr, eps, K, BLOCK_K)
        elif INPUT == "parts":
            length = tl.load(positions_ptr + b) + 1
            y = combined(part_ptr, lse_ptr, b, length, splits, H, K, BLOCK_K, SPLIT, BLOCK_S)
        else:
            y = tl.load(h_ptr + b * K + cols, mask=cols < K, other=0.0).to(tl.float32)
        out = _activation(times_rows(w, y, scales) + bias, ACTIVATION)
        if RESIDUAL:
            out += tl.load(out_ptr + b * N + rows, mask=rows < end, other=0.0)
        tl.store(out_ptr + b * N + rows, out.to(out_ptr.dtype.element_ty), mask=rows < end)
