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

A program of a matrix kernel owns ROWS output columns, which are rows of W, and holds their weights in registers. Its threads
lie along a row of W, so that norm, combination and products read x once and meet in one reduction each. All rows of the batch
follow one after another on the same weights. Sums are fp32 and in an order that neither batch mates nor cache length change.

All loads of a kernel are on their way before the first is used: weights and the norm's parameters, what is added to, then the
input. Two kernels need an answer to ask for more: attend the position, layer 0 the token. ptxas would rather put a load off
until something uses it; it doesn't move one over a barrier, and so the input comes behind one. `python -m fastgpt_kernels.aot`
counts these waves of loads in the machine code.

The grid depends on shapes alone and the kernels read positions on the device: captured in a CUDA graph once, a step replays at
any length. 3 rows run on the kernels of 4, and 5 to 7 on those of 8, so that a batch that shrinks compiles nothing. With `pdl`
(sm90 and later) a kernel first lets the next one start, asks for its weights, and waits for the kernel before; nothing that any
kernel wrote is read ahead of the wait. With `ahead` it also has L2 fetch what later kernels read: see _ahead.py.

Bound by memory: a token reads every weight once and 2 B C length itemsize bytes of cache a layer. The rest stays in L2:
part and lse are 2 x 24 KB a row at GPT-2 124M.

Sources: the phases and the estimate of each design follow from the bandwidth of one H100; programmatic dependent launch:
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._ahead import AHEAD_BYTES, Ahead, ask_ahead, load_piece, plan
from ._launch import INTERPRETING, arch, cdiv, check, check_device, launch, next_power_of_2, sm_count
from ._math import activation as _activation
from ._token import combined, embedded, load_input, load_norm, load_parts, load_rows, normed, times_rows
from .decode import attend_splits

# Rows that follow one another on the same weights. More keep tensor cores busy.
MAX_BATCH = 8

# The widest row of W that a program holds: 16 warps with 32 elements a thread.
MAX_WIDTH = 16384

# Keys of one program: at D = 64, 16 KB each of keys and values in flight; GPT-2's 12 heads make 96 programs at 1024 positions.
SPLIT_KEYS = 128

# Elements of W on their way to a multiprocessor, about: 24 KB in 16 bits, what an H100's 3.35 TB/s bring to one of 132 in a
# microsecond, which is how long a busy memory takes to answer.
IN_FLIGHT = 12288

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
    device, C, splits = weights.head.device, weights.norm.shape[0], cdiv(capacity, SPLIT_KEYS)
    x, q = (torch.empty(batch, C, device=device) for _ in range(2))
    part, lse = torch.empty(batch, splits, C, device=device), torch.empty(batch, splits, n_heads, device=device)
    hidden = torch.empty(batch, weights.layers[0].up.shape[0], device=device, dtype=weights.tokens.dtype)
    return TokenBuffers(x, q, part, lse, hidden, torch.empty(batch, vocab_size, device=device))


def plan_ahead(weights: TokenWeights) -> Ahead | None:
    """What decode_token's kernels ask L2 for, AHEAD_BYTES ahead; None for 0 and where there is nothing to ask with.

    For sm90 and later. On a GPU no more than half of its L2 lies between asking and reading.
    """
    device, (C,), F = weights.head.device, weights.norm.shape, weights.layers[0].up.shape[0]
    if INTERPRETING or arch(device) < 90:
        return None
    distance = AHEAD_BYTES
    if device.type == "cuda":
        distance = min(distance, torch.cuda.get_device_properties(device).L2_cache_size // 2)
    kernels: list[tuple[tuple[Tensor, ...], int]] = []
    for layer in weights.layers:
        kernels.append(((layer.query, layer.key, layer.value), 3 * cdiv(C, ROWS)))
        kernels += [((layer.out,), cdiv(C, PROJECT_ROWS)), ((layer.up,), cdiv(F, ROWS)), ((layer.down,), cdiv(C, ROWS))]
    return plan([*kernels, ((weights.head,), cdiv(len(weights.head), HEAD_ROWS))], distance, device)


@triton.jit(do_not_specialize=["pieces"])
def _token_qkv_kernel(
    tokens_ptr, positions_ptr, table_ptr, places_ptr, x_ptr, scale_ptr, shift_ptr, eps,
    wq_ptr, bq_ptr, wk_ptr, bk_ptr, wv_ptr, bv_ptr, q_scales_ptr, k_scales_ptr, v_scales_ptr, q_ptr, k_ptr, v_ptr,
    pieces_ptr, pieces, batch, stride_b, stride_h, stride_s,
    C: tl.constexpr, H: tl.constexpr, BLOCK_C: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr,
    WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Queries, keys or values from norm(x); in the first layer x is made from the tables."""
    if PDL:
        gdc_launch_dependents()
    D: tl.constexpr = C // H
    cols = tl.arange(0, BLOCK_C)
    tiles: tl.constexpr = (C + ROWS - 1) // ROWS
    which = tl.program_id(0) // tiles
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    # One load behind three pointers: of three loads in branches, none is on its way while another instruction is issued.
    w_ptr, bias_ptr, scales_ptr = wq_ptr, bq_ptr, q_scales_ptr
    if which == 1:
        w_ptr, bias_ptr, scales_ptr = wk_ptr, bk_ptr, k_scales_ptr
    elif which == 2:
        w_ptr, bias_ptr, scales_ptr = wv_ptr, bv_ptr, v_scales_ptr
    w, bias, scales = load_rows(w_ptr, bias_ptr, scales_ptr, rows, C, C, BLOCK_C)
    scale, shift = load_norm(scale_ptr, shift_ptr, C, BLOCK_C)
    address, size = load_piece(pieces_ptr, pieces)
    if PDL:
        gdc_wait()
    elif table_ptr is not None:
        tl.debug_barrier()
    positions: tl.tuple = ()
    tokens: tl.tuple = ()
    xs: tl.tuple = ()
    for b in tl.static_range(B):
        positions = positions + (tl.load(positions_ptr + tl.minimum(b, batch - 1)).to(tl.int64),)
        if table_ptr is not None:
            tokens = tokens + (tl.maximum(tl.load(tokens_ptr + tl.minimum(b, batch - 1)), 0),)  # what a broken row drew
    tl.debug_barrier()  # what was asked for is on its way: ptxas would put off what is used last
    for b in tl.static_range(WINDOW):
        if table_ptr is not None:
            xs = xs + (embedded(table_ptr, places_ptr, tokens[b], positions[b], C, BLOCK_C),)
        else:
            xs = xs + (tl.load(x_ptr + tl.minimum(b, batch - 1) * C + cols, mask=cols < C, other=0.0),)
    ask_ahead(pieces_ptr, address, size)
    for b in tl.static_range(B):
        if table_ptr is not None and tl.program_id(0) == 0:
            tl.store(x_ptr + b * C + cols, xs[b], mask=(cols < C) & (b < batch))
        out = times_rows(w, normed(xs[b], scale, shift, eps, C, BLOCK_C), scales) + bias
        mask = (rows < C) & (b < batch)
        at = b * stride_b + positions[b] * stride_s + rows // D * stride_h + rows % D
        if which == 0:
            tl.store(q_ptr + b * C + rows, out, mask=mask)
        elif which == 1:
            tl.store(k_ptr + at, out.to(k_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(v_ptr + at, out.to(v_ptr.dtype.element_ty), mask=mask)
        if b + WINDOW < B:
            if table_ptr is not None:
                xs = xs + (embedded(table_ptr, places_ptr, tokens[b + WINDOW], positions[b + WINDOW], C, BLOCK_C),)
            else:
                xs = xs + (tl.load(x_ptr + tl.minimum(b + WINDOW, batch - 1) * C + cols, mask=cols < C, other=0.0),)


@triton.jit(do_not_specialize=["pieces"])
def _token_matrix_kernel(
    x_ptr, scale_ptr, shift_ptr, eps, h_ptr, part_ptr, lse_ptr, positions_ptr, splits, w_ptr, bias_ptr,
    scales_ptr, out_ptr, pieces_ptr, pieces, batch, N,
    K: tl.constexpr, BLOCK_K: tl.constexpr, H: tl.constexpr, BLOCK_S: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr,
    INPUT: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, ADVANCE: tl.constexpr,
    WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[b] = activation(W input[b] + bias), or that added to out[b]."""
    if PDL:
        gdc_launch_dependents()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w, bias, scales = load_rows(w_ptr, bias_ptr, scales_ptr, rows, N, K, BLOCK_K)
    if INPUT == "norm":
        scale, shift = load_norm(scale_ptr, shift_ptr, K, BLOCK_K)
    address, size = load_piece(pieces_ptr, pieces)
    if PDL:
        gdc_wait()
    olds: tl.tuple = ()
    parts: tl.tuple = ()
    inputs: tl.tuple = ()
    for b in tl.static_range(WINDOW):
        row = tl.minimum(b, batch - 1)
        if RESIDUAL:
            olds = olds + (tl.load(out_ptr + row * N + rows, mask=rows < N, other=0.0),)
        if INPUT == "parts":
            parts = parts + (load_parts(part_ptr, row, splits, K, BLOCK_K, BLOCK_S),)
    # Behind a barrier, or ptxas puts off what is used last. The input comes last, since all that is computed waits for it.
    tl.debug_barrier()
    for b in tl.static_range(WINDOW):
        row = tl.minimum(b, batch - 1)
        inputs = inputs + (load_input(x_ptr, h_ptr, lse_ptr, splits, row, K, BLOCK_K, H, BLOCK_S, INPUT),)
    ask_ahead(pieces_ptr, address, size)
    for b in tl.static_range(B):
        if INPUT == "norm":
            y = normed(inputs[b], scale, shift, eps, K, BLOCK_K)
        elif INPUT == "parts":
            y = combined(parts[b], inputs[b])
        else:
            y = inputs[b].to(tl.float32)
        out = _activation(times_rows(w, y, scales) + bias, ACTIVATION)
        if RESIDUAL:
            out += olds[b]
        tl.store(out_ptr + b * N + rows, out.to(out_ptr.dtype.element_ty), mask=(rows < N) & (b < batch))
        if b + WINDOW < B:
            row = tl.minimum(b + WINDOW, batch - 1)
            if RESIDUAL:
                olds = olds + (tl.load(out_ptr + row * N + rows, mask=rows < N, other=0.0),)
            if INPUT == "parts":
                parts = parts + (load_parts(part_ptr, row, splits, K, BLOCK_K, BLOCK_S),)
            inputs = inputs + (load_input(x_ptr, h_ptr, lse_ptr, splits, row, K, BLOCK_K, H, BLOCK_S, INPUT),)
    if ADVANCE and tl.program_id(0) == 0:
        at = tl.arange(0, B)
        tl.store(positions_ptr + at, tl.load(positions_ptr + at, mask=at < batch) + 1, mask=at < batch)


def _warps(block: int) -> int:
    """So that a row of W is 8 to 32 elements a thread."""
    return min(max(block // 512, 4), 16)


def _window(batch: int, source: str, warps: int, dtype: torch.dtype) -> int:
    """Rows whose inputs are on their way or in use at once: computing one takes about as long as L2 takes to answer."""
    # Of three in fp16 beside a norm, Triton 3.6 spills an address.
    most = 2 if source in ("fp32 tables", "parts") or (source == "norm" and dtype == torch.float16) else 3
    return min(batch, 1 if warps == 16 else most)  # 16 warps have 128 registers a thread, at most


def _combining_warps(block: int, splits: int, batch: int, capability: int) -> int:
    """So that parts and lse of all splits, beside the weights, take 64 registers a thread.

    Of eight rows of wide models on sm100, Triton 3.6 needs more than the 128 that 16 warps have. With 8 warps of 185 one program
    fits a multiprocessor too.
    """
    elements = 2048 if batch == 8 and block > 1024 and capability // 10 == 10 else 1024
    return min(max(block * splits // elements, 4), 16)


def _project(batch: int, width: int, multiprocessors: int) -> tuple[int, int | None]:
    """Columns a program of `project`, and rows in flight where that isn't _window's.

    From 2 rows on, 8 columns with two rows' parts take up to 188 registers of 8 warps: one program a multiprocessor. That is
    one round of GPT-2's 96 programs on the 108 of an A100 or the 132 of an H100, and two on the 84 of an RTX 3090. With 4
    columns and one row's parts there (80 registers in 16 bits), three programs fit, and all 192 run at once. Wider models
    have 16 warps with 128 registers: from 4 rows on 8 columns spill, and 4 have one row's parts in flight.
    """
    if next_power_of_2(width) > 1024:
        return (PROJECT_ROWS, None) if batch < 4 else (ROWS, 1)
    if batch > 1 and cdiv(width, PROJECT_ROWS) > multiprocessors:
        return ROWS, 1
    return PROJECT_ROWS, None


def resident(rows: int, width: int) -> int:
    """Programs planned on a multiprocessor that hold `rows` rows of W, `width` elements each: IN_FLIGHT of them in all."""
    return max(round(IN_FLIGHT / (rows * width)), 1)


def _registers(rows: int, width: int, warps: int, batch: int, dtype: torch.dtype) -> int | None:
    """What a thread may have, where ptxas would rather spill than fit fewer programs: as much as the planned ones leave.

    One row in 16 bits is left alone: it needs so little that the next kernel's programs fit beside these.
    """
    if batch == 1 and dtype.itemsize == 2:
        return None
    return min(65536 // (32 * warps * resident(rows, width)) // 8 * 8, 255)


def _all_or_none(*biases: Tensor | None) -> Sequence[Tensor | None]:
    """The biases, zeros for those missing where others are there."""
    given = next((bias for bias in biases if bias is not None), None)
    return biases if given is None else [torch.zeros_like(given) if bias is None else bias for bias in biases]


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
    ahead: Ahead | None = None,
) -> Tensor:
    """Logits fp32 [B, V] of one new token a row, in `buffers.logits`; its keys and values join the cache, positions += 1.

    tokens int64 [B]; positions int32 [B], each under the capacity S of keys and values [L, B, H, S, D] (the caller's care:
    they are on the device). No gradient. pdl: programmatic dependent launch, sm90 and later. ahead: of `plan_ahead`, valid until
    a weight is replaced.
    """
    check_token(tokens, positions, weights, keys, values)
    (_, B, H, _, D), C, layers = keys.shape, weights.norm.shape[0], weights.layers
    check(layers[0].up.shape[0] <= MAX_WIDTH, f"decode_token: the feed-forward part must be at most {MAX_WIDTH} wide")
    capability = arch(tokens.device)
    check(not pdl or capability >= 90, f"decode_token: pdl needs sm90 or later, got sm{capability}")
    x, q, part, lse, hidden, logits = buffers
    splits, launch_pdl = part.shape[1], {"launch_pdl": True} if pdl else {}
    block, strides, rows_b, dtype = next_power_of_2(C), keys.stride()[1:4], next_power_of_2(B), keys.dtype
    block_s, asked = next_power_of_2(splits), itertools.count()

    def asks():
        return (None, 0) if ahead is None else ahead.of(next(asked))

    def matrix(
        w, bias, scales, out, source, norm=None, shift=None, activation=None, rows=ROWS, window=None, advance=False
    ):
        N, K = out.shape[1], w.shape[1]
        block_k = next_power_of_2(K)
        warps = _combining_warps(block_k, block_s, rows_b, capability) if source == "parts" else _warps(block_k)
        if rows * block_k > 128 * 32 * warps:
            warps *= 2  # weights stay for all rows of the batch, and more than 128 a thread spill
        launch(
            _token_matrix_kernel, (cdiv(N, rows),),
            x, norm, shift, eps, hidden, part, lse, positions, splits, w, bias, scales, out, *asks(), B, N,
            K=K, BLOCK_K=block_k, H=H, BLOCK_S=block_s, B=rows_b, ROWS=rows, INPUT=source,
            ACTIVATION=activation, RESIDUAL=out is x, ADVANCE=advance,
            WINDOW=window or _window(rows_b, source, warps, dtype), PDL=pdl, num_warps=warps,
            maxnreg=None if source == "parts" else _registers(rows, K, warps, rows_b, dtype), **launch_pdl,
        )  # fmt: skip

    rows, window = _project(rows_b, C, sm_count(tokens.device))
    for i, layer in enumerate(layers):
        scales = [None] * 6 if weights.scales is None else weights.scales[i]
        biases = _all_or_none(layer.query_bias, layer.key_bias, layer.value_bias)
        tables = (weights.tokens, weights.positions) if i == 0 else (None, None)
        source = "fp32 tables" if i == 0 and dtype == torch.float32 else "norm"
        launch(
            _token_qkv_kernel, (3 * cdiv(C, ROWS),),
            tokens, positions, *tables, x, layer.norm1, layer.norm1_shift, eps, layer.query, biases[0],
            layer.key, biases[1], layer.value, biases[2], *scales[:3], q, keys[i], values[i], *asks(), B, *strides,
            C=C, H=H, BLOCK_C=block, B=rows_b, ROWS=ROWS, WINDOW=_window(rows_b, source, _warps(block), dtype), PDL=pdl,
            num_warps=_warps(block), maxnreg=_registers(ROWS, C, _warps(block), rows_b, dtype), **launch_pdl,
        )  # fmt: skip
        attend_splits(
            q.view(B, H, 1, D), keys[i], values[i], positions, part, lse.transpose(1, 2)[:, :, None], SPLIT_KEYS,
            new=1, pdl=pdl,
        )  # fmt: skip
        matrix(layer.out, layer.out_bias, scales[3], x, "parts", rows=rows, window=window)
        matrix(layer.up, layer.up_bias, scales[4], hidden, "norm", layer.norm2, layer.norm2_shift, activation)
        matrix(layer.down, layer.down_bias, scales[5], x, "hidden")
    matrix(
        weights.head, weights.head_bias, weights.head_scale, logits, "norm", weights.norm, weights.norm_shift,
        rows=HEAD_ROWS, advance=True,
    )  # fmt: skip
    return logits
