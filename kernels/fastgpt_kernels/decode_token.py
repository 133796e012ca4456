"""One new token a row through a whole GPT-2, for a few rows: five kernels a layer, each reading its weights once.

    qkv       q, k, v = norm(x) W + b       k, v into the cache at the row's position; in layer 0 x is made from the tables
    attend    part_s, lse_s = attention over the s-th SPLIT_KEYS keys
    project   x += combine(part, lse) W + b
    up        h = activation(norm(x) W + b)
    down      x += h W + b
    head      logits = norm(x) W + b        after the last layer; the positions move on by one

    tokens              [B]                     int64; positions [B] int32: what each row's cache holds, both on the device
    weights             [out, in] contiguous    bf16 | fp16 | fp32, the parameters themselves: nothing is packed or copied;
                                                matrices also int8, with an fp32 scale a row [out]
    keys, values        [L, B, H, S, D]         like the weights, unit last stride
    x, q, logits        [B, C], [B, C], [B, V]  fp32         h   [B, 4C]   like the weights
    part, lse           [B, splits, C], [B, splits, H]  fp32

A program of a matrix kernel owns ROWS output columns, which are rows of W, and holds their weights in registers: one batch of
16-byte loads, issued before anything else, since they don't depend on what the kernel before wrote. Its threads lie along a
row of W, so that norm, combination and products read x once and meet in one reduction each. All rows of the batch follow one
after another on the same weights. Sums are fp32 and in an order that neither batch mates nor cache length change.

The grid depends on shapes alone and the kernels read positions on the device: captured in a CUDA graph once, a step replays at
any length. Splits behind a row's length return at once. With `pdl` (sm90 and later) each kernel starts while the one before
runs out, its weights on their way, and waits for that one's results.

Bound by memory: a token reads every weight once and 2 B C length itemsize bytes of cache a layer. The rest stays in L2:
part and lse are 2 x 24 KB a row at GPT-2 124M.

Sources: the phases and the estimate of each design follow from the bandwidth of one H100; programmatic dependent launch:
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._launch import arch, check, check_device, launch
from ._token import attend_tile, load_rows, load_scales, matrix_rows, qkv_rows

# Rows that follow one another on the same weights. More keep tensor cores busy.
MAX_BATCH = 8

# The widest row of W that a program holds: 16 warps with 32 elements a thread.
MAX_WIDTH = 16384

# Keys of one program: at D = 64, 16 KB each of keys and values in flight; GPT-2's 12 heads make 96 programs at 1024 positions.
SPLIT_KEYS = 128

# Rows of W a program. Four of 768 are 6 KB in flight, and GPT-2's narrowest product makes 192 programs for 132
# multiprocessors. The head has 50257 rows: longer programs read x less often. `project` combines the splits once a program.
ROWS = 4
PROJECT_ROWS = 8
HEAD_ROWS = 16


class LayerWeights(NamedTuple):
    """One block's parameters: norms [C], matrices [out, in]; shifts and biases may be None."""

    norm1: Tensor
    norm1_shift: Tensor | None
    query: Tensor
    query_bias: Tensor | None
    key: Tensor
    key_bias: Tensor | None
    value: Tensor
    value_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    norm2: Tensor
    norm2_shift: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class LayerScales(NamedTuple):
    """Of one block's int8 matrices, fp32 [out] each: row r stands for scale[r] * W[r]."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    up: Tensor
    down: Tensor


class TokenWeights(NamedTuple):
    """All that a token reads: tables [V, C] and [P, C], blocks, final norm [C], head [V, C] (the token table where tied).

    With `scales` and `head_scale`, all matrices are int8; tables, norms and biases never are.
    """

    tokens: Tensor
    positions: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    norm_shift: Tensor | None
    head: Tensor
    head_bias: Tensor | None
    scales: tuple[LayerScales, ...] | None = None
    head_scale: Tensor | None = None


class TokenBuffers(NamedTuple):
    """What the kernels pass to each other; the result is in `logits`."""

    x: Tensor
    q: Tensor
    part: Tensor
    lse: Tensor
    hidden: Tensor
    logits: Tensor


def token_buffers(weights: TokenWeights, batch: int, n_heads: int, capacity: int, vocab_size: int) -> TokenBuffers:
    """Buffers for `batch` rows and caches of up to `capacity` positions."""
    device, C, splits = weights.head.device, weights.norm.shape[0], triton.cdiv(capacity, SPLIT_KEYS)
    x, q = (torch.empty(batch, C, device=device) for _ in range(2))
    part, lse = torch.empty(batch, splits, C, device=device), torch.empty(batch, splits, n_heads, device=device)
    hidden = torch.empty(batch, weights.layers[0].up.shape[0], device=device, dtype=weights.tokens.dtype)
    return TokenBuffers(x, q, part, lse, hidden, torch.empty(batch, vocab_size, device=device))


@triton.jit
def _token_qkv_kernel(
    tokens_ptr, positions_ptr, table_ptr, places_ptr, x_ptr, scale_ptr, shift_ptr, eps,
    wq_ptr, bq_ptr, wk_ptr, bk_ptr, wv_ptr, bv_ptr, q_scales_ptr, k_scales_ptr, v_scales_ptr, q_ptr, k_ptr, v_ptr,
    stride_b, stride_h, stride_s,
    C: tl.constexpr, H: tl.constexpr, BLOCK_C: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (C + ROWS - 1) // ROWS
    which = tl.program_id(0) // tiles
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    if which == 0:
        w, bias = load_rows(wq_ptr, bq_ptr, rows, C, C, BLOCK_C)
    elif which == 1:
        w, bias = load_rows(wk_ptr, bk_ptr, rows, C, C, BLOCK_C)
    else:
        w, bias = load_rows(wv_ptr, bv_ptr, rows, C, C, BLOCK_C)
    scales_ptr = q_scales_ptr
    if q_scales_ptr is not None:
        if which == 1:
            scales_ptr = k_scales_ptr
        elif which == 2:
            scales_ptr = v_scales_ptr
    scales = load_scales(scales_ptr, rows, C)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    qkv_rows(
        which, rows, C, w, bias, scales, table_ptr is not None, tl.program_id(0) == 0,
        tokens_ptr, positions_ptr, table_ptr, places_ptr, x_ptr, scale_ptr, shift_ptr, eps,
        q_ptr, k_ptr, v_ptr, stride_b, stride_h, stride_s, C, H, BLOCK_C, B,
    )  # fmt: skip


@triton.jit
def _token_attend_kernel(
    positions_ptr, q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, stride_b, stride_h, stride_s, splits,
    C: tl.constexpr, H: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    attend_tile(
        tl.program_id(0), positions_ptr, q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, stride_b, stride_h, stride_s, splits,
        C, H, BLOCK_D, SPLIT,
    )  # fmt: skip


@triton.jit
def _token_matrix_kernel(
    x_ptr, scale_ptr, shift_ptr, eps, h_ptr, part_ptr, lse_ptr, positions_ptr, splits, w_ptr, bias_ptr,
    scales_ptr, out_ptr, N,
    K: tl.constexpr, BLOCK_K: tl.constexpr, H: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr,
    B: tl.constexpr, ROWS: tl.constexpr, INPUT: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    ADVANCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w, bias = load_rows(w_ptr, bias_ptr, rows, N, K, BLOCK_K)
    scales = load_scales(scales_ptr, rows, N)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    matrix_rows(
        rows, N, w, bias, scales, x_ptr, scale_ptr, shift_ptr, eps, h_ptr, part_ptr, lse_ptr, positions_ptr, splits,
        out_ptr, N,
        K, BLOCK_K, H, SPLIT, BLOCK_S, B, INPUT, ACTIVATION, RESIDUAL,
    )  # fmt: skip
    if ADVANCE and tl.program_id(0) == 0:
        for b in tl.static_range(B):
            tl.store(positions_ptr + b, tl.load(positions_ptr + b) + 1)


def _warps(block: int) -> int:
    """So that a row of W is 8 to 32 elements a thread."""
    return min(max(block // 512, 4), 16)


def _combining_warps(block: int, splits: int) -> int:
    """So that parts and lse of all splits, beside the weights, take 64 registers a thread."""
    return min(max(block * splits // 1024, 4), 16)


def check_token(tokens: Tensor, positions: Tensor, weights: TokenWeights, keys: Tensor, values: Tensor) -> None:
    """ValueError unless shapes, dtypes and devices are what decode_token says."""
    check_device("decode_token", tokens=tokens, positions=positions, head=weights.head, keys=keys, values=values)
    (L, B, H, _, D), C, layers = keys.shape, weights.norm.shape[0], weights.layers
    dtype, matrices = weights.tokens.dtype, {layer.up.dtype for layer in layers} | {weights.head.dtype}
    scaled = weights.scales is not None
    check(1 <= B <= MAX_BATCH, f"decode_token: the batch must be 1 to {MAX_BATCH} rows, got {B}")
    check(
        dtype in (torch.bfloat16, torch.float16, torch.float32) and keys.dtype == values.dtype == dtype,
        f"decode_token: weights, keys and values must be bfloat16, float16 or float32 alike, got {dtype}, {keys.dtype}, "
        f"{values.dtype}",
    )
    check(
        matrices == {torch.int8 if scaled else dtype} and scaled == (weights.head_scale is not None),
        f"decode_token: matrices must be {torch.int8 if scaled else dtype}{' with a head_scale' if scaled else ''}, "
        f"got {sorted(map(str, matrices))}",
    )
    check(
        C == H * D and len(layers) == L and values.shape == keys.shape and values.stride() == keys.stride(),
        f"decode_token: keys and values must be [L, B, H, S, D] of {len(layers)} layers and width {C}, "
        f"got {list(keys.shape)} and {list(values.shape)}",
    )
    check(
        tokens.dtype == torch.int64 and positions.dtype == torch.int32 and tokens.shape == positions.shape == (B,),
        f"decode_token: tokens int64 [{B}] and positions int32 [{B}], got {tokens.dtype} {list(tokens.shape)} and "
        f"{positions.dtype} {list(positions.shape)}",
    )


def decode_token(
    tokens: Tensor,
    positions: Tensor,
    weights: TokenWeights,
    keys: Tensor,
    values: Tensor,
    buffers: TokenBuffers,
    activation: str = "gelu_tanh",
    eps: float = 1e-5,
    pdl: bool = False,
) -> Tensor:
    """Logits fp32 [B, V] of one new token a row, in `buffers.logits`; its keys and values join the cache, positions += 1.

    tokens int64 [B]; positions int32 [B], each under the capacity S of keys and values [L, B, H, S, D] (the caller's care:
    they are on the device). No gradient. `pdl`: programmatic dependent launch, sm90 and later.
    """
    check_token(tokens, positions, weights, keys, values)
    (_, B, H, _, D), C, layers = keys.shape, weights.norm.shape[0], weights.layers
    check(layers[0].up.shape[0] <= MAX_WIDTH, f"decode_token: the feed-forward part must be at most {MAX_WIDTH} wide")
    check(not pdl or arch(tokens.device) >= 90, f"decode_token: pdl needs sm90 or later, got sm{arch(tokens.device)}")
    x, q, part, lse, hidden, logits = buffers
    splits, launch_pdl = part.shape[1], {"launch_pdl": True} if pdl else {}
    block, strides = triton.next_power_of_2(C), keys.stride()[1:4]
    # Left alone, ptxas holds some of these kernels to 72, 96 or 128 registers for occupancy, and spills two to four.
    int8, wide_fp32 = weights.scales is not None, block > 1024 and weights.tokens.dtype == torch.float32
    maxnreg = 128 if (B > 1 and block <= 1024) or (B == 1 and int8) else 168 if int8 and wide_fp32 else None
    block_s, block_d = triton.next_power_of_2(splits), triton.next_power_of_2(D)

    def matrix(w, bias, scales, out, source, norm=None, shift=None, activation=None, rows=ROWS, advance=False):
        N, K = out.shape[1], w.shape[1]
        block_k = triton.next_power_of_2(K)
        warps = _combining_warps(block_k, block_s) if source == "parts" else _warps(block_k)
        if rows * block_k > 128 * 32 * warps:
            warps *= 2  # weights stay for all rows of the batch, and more than 128 a thread spill
        launch(
            _token_matrix_kernel, (triton.cdiv(N, rows),),
            x, norm, shift, eps, hidden, part, lse, positions, splits, w, bias, scales, out, N,
            K=K, BLOCK_K=block_k, H=H, SPLIT=SPLIT_KEYS, BLOCK_S=block_s, B=B, ROWS=rows, INPUT=source,
            ACTIVATION=activation, RESIDUAL=out is x, ADVANCE=advance, PDL=pdl,
            num_warps=warps, **launch_pdl,
        )  # fmt: skip

    for i, layer in enumerate(layers):
        scales = [None] * 6 if weights.scales is None else weights.scales[i]
        tables = (weights.tokens, weights.positions) if i == 0 else (None, None)
        launch(
            _token_qkv_kernel, (3 * triton.cdiv(C, ROWS),),
            tokens, positions, *tables, x, layer.norm1, layer.norm1_shift, eps, layer.query, layer.query_bias,
            layer.key, layer.key_bias, layer.value, layer.value_bias, *scales[:3], q, keys[i], values[i], *strides,
            C=C, H=H, BLOCK_C=block, B=B, ROWS=ROWS, PDL=pdl, num_warps=_warps(block), maxnreg=maxnreg, **launch_pdl,
        )  # fmt: skip
        launch(
            _token_attend_kernel, (B * H * splits,),
            positions, q, keys[i], values[i], part, lse, *strides, splits,
            C=C, H=H, BLOCK_D=block_d, SPLIT=SPLIT_KEYS, PDL=pdl, num_warps=4 if block_d <= 64 else 8, **launch_pdl,
        )  # fmt: skip
        matrix(layer.out, layer.out_bias, scales[3], x, "parts", rows=PROJECT_ROWS)
        matrix(layer.up, layer.up_bias, scales[4], hidden, "norm", layer.norm2, layer.norm2_shift, activation)
        matrix(layer.down, layer.down_bias, scales[5], x, "hidden")
    matrix(
        weights.head, weights.head_bias, weights.head_scale, logits, "norm", weights.norm, weights.norm_shift,
        rows=HEAD_ROWS, advance=True,
    )  # fmt: skip
    return logits
