"""One new token of one row through a whole GPT-2 as a single kernel: one program a multiprocessor, a grid barrier between phases.

    for each layer    qkv | attend | project | up | down |         the phases of decode_token, | is a barrier
    then              head                                         and the positions move on by one

Buffers and dtypes are decode_token's, so that either kernel can follow the other on the same cache. Besides:

    pointers          [L, 22]    int64, the addresses of each block's parameters in the order of LayerWeights, then LayerScales;
                                 0 where there is none
    barrier           [3]        int32, zeros at first: two counters and the number of the token

A program owns the same share of the rows of every weight, one row more or less than any other, and reads it in tiles. Between
arriving at a barrier and waiting on it, it requests its first tile of the next phase: the weights depend on nothing. While it
computes a tile, the next one is on its way.

Programs arrive at a counter and wait until all have; no arrival is undone, and a launch counts on one counter while it clears
the other for the next launch, so that a replayed CUDA graph needs nothing between replays. All programs must run at once: the
launch is cooperative, and the driver refuses a grid that doesn't fit instead of hanging. The interpreter runs programs one
after another, so there the grid is one.

Bound by memory as decode_token is, with 5 L + 1 phases behind 5 L barriers instead of kernels.

Source: the barrier's release and acquire are those of PyTorch's cooperative reductions,
https://github.com/pytorch/pytorch/blob/main/torch/_inductor/runtime/triton_helpers.py (x_grid_barrier)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import arch, check, launch, sm_count
from ._token import attend_tile, load_rows, load_scales, matrix_rows, qkv_rows
from .decode_token import SPLIT_KEYS, LayerScales, LayerWeights, TokenBuffers, TokenWeights, check_token

MAX_WIDTH = 8192  # 32 elements a thread of 8 warps, beside those of the next tile

NUM_WARPS = 8

# A tile of the rows of W: two in flight are 32 KB a multiprocessor (16 KB of int8), and 64 registers a thread.
TILE_BYTES = 16384

_SCALES = tl.constexpr(len(LayerWeights._fields))  # where a row of the pointers goes on with those of LayerScales
_POINTERS = tl.constexpr(len(LayerWeights._fields) + len(LayerScales._fields))


@triton.jit
def _arrive(barrier_ptr):
    tl.debug_barrier()  # every thread's stores come before the release
    tl.atomic_add(barrier_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _wait(barrier_ptr, target):
    while tl.atomic_add(barrier_ptr, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _share(N, nprog):
    """The rows that a program owns: first and end."""
    size = tl.cdiv(N, nprog)
    first = tl.program_id(0) * size
    return first, tl.minimum(first + size, N)


@triton.jit
def _pointer(pointers_ptr, layer, slot: tl.constexpr, like_ptr):
    address = tl.load(pointers_ptr + layer * _POINTERS + slot)
    return tl.multiple_of(address.to(like_ptr.dtype), 16)


@triton.jit
def _load_tile(w_ptr, bias_ptr, scales_ptr, rows, end, K: tl.constexpr, BLOCK_K: tl.constexpr):
    w, bias = load_rows(w_ptr, bias_ptr, rows, end, K, BLOCK_K)
    return w, bias, load_scales(scales_ptr, rows, end)


@triton.jit
def _matrix_phase(
    w, bias, scales, first, end, x_ptr, scale_ptr, shift_ptr, eps, h_ptr, part_ptr, lse_ptr, positions_ptr, splits,
    w_ptr, bias_ptr, scales_ptr, out_ptr, N,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_S: tl.constexpr, B: tl.constexpr, INPUT: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """All tiles of a program's share; the first one's weights have come already."""
    for start in tl.range(first, end, ROWS, num_stages=1):
        rows = start + tl.arange(0, ROWS)
        later_w, later_bias, later_scales = _load_tile(w_ptr, bias_ptr, scales_ptr, rows + ROWS, end, K, BLOCK_K)
        matrix_rows(
            rows, end, w, bias, scales, x_ptr, scale_ptr, shift_ptr, eps, h_ptr, part_ptr, lse_ptr, positions_ptr, splits,
            out_ptr, N, K, BLOCK_K, H, SPLIT, BLOCK_S, B, INPUT, ACTIVATION, RESIDUAL,
        )  # fmt: skip
        w, bias, scales = later_w, later_bias, later_scales


@triton.jit
def _token_persistent_kernel(
    tokens_ptr, positions_ptr, pointers_ptr, barrier_ptr, table_ptr, places_ptr, norm_ptr, shift_ptr, head_ptr,
    head_bias_ptr, head_scale_ptr, keys_ptr, values_ptr, x_ptr, q_ptr, part_ptr, lse_ptr, hidden_ptr, logits_ptr, eps,
    stride_l, stride_b, stride_h, stride_s, L, V, splits, nprog,
    C: tl.constexpr, F: tl.constexpr, H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, B: tl.constexpr,
    ROWS_C: tl.constexpr, ROWS_F: tl.constexpr, ACTIVATION: tl.constexpr,
    SHIFTS: tl.constexpr, QKV_BIAS: tl.constexpr, BIAS: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    token = tl.load(barrier_ptr + 2)
    counter_ptr, other_ptr = barrier_ptr + (token & 1), barrier_ptr + (1 - (token & 1))
    passed = 0
    first_c, end_c = _share(C, nprog)
    first_f, end_f = _share(F, nprog)
    first_v, end_v = _share(V, nprog)
    own_c, own_f = first_c + tl.arange(0, ROWS_C), first_f + tl.arange(0, ROWS_C)
    own_down, own_v = first_c + tl.arange(0, ROWS_F), first_v + tl.arange(0, ROWS_C)
    wq, bq, sq = _load_tile(
        _pointer(pointers_ptr, 0, 2, head_ptr), _pointer(pointers_ptr, 0, 3, table_ptr) if QKV_BIAS else None,
        _pointer(pointers_ptr, 0, _SCALES, head_scale_ptr) if INT8 else None, own_c, end_c, C, BLOCK_C,
    )  # fmt: skip
    for layer in tl.range(0, L, num_stages=1):
        k_ptr, v_ptr = keys_ptr + layer * stride_l.to(tl.int64), values_ptr + layer * stride_l.to(tl.int64)
        scale1, shift1 = _pointer(pointers_ptr, layer, 0, table_ptr), None
        scale2, shift2 = _pointer(pointers_ptr, layer, 10, table_ptr), None
        if SHIFTS:
            shift1, shift2 = _pointer(pointers_ptr, layer, 1, table_ptr), _pointer(pointers_ptr, layer, 11, table_ptr)
        w, bias, scales = wq, bq, sq
        for which in tl.static_range(3):
            w_ptr, bias_ptr, scales_ptr = _pointer(pointers_ptr, layer, 2 + 2 * which, head_ptr), None, None
            if QKV_BIAS:
                bias_ptr = _pointer(pointers_ptr, layer, 3 + 2 * which, table_ptr)
            if INT8:
                scales_ptr = _pointer(pointers_ptr, layer, _SCALES + which, head_scale_ptr)
            if which > 0:
                w, bias, scales = _load_tile(w_ptr, bias_ptr, scales_ptr, own_c, end_c, C, BLOCK_C)
            for start in tl.range(first_c, end_c, ROWS_C, num_stages=1):
                rows = start + tl.arange(0, ROWS_C)
                later_w, later_bias, later_scales = _load_tile(
                    w_ptr, bias_ptr, scales_ptr, rows + ROWS_C, end_c, C, BLOCK_C
                )
                qkv_rows(
                    which, rows, end_c, w, bias, scales, layer == 0,
                    (tl.program_id(0) == 0) & (start == 0) & (which == 0),
                    tokens_ptr, positions_ptr, table_ptr, places_ptr, x_ptr, scale1, shift1, eps,
                    q_ptr, k_ptr, v_ptr, stride_b, stride_h, stride_s, C, H, BLOCK_C, B,
                )  # fmt: skip
                w, bias, scales = later_w, later_bias, later_scales
        _arrive(counter_ptr)
        passed += nprog
        _wait(counter_ptr, passed)

        for tile in tl.range(tl.program_id(0), B * H * splits, nprog, num_stages=1):
            attend_tile(
                tile, positions_ptr, q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, stride_b, stride_h, stride_s, splits,
                C, H, BLOCK_D, SPLIT,
            )  # fmt: skip
        _arrive(counter_ptr)
        passed += nprog
        w_ptr, bias_ptr, scales_ptr = _pointer(pointers_ptr, layer, 8, head_ptr), None, None
        if BIAS:
            bias_ptr = _pointer(pointers_ptr, layer, 9, table_ptr)
        if INT8:
            scales_ptr = _pointer(pointers_ptr, layer, _SCALES + 3, head_scale_ptr)
        w, bias, scales = _load_tile(w_ptr, bias_ptr, scales_ptr, own_c, end_c, C, BLOCK_C)
        _wait(counter_ptr, passed)
        _matrix_phase(
            w, bias, scales, first_c, end_c, x_ptr, None, None, eps, hidden_ptr, part_ptr, lse_ptr, positions_ptr, splits,
            w_ptr, bias_ptr, scales_ptr, x_ptr, C,
            C, BLOCK_C, ROWS_C, H, SPLIT, BLOCK_S, B, "parts", None, True,
        )  # fmt: skip
        _arrive(counter_ptr)
        passed += nprog
        w_ptr, bias_ptr, scales_ptr = _pointer(pointers_ptr, layer, 12, head_ptr), None, None
        if BIAS:
            bias_ptr = _pointer(pointers_ptr, layer, 13, table_ptr)
        if INT8:
            scales_ptr = _pointer(pointers_ptr, layer, _SCALES + 4, head_scale_ptr)
        w, bias, scales = _load_tile(w_ptr, bias_ptr, scales_ptr, own_f, end_f, C, BLOCK_C)
        _wait(counter_ptr, passed)
        _matrix_phase(
            w, bias, scales, first_f, end_f, x_ptr, scale2, shift2, eps, hidden_ptr, part_ptr, lse_ptr, positions_ptr,
            splits, w_ptr, bias_ptr, scales_ptr, hidden_ptr, F,
            C, BLOCK_C, ROWS_C, H, SPLIT, BLOCK_S, B, "norm", ACTIVATION, False,
        )  # fmt: skip
        _arrive(counter_ptr)
        passed += nprog
        w_ptr, bias_ptr, scales_ptr = _pointer(pointers_ptr, layer, 14, head_ptr), None, None
        if BIAS:
            bias_ptr = _pointer(pointers_ptr, layer, 15, table_ptr)
        if INT8:
            scales_ptr = _pointer(pointers_ptr, layer, _SCALES + 5, head_scale_ptr)
        w, bias, scales = _load_tile(w_ptr, bias_ptr, scales_ptr, own_down, end_c, F, BLOCK_F)
        _wait(counter_ptr, passed)
        _matrix_phase(
            w, bias, scales, first_c, end_c, x_ptr, None, None, eps, hidden_ptr, part_ptr, lse_ptr, positions_ptr, splits,
            w_ptr, bias_ptr, scales_ptr, x_ptr, C,
            F, BLOCK_F, ROWS_F, H, SPLIT, BLOCK_S, B, "hidden", None, True,
        )  # fmt: skip
        _arrive(counter_ptr)
        passed += nprog
        if layer + 1 < L:
            wq, bq, sq = _load_tile(
                _pointer(pointers_ptr, layer + 1, 2, head_ptr),
                _pointer(pointers_ptr, layer + 1, 3, table_ptr) if QKV_BIAS else None,
                _pointer(pointers_ptr, layer + 1, _SCALES, head_scale_ptr) if INT8 else None,
                own_c, end_c, C, BLOCK_C,
            )  # fmt: skip
        _wait(counter_ptr, passed)

    w, bias, scales = _load_tile(head_ptr, head_bias_ptr, head_scale_ptr, own_v, end_v, C, BLOCK_C)
    _matrix_phase(
        w, bias, scales, first_v, end_v, x_ptr, norm_ptr, shift_ptr, eps, hidden_ptr, part_ptr, lse_ptr, positions_ptr,
        splits, head_ptr, head_bias_ptr, head_scale_ptr, logits_ptr, V,
        C, BLOCK_C, ROWS_C, H, SPLIT, BLOCK_S, B, "norm", None, False,
    )  # fmt: skip
    if tl.program_id(0) == 0:  # all programs are behind the last barrier: nobody reads these any more
        tl.store(other_ptr, 0)
        tl.store(barrier_ptr + 2, token + 1)
        for b in tl.static_range(B):
            tl.store(positions_ptr + b, tl.load(positions_ptr + b) + 1)


def layer_pointers(weights: TokenWeights) -> Tensor:
    """The addresses of all blocks' parameters and scales, int64 [L, 22]; valid as long as none of them is replaced."""
    rows = [[0 if t is None else t.data_ptr() for t in layer] for layer in _blocks(weights)]
    return torch.tensor(rows, dtype=torch.int64).to(weights.head.device)


def _blocks(weights: TokenWeights) -> list[tuple[Tensor | None, ...]]:
    """What a row of the pointers names."""
    scales = weights.scales or [(None,) * len(LayerScales._fields)] * len(weights.layers)
    return [(*layer, *own) for layer, own in zip(weights.layers, scales, strict=True)]


def persistent_obstacle(weights: TokenWeights) -> str | None:
    """Why the one kernel can't run from these weights, or None."""
    layers = weights.layers
    if layers[0].up.shape[0] > MAX_WIDTH:
        return f"the feed-forward part is {layers[0].up.shape[0]} wide, more than {MAX_WIDTH}"
    if len({tuple(t is None for t in layer) for layer in layers}) > 1:
        return "blocks differ in which biases they have"
    given = [t for layer in _blocks(weights) for t in layer if t is not None]
    if any(t.data_ptr() % 16 for t in given if t.device.type != "meta"):
        return "a parameter doesn't start at a multiple of 16 bytes"
    if any(row_bytes % 16 for row_bytes in (layers[0].up.stride(0) * layers[0].up.itemsize,)):
        return f"rows of {layers[0].up.shape[1]} elements don't start at multiples of 16 bytes"
    return None


def decode_persistent(
    tokens: Tensor,
    positions: Tensor,
    weights: TokenWeights,
    pointers: Tensor,
    barrier: Tensor,
    keys: Tensor,
    values: Tensor,
    buffers: TokenBuffers,
    activation: str = "gelu_tanh",
    eps: float = 1e-5,
) -> Tensor:
    """decode_token as one kernel: logits fp32 [1, V] in `buffers.logits`; the cache grows by a position, positions += 1.

    pointers: `layer_pointers(weights)`. barrier: int32 [3], zeros before the first call, then left alone; one for calls that
    never overlap. Raises ValueError for what `persistent_obstacle` names and for bad shapes.
    """
    check_token(tokens, positions, weights, keys, values)
    check(len(tokens) == 1, f"decode_persistent: the batch must be 1 row, got {len(tokens)}; decode_token takes more")
    why = persistent_obstacle(weights)
    check(why is None, f"decode_persistent: {why}")
    check(
        barrier.dtype == torch.int32 and barrier.shape == (3,),
        f"decode_persistent: barrier must be int32 [3], got {barrier.dtype} {list(barrier.shape)}",
    )
    check(
        pointers.dtype == torch.int64 and pointers.shape == (len(weights.layers), _POINTERS.value),
        f"decode_persistent: pointers must be int64 [{len(weights.layers)}, {_POINTERS.value}], "
        f"got {pointers.dtype} {list(pointers.shape)}",
    )
    x, q, part, lse, hidden, logits = buffers
    (L, B, H, _, D), C, F = keys.shape, weights.norm.shape[0], hidden.shape[1]
    on_gpu = tokens.device.type in ("cuda", "meta")
    nprog = sm_count(tokens.device) if on_gpu else 1
    block_c, block_f = triton.next_power_of_2(C), triton.next_power_of_2(F)
    tile, first = _tile(weights.head.element_size(), block_c, arch(tokens.device)), weights.layers[0]
    launch(
        _token_persistent_kernel, (nprog,),
        tokens, positions, pointers, barrier, weights.tokens, weights.positions, weights.norm, weights.norm_shift,
        weights.head, weights.head_bias, weights.head_scale, keys, values, x, q, part, lse, hidden, logits, eps,
        *keys.stride()[:4], L, logits.shape[1], part.shape[1], nprog,
        C=C, F=F, H=H, BLOCK_C=block_c, BLOCK_F=block_f, BLOCK_D=triton.next_power_of_2(D), SPLIT=SPLIT_KEYS,
        BLOCK_S=triton.next_power_of_2(part.shape[1]), B=B, ROWS_C=max(tile // block_c, 1), ROWS_F=max(tile // block_f, 1),
        ACTIVATION=activation, SHIFTS=first.norm1_shift is not None, QKV_BIAS=first.query_bias is not None,
        BIAS=first.out_bias is not None, INT8=weights.scales is not None, num_warps=NUM_WARPS,
        **({"launch_cooperative_grid": True} if on_gpu and arch(tokens.device) >= 70 else {}),
    )  # fmt: skip
    return logits


def _tile(itemsize: int, block: int, capability: int) -> int:
    """Weights of a tile. Products are fp32: no more int8 weights than 16-bit ones fit; ptxas spills 48 bytes of these on sm80."""
    weights = TILE_BYTES // max(itemsize, 2)
    return weights // 2 if itemsize == 1 and block > 1024 and capability == 80 else weights
