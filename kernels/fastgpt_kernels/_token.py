"""What the kernels of one new token are made of: device functions that turn rows of W into outputs.

What is loaded ahead of the wait for the kernel before stands apart from what is loaded behind it, and both from what is computed.
Buffers, shapes and dtypes: see decode_token.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(w_ptr, bias_ptr, scales_ptr, rows, end, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """W[rows, :K], bias[rows] and what an int8 W's rows are multiplied with, ones elsewhere; nothing is read from row `end` on.

    evict_first: the next token's reading comes after all other weights, when no cache has them still.
    """
    cols = tl.arange(0, BLOCK_K)
    w = tl.load(
        w_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :],
        mask=(rows < end)[:, None] & (cols < K)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    bias = tl.zeros(rows.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + rows, mask=rows < end, other=0.0)
    scales = tl.full(rows.shape, 1.0, tl.float32)
    if scales_ptr is not None:
        scales = tl.load(scales_ptr + rows, mask=rows < end, other=0.0)
    return w, bias, scales


@triton.jit
def load_norm(scale_ptr, shift_ptr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Scale and shift of a norm."""
    cols = tl.arange(0, BLOCK_C)
    scale, shift = tl.load(scale_ptr + cols, mask=cols < C, other=0.0), tl.zeros((BLOCK_C,), tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + cols, mask=cols < C, other=0.0)
    return scale, shift


@triton.jit
def times_rows(w, y, scales):
    """scales * (w . y) for w [ROWS, BLOCK_K] and y [BLOCK_K]."""
    return tl.sum(w.to(tl.float32) * y[None, :], 1) * scales


@triton.jit
def normed(x, scale, shift, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """LayerNorm of x [BLOCK_C], whose columns from C on are zero; they stay zero."""
    mean = tl.sum(x, 0) / C
    x = tl.where(tl.arange(0, BLOCK_C) < C, x - mean, 0.0)
    return x * tl.rsqrt(tl.sum(x * x, 0) / C + eps) * scale.to(tl.float32) + shift.to(tl.float32)


@triton.jit
def embedded(table_ptr, places_ptr, token, position, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """x [BLOCK_C] of a token at a position; token and position are int64."""
    cols = tl.arange(0, BLOCK_C)
    x = tl.load(table_ptr + token * C + cols, mask=cols < C, other=0.0).to(tl.float32)
    return x + tl.load(places_ptr + position * C + cols, mask=cols < C, other=0.0).to(tl.float32)


@triton.jit
def load_parts(part_ptr, row, splits, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """What each split of a row's attention gives, [BLOCK_S, BLOCK_C]."""
    cols, s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)[:, None]
    return tl.load(
        part_ptr + (row * splits + s) * C + cols[None, :], mask=(s < splits) & (cols < C)[None, :], other=0.0
    )


@triton.jit
def combined(parts, lse):
    """The attention's output [BLOCK_C] of a row from its splits, in their order."""
    BLOCK_S: tl.constexpr = parts.shape[0]
    BLOCK_C: tl.constexpr = parts.shape[1]
    GROUPS: tl.constexpr = lse.shape[1]
    m = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(m == float("-inf"), 0.0, m)[None, :])
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total == 0.0, 1.0, total)[None, :]
    weights = tl.reshape(weights[:, :, None].broadcast_to(BLOCK_S, GROUPS, BLOCK_C // GROUPS), BLOCK_S, BLOCK_C)
    return tl.sum(weights * parts, 0)


@triton.jit
def load_input(
    x_ptr, h_ptr, lse_ptr, splits, row,
    K: tl.constexpr, BLOCK_K: tl.constexpr, H: tl.constexpr, BLOCK_S: tl.constexpr, INPUT: tl.constexpr,
):  # fmt: skip
    """What a matrix is multiplied with, as it lies in memory: "norm", x; "hidden", h; "parts", their weights' logarithms."""
    cols = tl.arange(0, BLOCK_K)
    if INPUT == "norm":
        return tl.load(x_ptr + row * K + cols, mask=cols < K, other=0.0)
    elif INPUT == "hidden":
        return tl.load(h_ptr + row * K + cols, mask=cols < K, other=0.0)
    else:
        # Columns that share a head and, in fp32, a 16-byte load also share a weight.
        GROUP: tl.constexpr = 4 if K // H % 4 == 0 else 1
        groups, s = tl.arange(0, BLOCK_K // GROUP) * GROUP, tl.arange(0, BLOCK_S)[:, None]
        return tl.load(
            lse_ptr + (row * splits + s) * H + (groups // (K // H))[None, :],
            mask=(s < splits) & (groups < K)[None, :],
            other=float("-inf"),
        )
