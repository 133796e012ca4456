"""A linear layer with its activation, and the feed-forward block of two, forward and backward.

    linear      y = f(pre), pre = x w^T + b               f: GELU (tanh or erf) or ReLU; with none it is torch's linear
                dpre = dy * f'(pre)      dx = dpre w      dw = dpre^T x      db = column sums of dpre
    mlp         y = h w2^T + b2, h = f(pre), pre = x w1^T + b1
                dpre = (dy w2) * f'(pre)      dx = dpre w1      dw1 = dpre^T x      dw2 = dy^T h      db1, db2 alike

    x, dx             [M, K]     bf16 | fp16 | fp32 | fp64     any strides, M the product of x's leading dimensions
    w, dw             [N, K]     like x, any strides
    b, db             [N]        like x
    y, dy, pre        [M, N]     like x; dy of any strides

Products that gain from an epilogue are kernels of gemm.py: pre with its activation, and in mlp dy w2 with the derivative, out of
which db1 comes too. All others are torch's, by cuBLAS. The derivative of a linear layer of its own, and db2, are passes over
memory: a program of `_activation_backward_kernel` owns a chunk of rows of COLUMNS columns and sums its part of db on the way.

The backward pass has x, pre and in mlp h kept for it; h was written anyway, for the second product. Making it again would
save 2 M N bytes and cost 4 M N of traffic: 201 MB against 134 us for each layer of GPT-2 at 32 x 1024 tokens on an H100. ReLU
keeps h or y alone, whose sign is pre's.

Predicted by the roofline at 798 TFLOP/s and 3.0 TB/s for M = 32768, K = 768, N = 3072 in bf16, where a product is 194 us:

    with an activation        operands, pre and y are 153 us of traffic, 78% of the product's time and under it; an activation
                              after cuBLAS is 134 us more. At 60% of cuBLAS's rate the two are equal.
    dy w2 with its derivative a derivative of its own is 201 us after a product of 194, so half of cuBLAS's rate is enough; db1
                              of its own reads dpre again, 67 us
    db2 of its own            reads dy again, 17 us: 1/16 more of dw2's product, inside it, was no less
    few rows                  the decode engine or cuBLAS: 1.6 us of weight traffic, so launches decide

Bound by tensor cores: 2 M N K FLOPs a product, one forward and two backward; `_activation_backward_kernel` is bound by
memory: 3 M N elements.

Source: https://github.com/Dao-AILab/flash-attention/blob/main/flash_attn/ops/fused_dense.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import cdiv, check, check_device, check_float, launch, register, sm_count
from ._rows import column_sums
from .gemm import gemm_activation, gemm_gradient, through_activation

ACTIVATIONS = ("gelu_tanh", "gelu", "relu")

# A warp reads 256 columns of 16-bit data in one 16-byte load a lane. Eight such rows of dy, pre and the sums take four warps 72
# registers a thread: six programs a multiprocessor have 48 KB in flight, where 3 TB/s over 0.8 us of latency take 18.
ROWS = 8
COLUMNS = 256
PROGRAMS_PER_SM = 6


@triton.jit(do_not_specialize=["M", "rows_per_program"])
def _activation_backward_kernel(
    dy_ptr, pre_ptr, dpre_ptr, partial_ptr,
    M, N, rows_per_program,
    stride_dym, stride_dyn,
    ACTIVATION: tl.constexpr, HAS_SUMS: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * rows_per_program
    last = min(first + rows_per_program, M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for row in tl.range(first, last, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        mask = (rows < last)[:, None] & (cols < N)[None, :]
        offsets = rows[:, None] * stride_dym + cols.to(tl.int64)[None, :] * stride_dyn
        dpre = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(ACC)
        if ACTIVATION is not None:
            offsets = rows[:, None] * N + cols[None, :]
            pre = tl.load(pre_ptr + offsets, mask=mask, other=0.0)
            dpre = through_activation(dpre, pre.to(ACC), ACTIVATION)
            tl.store(dpre_ptr + offsets, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        sums += dpre
    if HAS_SUMS:
        tl.store(partial_ptr + chunk * N + cols, tl.sum(sums, axis=0), mask=cols < N)


def _fake_activation_backward(dy, pre, activation, wants_sums):
    shape = 0 if activation is None else dy.shape
    return dy.new_empty(shape), dy.new_empty(dy.shape[1] if wants_sums else 0)


@register(
    "_activation_backward(Tensor dy, Tensor? pre, str? activation, bool wants_sums) -> (Tensor, Tensor)",
    fake=_fake_activation_backward,
)
def activation_backward(
    dy: Tensor, pre: Tensor | None, activation: str | None, wants_sums: bool
) -> tuple[Tensor, Tensor]:
    """dy, pre [M, N] -> dpre [M, N], its column sums [N]; what isn't asked for (activation None: dpre) is an empty tensor."""
    M, N = dy.shape
    wide = torch.promote_types(dy.dtype, torch.float32)
    column_programs = cdiv(N, COLUMNS)
    row_tiles = cdiv(M, ROWS)
    row_programs = min(row_tiles, cdiv(PROGRAMS_PER_SM * sm_count(dy.device), column_programs))
    dpre = torch.empty((0,) if activation is None else (M, N), device=dy.device, dtype=dy.dtype)
    partial = torch.empty((row_programs, N if wants_sums else 0), device=dy.device, dtype=wide)
    launch(
        _activation_backward_kernel,
        (row_programs, column_programs),
        dy, pre, dpre, partial, M, N, cdiv(row_tiles, max(row_programs, 1)) * ROWS, *dy.stride(),
        ACTIVATION=activation, HAS_SUMS=wants_sums, ACC=tl.float64 if wide == torch.float64 else tl.float32,
        BLOCK_M=ROWS, BLOCK_N=COLUMNS, num_warps=4,
    )  # fmt: skip
    sums = dy.new_empty(partial.shape[1])
    column_sums(partial, sums)
    return dpre, sums


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        y, pre = gemm_activation(x, weight.t(), bias, activation, activation != "relu")
        ctx.save_for_backward(x, weight, y if activation == "relu" else pre)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, pre = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dpre, dbias = activation_backward(dy, pre, ctx.activation, wants_bias)
        dx = dpre @ weight if wants_x else None
        dweight = dpre.t() @ x if wants_weight else None
        return dx, dweight, dbias if wants_bias else None, None


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, activation):
        h, pre = gemm_activation(x, w1.t(), b1, activation, activation != "relu")
        ctx.save_for_backward(x, w1, w2, h, h if activation == "relu" else pre)
        ctx.activation = activation
        return F.linear(h, w2, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, w1, w2, h, pre = ctx.saved_tensors
        wants_x, wants_w1, wants_b1, wants_w2, wants_b2 = ctx.needs_input_grad[:5]
        dx = dw1 = db1 = dw2 = db2 = None
        if wants_w2:
            dw2 = dy.t() @ h
        if wants_b2:
            _, db2 = activation_backward(dy, None, None, True)
        if wants_x or wants_w1 or wants_b1:
            dpre, db1 = gemm_gradient(dy, w2, pre, ctx.activation, wants_b1)
        if wants_x:
            dx = dpre @ w1
        if wants_w1:
            dw1 = dpre.t() @ x
        return dx, dw1, db1 if wants_b1 else None, dw2, db2, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """activation(x @ weight.T + bias). x [..., K], weight [N, K], bias [N] -> [..., N]. `activation` in ACTIVATIONS or None.

    x, weight, bias and the incoming gradient may have any strides; x is copied only where its leading dimensions don't flatten
    to rows. Under autocast, inputs are cast to its dtype, as torch's own linear has it, and that is what runs without activation.
    """
    check_device("linear", x=x, weight=weight, bias=bias)
    check_float("linear", x=x, weight=weight, bias=bias)
    x, weight, bias = _autocast(x, weight, bias)
    known = activation is None or activation in ACTIVATIONS
    check(known, f"linear: activation must be None or one of {ACTIVATIONS}, got {activation!r}")
    check(x.dim() > 0, "linear: x must be [..., K], got a scalar")
    _check_layer("linear", x.shape[-1], x.dtype, weight=weight, bias=bias)
    if activation is None:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if _differentiable(x, weight, bias):
        y = _Linear.apply(rows, weight, bias, activation)
    else:
        y, _ = gemm_activation(rows, weight.t(), bias, activation, False)
    return y.view(*x.shape[:-1], y.shape[-1])


def mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str = "gelu_tanh"
) -> Tensor:
    """linear(linear(x, w1, b1, activation), w2, b2): the two layers of a transformer's feed-forward part.

    x [..., K], w1 [N, K], b1 [N], w2 [L, N], b2 [L] -> [..., L]; strides and autocast as in `linear`.
    """
    check_device("mlp", x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    check_float("mlp", x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    x, w1, b1, w2, b2 = _autocast(x, w1, b1, w2, b2)
    check(activation in ACTIVATIONS, f"mlp: activation must be one of {ACTIVATIONS}, got {activation!r}")
    check(x.dim() > 0, "mlp: x must be [..., K], got a scalar")
    _check_layer("mlp", x.shape[-1], x.dtype, w1=w1, b1=b1)
    _check_layer("mlp", w1.shape[0], x.dtype, w2=w2, b2=b2)
    rows = x.reshape(-1, x.shape[-1])
    if _differentiable(x, w1, b1, w2, b2):
        y = _MLP.apply(rows, w1, b1, w2, b2, activation)
    else:
        h, _ = gemm_activation(rows, w1.t(), b1, activation, False)
        y = F.linear(h, w2, b2)
    return y.view(*x.shape[:-1], y.shape[-1])


def _autocast(*tensors: Tensor | None) -> list:
    """Under autocast, its dtype for all but float64, which torch's own autocast leaves alone too."""
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check_layer(op: str, width: int, dtype: torch.dtype, **parameters: Tensor | None) -> None:
    """A weight [N, width] and a bias [N] or None, in this order, of x's dtype."""
    (weight_name, weight), (bias_name, bias) = parameters.items()
    assert weight is not None
    shape = tuple(weight.shape)
    fits = len(shape) == 2 and shape[1] == width and min(shape) > 0
    check(fits, f"{op}: {weight_name} must be [N, {width}], both positive, got {list(shape)}")
    check(weight.dtype == dtype, f"{op}: {weight_name} must have x's dtype {dtype}, got {weight.dtype}")
    if bias is not None:
        check(bias.shape == shape[:1], f"{op}: {bias_name} must be [{shape[0]}], got {list(bias.shape)}")
        check(bias.dtype == dtype, f"{op}: {bias_name} must have x's dtype {dtype}, got {bias.dtype}")
