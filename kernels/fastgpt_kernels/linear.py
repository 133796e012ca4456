"""A linear layer with its activation, and the feed-forward block of two, forward and backward.

    linear      y = f(pre), pre = x w^T + b               f: GELU (tanh or erf) or ReLU; with none it is torch's linear
                dpre = dy * f'(pre)      dx = dpre w      dw = dpre^T x      db = column sums of dpre
    mlp         y = r + h w2^T + b2, h = f(pre), pre = x w1^T + b1      r: a residual, where there is one
                dpre = (dy w2) * f'(pre)      dx = dpre w1      dw1 = dpre^T x      dw2 = dy^T h      db1, db2 alike      dr = dy

    x, dx             [M, K]     bf16 | fp16 | fp32 | fp64     any strides, M the product of x's leading dimensions
    w, dw             [N, K]     like x, any strides
    b, db             [N]        like x
    y, dy, pre        [M, N]     like x; dy of any strides
    r, dr             [M, L]     any of the dtypes; y has the wider of x's and its own

Products that gain from an epilogue are kernels of gemm.py: pre with its activation, in mlp dy w2 with the derivative, out of
which db1 comes too, and h w2^T with a residual. All others are torch's, by cuBLAS. The derivative of a linear layer of its own,
and db2, are passes over memory: a program of `_activation_backward_kernel` owns a chunk of rows of COLUMNS columns and sums its
part of db on the way. Where dy is wider than x, as a sum with fp32 residuals is, that pass rounds it for the products too.

Under autocast mlp's weights and biases keep their own dtype outside: weights are rounded for the products, biases are not, and
gradients come in that dtype from the products' fp32 sums.

The backward pass has x, pre and in mlp h kept for it; h was written anyway, for the second product. Making it again would
save 2 M N bytes and cost 4 M N of traffic: 201 MB against 134 us for each layer of GPT-2 at 32 x 1024 tokens on an H100. ReLU
keeps h or y alone, whose sign is pre's.

Predicted by the roofline at 798 TFLOP/s and 3.0 TB/s for M = 32768, K = 768, N = 3072 in bf16, where a product is 194 us:

    with an activation        operands, pre and y are 153 us of traffic, 78% of the product's time and under it; an activation
                              after cuBLAS is 134 us more. At 60% of cuBLAS's rate the two are equal.
    dy w2 with its derivative a derivative of its own is 201 us after a product of 194, so half of cuBLAS's rate is enough; db1
                              of its own reads dpre again, 67 us
    h w2^T with a residual    operands, r and y in fp32 are 135 us of traffic under the product; a sum of its own is 84 us more.
                              At 70% of cuBLAS's rate the two are equal.
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
from .gemm import gemm_activation, gemm_gradient, gemm_residual, through_activation

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
    ACTIVATION: tl.constexpr, WRITES: tl.constexpr, HAS_SUMS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
        offsets = rows[:, None] * N + cols[None, :]
        if ACTIVATION is not None:
            pre = tl.load(pre_ptr + offsets, mask=mask, other=0.0)
            dpre = through_activation(dpre, pre.to(ACC), ACTIVATION)
        if WRITES:
            tl.store(dpre_ptr + offsets, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        sums += dpre
    if HAS_SUMS:
        tl.store(partial_ptr + chunk * N + cols, tl.sum(sums, axis=0), mask=cols < N)


def _fake_activation_backward(dy, pre, activation, dtype, sums):
    return dy.new_empty(dy.shape if dtype else 0, dtype=dtype), dy.new_empty(dy.shape[1] if sums else 0, dtype=sums)


@register(
    "_activation_backward(Tensor dy, Tensor? pre, str? activation, ScalarType? dtype, ScalarType? sums) -> (Tensor, Tensor)",
    fake=_fake_activation_backward,
)
def activation_backward(
    dy: Tensor, pre: Tensor | None, activation: str | None, dtype: torch.dtype | None, sums: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """dy, pre [M, N] -> dpre [M, N], its column sums [N], each in the dtype that is asked for, or else an empty tensor."""
    M, N = dy.shape
    wide = torch.promote_types(dy.dtype, torch.float32)
    column_programs = cdiv(N, COLUMNS)
    row_tiles = cdiv(M, ROWS)
    row_programs = min(row_tiles, cdiv(PROGRAMS_PER_SM * sm_count(dy.device), column_programs))
    dpre = torch.empty((M, N) if dtype else (0,), device=dy.device, dtype=dtype or dy.dtype)
    partial = torch.empty((row_programs, N if sums else 0), device=dy.device, dtype=wide)
    launch(
        _activation_backward_kernel,
        (row_programs, column_programs),
        dy, pre, dpre, partial, M, N, cdiv(row_tiles, max(row_programs, 1)) * ROWS, *dy.stride(),
        ACTIVATION=activation, WRITES=dtype is not None, HAS_SUMS=sums is not None,
        ACC=tl.float64 if wide == torch.float64 else tl.float32, BLOCK_M=ROWS, BLOCK_N=COLUMNS, num_warps=4,
    )  # fmt: skip
    total = dy.new_empty(partial.shape[1], dtype=sums)
    column_sums(partial, total)
    return dpre, total


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
        dpre, dbias = activation_backward(dy, pre, ctx.activation, dy.dtype, dy.dtype if wants_bias else None)
        dx = dpre @ weight if wants_x else None
        dweight = dpre.t() @ x if wants_weight else None
        return dx, dweight, dbias if wants_bias else None, None


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, residual, activation):
        ctx.activation, ctx.dtypes = activation, [None if t is None else t.dtype for t in (w1, b1, w2, b2, residual)]
        w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
        h, pre = gemm_activation(x, w1.t(), b1, activation, activation != "relu")
        ctx.save_for_backward(x, w1, w2, h, h if activation == "relu" else pre)
        return _second_layer(h, w2, b2, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, w1, w2, h, pre = ctx.saved_tensors
        wants_x, wants_w1, wants_b1, wants_w2, wants_b2, wants_residual = ctx.needs_input_grad[:6]
        of_w1, of_b1, of_w2, of_b2, of_residual = ctx.dtypes
        dx = dw1 = db1 = dw2 = db2 = None
        dy, narrower = dout, None if dout.dtype == x.dtype else x.dtype
        if wants_b2 or narrower:
            rounded, db2 = activation_backward(dout, None, None, narrower, of_b2 if wants_b2 else None)
            dy = rounded if narrower else dout
        if wants_w2:
            dw2 = _summed(dy.t(), h, of_w2)
        if wants_x or wants_w1 or wants_b1:
            dpre, db1 = gemm_gradient(dy, w2, pre, ctx.activation, of_b1 if wants_b1 else None)
        if wants_x:
            dx = dpre @ w1
        if wants_w1:
            dw1 = _summed(dpre.t(), x, of_w1)
        dresidual = dout.to(of_residual) if wants_residual else None
        return dx, dw1, db1 if wants_b1 else None, dw2, db2 if wants_b2 else None, dresidual, None


def _second_layer(h: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """residual + h weight^T + bias; in one kernel where a large tile in 16 bits is left for every multiprocessor."""
    tiles = cdiv(h.shape[0], 128) * cdiv(weight.shape[0], 128)
    in_16_bits = h.itemsize == 2 and residual is not None and residual.dtype != torch.float64
    if residual is not None and in_16_bits and tiles >= sm_count(h.device):
        total = residual.to(torch.promote_types(h.dtype, residual.dtype)).contiguous()
        return gemm_residual(h, weight.t(), bias, total)
    y = F.linear(h, weight, None if bias is None else bias.to(h.dtype))
    return y if residual is None else residual + y


def _summed(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`; from fp32 sums where it is wider than 16-bit operands."""
    if a.dtype == dtype or not a.is_cuda:
        return (a @ b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


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
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu_tanh",
    residual: Tensor | None = None,
) -> Tensor:
    """residual + linear(linear(x, w1, b1, activation), w2, b2): the two layers of a transformer's feed-forward part.

    x [..., K], w1 [N, K], b1 [N], w2 [L, N], b2 [L], residual [..., L] of any of the dtypes or None -> [..., L], in the wider
    dtype of x and residual. Strides and autocast as in `linear`; under autocast biases aren't rounded, nor are the gradients of
    w1 and w2.
    """
    check_device("mlp", x=x, w1=w1, b1=b1, w2=w2, b2=b2, residual=residual)
    check_float("mlp", x=x, w1=w1, b1=b1, w2=w2, b2=b2, residual=residual)
    (x,) = _autocast(x)
    check(activation in ACTIVATIONS, f"mlp: activation must be one of {ACTIVATIONS}, got {activation!r}")
    check(x.dim() > 0, "mlp: x must be [..., K], got a scalar")
    _check_layer("mlp", x.shape[-1], x.dtype, w1=w1, b1=b1)
    _check_layer("mlp", w1.shape[0], x.dtype, w2=w2, b2=b2)
    rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], w2.shape[0])
    if residual is not None:
        fits = residual.shape == shape
        check(fits, f"mlp: residual must be {list(shape)}, got {list(residual.shape)}")
        residual = residual.reshape(-1, shape[-1])
    if _differentiable(x, w1, b1, w2, b2, residual):
        y = _MLP.apply(rows, w1, b1, w2, b2, residual, activation)
    else:
        h, _ = gemm_activation(rows, w1.to(x.dtype).t(), b1, activation, False)
        y = _second_layer(h, w2.to(x.dtype), b2, residual)
    return y.view(shape)


def _autocast(*tensors: Tensor | None) -> list:
    """Under autocast, its dtype for all but float64, which torch's own autocast leaves alone too."""
    return [None if t is None else t.to(_under_autocast(t)) for t in tensors]


def _under_autocast(x: Tensor) -> torch.dtype:
    """The dtype that x has, or would be cast to."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check_layer(op: str, width: int, dtype: torch.dtype, **parameters: Tensor | None) -> None:
    """A weight [N, width] and a bias [N] or None, in this order, of x's dtype, or cast to it by autocast."""
    (weight_name, weight), (bias_name, bias) = parameters.items()
    assert weight is not None
    shape = tuple(weight.shape)
    fits = len(shape) == 2 and shape[1] == width and min(shape) > 0
    check(fits, f"{op}: {weight_name} must be [N, {width}], both positive, got {list(shape)}")
    check(_under_autocast(weight) == dtype, f"{op}: {weight_name} must have x's dtype {dtype}, got {weight.dtype}")
    if bias is not None:
        check(bias.shape == shape[:1], f"{op}: {bias_name} must be [{shape[0]}], got {list(bias.shape)}")
        check(_under_autocast(bias) == dtype, f"{op}: {bias_name} must have x's dtype {dtype}, got {bias.dtype}")
