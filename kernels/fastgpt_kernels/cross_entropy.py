"""Cross-entropy over the vocabulary, and the same fused behind the head's projection.

    loss[n]    = lse - (1 - e) * logits[n, t[n]] - e * mean(logits[n]) + z * lse^2     0 where t[n] is ignore_index
    lse        = logsumexp(logits[n])          e: label_smoothing, z: z_loss

    logits, dlogits   [N, V]   bf16 | fp16 | fp32 | fp64   N = batch * time, V = vocabulary, 50257 unpadded for GPT-2
    targets t         [N]      int64
    loss              [N]      fp32 (fp64 for fp64)        then summed or averaged
    x, dx             [N, C]   weight, dweight [V, C], bias, dbias [V]      linear_cross_entropy alone

The kernel of a row, its loss and its gradient, is in _cross_entropy_rows.py.

`linear_cross_entropy` sends rows through cuBLAS in a few large chunks, lets the kernel turn each chunk of logits into its
gradient in place, and multiplies that on into dx and an fp32 dweight before the next: 6 * N * V * C FLOP, and no [N, V] tensor
is kept. https://github.com/linkedin/Liger-Kernel has the idea; few large chunks keep the GEMMs at full speed.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._cross_entropy_rows import accumulator, launch_rows, launch_scale, vector
from ._launch import cdiv, check, check_device, check_float, register, sm_count

# The most that one chunk of logits in linear_cross_entropy takes, of the whole memory and at all. Each chunk reads and writes the
# fp32 dweight once, 8 * V * C bytes against 6 * rows * V * C FLOP: on an H100 that costs 311 / rows of the GEMMs' time, 2% at the
# 16384 rows of GPT-2's that 2 GiB hold. A share of what there is, not of what is free: the same run gives the same bits.
CHUNK_BYTES = 2 * 1024**3
CHUNK_SHARE = 1 / 40
CHUNK_MULTIPLE = 128  # rows of a cuBLAS tile
TILE_COLUMNS = 256  # and its columns

REDUCTIONS = ("mean", "sum", "none")


@functools.cache
def _chunk_bytes(device: torch.device) -> int:
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    return int(min(CHUNK_BYTES, memory * CHUNK_SHARE))


def _rows_per_chunk(N: int, V: int, C: int, dtype: torch.dtype, device: torch.device) -> int:
    """Chunks of equal size, of whole tiles, of at most about `_chunk_bytes`; as many as make the fewest waves of dx's tiles."""
    most = max(_chunk_bytes(device) // (V * dtype.itemsize), CHUNK_MULTIPLE)
    tiles, columns = cdiv(N, CHUNK_MULTIPLE), cdiv(C, TILE_COLUMNS)

    def waves(chunks: int) -> int:
        full, rest = divmod(tiles, cdiv(tiles, chunks))
        height = cdiv(tiles, chunks)
        return sum(cdiv(t * columns, sm_count(device)) for t in (*[height] * full, rest))

    fewest = cdiv(N, most)
    chunks = min(range(fewest, min(fewest + 3, tiles) + 1), key=waves, default=1)
    return min(cdiv(tiles, chunks) * CHUNK_MULTIPLE, N)


def _rows(logits: Tensor) -> Tensor:
    """logits with a unit inner stride and rows that don't overlap; a copy only where they are otherwise."""
    N, V = logits.shape
    if (V == 1 or logits.stride(1) == 1) and (N == 1 or logits.stride(0) >= V):
        return logits
    return logits.contiguous()


def _gradient_like(logits: Tensor) -> Tensor:
    """An empty [N, V] whose rows lie to 16-byte boundaries as those of logits do."""
    N, V = logits.shape
    stride = V + (logits.stride(0) - V) % vector(logits.dtype)
    return torch.empty_strided((N, V), (stride, 1), dtype=logits.dtype, device=logits.device)


def _fake_cross_entropy(logits, targets, row_scale, ignore_index, label_smoothing, z_loss, with_grad):
    loss = logits.new_empty(logits.shape[:1], dtype=accumulator(logits.dtype))
    return loss, _gradient_like(_rows(logits)) if with_grad else logits.new_empty(0)


@register(
    "_cross_entropy(Tensor logits, Tensor targets, Tensor? row_scale, int ignore_index, float label_smoothing, float z_loss,"
    " bool with_grad) -> (Tensor, Tensor)",
    _fake_cross_entropy,
)
def _cross_entropy(
    logits: Tensor, targets: Tensor, row_scale: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, with_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """logits [N, V], targets [N], row_scale [N] or [] -> loss [N], dlogits [N, V] times row_scale (empty without gradient)."""
    logits = _rows(logits)
    loss = torch.empty(logits.shape[0], dtype=accumulator(logits.dtype), device=logits.device)
    dlogits = _gradient_like(logits) if with_grad else None
    launch_rows(logits, targets, row_scale, loss, dlogits, ignore_index, label_smoothing, z_loss)
    return loss, logits.new_empty(0) if dlogits is None else dlogits


@register("_scale_(Tensor(a!) x, Tensor scale) -> ()", lambda x, scale: None)
def _scale_(x: Tensor, scale: Tensor) -> None:
    """x *= scale, x [N, V] from `_cross_entropy`, scale []; nothing but a look at the scale where it is 1."""
    launch_scale(x, scale, x)
    # Triton's writes are invisible to autograd; counted, a second backward over the same buffer raises
    torch.autograd.graph.increment_version(x)


@register(
    "_scaled(Tensor x, Tensor scale, ScalarType dtype) -> Tensor",
    lambda x, scale, dtype: torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format),
)
def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x * scale in `dtype`, x contiguous of any shape, scale [], the product taken in the scale's dtype."""
    out = torch.empty_like(x, dtype=dtype)
    launch_scale(x, scale, out)
    return out


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta * total + a @ b, the sum in total's dtype throughout."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def _linear_outputs(
    x, weight, bias, targets, row_scale, ignore_index, label_smoothing, z_loss, wanted, statistics
):  # fmt: skip
    acc, rows = accumulator(x.dtype), x.shape[:1]
    outputs = [torch.empty(rows, dtype=acc, device=x.device)]
    shapes = (x.shape, x.dtype), (weight.shape, acc), (weight.shape[:1], acc), (rows, acc), (rows, torch.uint8)
    for (shape, dtype), w in zip(shapes, (*wanted, statistics, statistics), strict=True):
        outputs.append(torch.empty(shape if w else (0,), dtype=dtype, device=x.device))
    return tuple(outputs)


@register(
    "_linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor targets, Tensor? row_scale, int ignore_index, "
    "float label_smoothing, float z_loss, bool[] wanted, bool statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_outputs,
)
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, row_scale: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, wanted: list[bool], statistics: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """x [N, C] -> loss [N], dx [N, C], dweight [V, C], dbias [V], lse [N], top [N]; what isn't wanted is empty.

    All but dx are fp32, and top uint8: whether no token was more likely than the target.
    """
    losses = ignore_index, label_smoothing, z_loss
    outputs = _linear_outputs(x, weight, bias, targets, row_scale, *losses, wanted, statistics)
    loss, dx, dweight, dbias, lse, top = outputs
    want_dx, want_dweight, want_dbias = wanted
    dbias.zero_()
    N, V = x.shape[0], weight.shape[0]
    if N == 0:
        dweight.zero_()
        return outputs
    rows, elements = _rows_per_chunk(N, V, x.shape[1], x.dtype, x.device), vector(x.dtype)
    # Rows padded to 16 bytes: cuBLAS moves them at full speed although V is odd. A CPU's product in bf16 may read the padding and
    # multiply it by 0, which leaves a NaN one (https://github.com/uxlfoundation/oneDNN/issues/5717).
    make = torch.zeros if x.device.type == "cpu" else torch.empty
    buffer = make((rows, cdiv(V, elements) * elements), dtype=x.dtype, device=x.device)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        chunk, x_chunk = buffer[: stop - start, :V], x[start:stop]
        if bias is None:
            torch.mm(x_chunk, weight.t(), out=chunk)
        else:
            torch.addmm(bias, x_chunk, weight.t(), out=chunk)
        scale = row_scale[start:stop] if row_scale is not None else None
        found = (lse[start:stop], top[start:stop]) if statistics else ()
        gradient = chunk if any(wanted) else None
        launch_rows(chunk, targets[start:stop], scale, loss[start:stop], gradient, *losses, *found)
        if want_dx:
            torch.mm(chunk, weight, out=dx[start:stop])
        if want_dweight:
            _add_product(dweight, chunk.t(), x_chunk, beta=min(start, 1))
        if want_dbias:
            dbias += chunk.sum(0, dtype=dbias.dtype)
    return outputs


def _count(targets: Tensor, ignore_index: int, reduction: str) -> Tensor | None:
    """How many targets a mean divides by; it stays on the device."""
    return (targets != ignore_index).sum() if reduction == "mean" else None


def _reduced(loss: Tensor, count: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if count is None else loss.sum() / count


def _gradient_scale(count: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """1 / count, and 1 where no target counts and the gradient is 0."""
    return None if count is None else count.clamp(min=1).to(dtype).reciprocal()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, reduction, *losses):
        ctx.losses = losses
        # The gradient is finished here, while the row is in the caches, where only one number can still multiply it. Not in
        # fp16, where 1 / (N V) is 0 until the loss scale comes; not in fp64, since gradcheck walks a graph twice.
        ctx.finished = reduction != "none" and logits.dtype in (torch.bfloat16, torch.float32)
        count = _count(targets, losses[0], reduction)
        scale = _gradient_scale(count, accumulator(logits.dtype))
        loss, dlogits = _cross_entropy(logits, targets, scale if ctx.finished else None, *losses, ctx.finished)
        if ctx.finished:
            ctx.save_for_backward(dlogits)
        else:
            ctx.save_for_backward(logits, targets, scale)
        return _reduced(loss, count, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.finished:
            (dlogits,) = ctx.saved_tensors
            _scale_(dlogits, grad)
        else:
            logits, targets, scale = ctx.saved_tensors
            row_scale = grad if scale is None else grad * scale
            _, dlogits = _cross_entropy(logits, targets, row_scale, *ctx.losses, True)
        return dlogits, None, None, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets, reduction, dtype, statistics, *losses):
        inputs = x, weight, bias
        ctx.losses, ctx.dtype, ctx.finished = losses, dtype, reduction != "none"
        ctx.dtypes = [t.dtype if needed else None for t, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)]
        operands = [None if t is None else t.to(dtype) for t in inputs]
        wanted = [ctx.finished and d is not None for d in ctx.dtypes]
        loss, *gradients, lse, top = _linear_cross_entropy(*operands, targets, None, *losses, wanted, statistics)
        count = _count(targets, losses[0], reduction)
        if ctx.finished:
            # unscaled, so that fp16 loses nothing to underflow before the loss scale comes
            ctx.save_for_backward(*gradients, _gradient_scale(count, loss.dtype))
        else:
            ctx.save_for_backward(*inputs, targets)
        ctx.mark_non_differentiable(lse, top)
        return _reduced(loss, count, reduction), lse, top

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if ctx.finished:
            *unscaled, scale = ctx.saved_tensors
            scale = grad if scale is None else grad * scale
            gradients = [None if d is None else _scaled(g, scale, d) for g, d in zip(unscaled, ctx.dtypes, strict=True)]
        else:
            # every row's own factor has to be in before the rows are summed: the logits are made again
            *inputs, targets = ctx.saved_tensors
            operands = [None if t is None else t.to(ctx.dtype) for t in inputs]
            wanted = [d is not None for d in ctx.dtypes]
            _, *scaled, _, _ = _linear_cross_entropy(*operands, targets, grad, *ctx.losses, wanted, False)
            gradients = [None if d is None else g.to(d) for g, d in zip(scaled, ctx.dtypes, strict=True)]
        return *gradients, *[None] * 7


def _check(
    op: str, rows: Tensor, name: str, targets: Tensor, reduction: str, label_smoothing: float, z_loss: float
) -> None:
    check(rows.ndim == 2, f"{op}: {name} must have two dimensions, got shape {tuple(rows.shape)}")
    check(
        targets.dtype == torch.int64 and targets.shape == rows.shape[:1],
        f"{op}: targets must be int64 [{rows.shape[0]}], one for each row of {name}, "
        f"got {targets.dtype} {list(targets.shape)}",
    )
    check(reduction in REDUCTIONS, f"{op}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
    check(0.0 <= label_smoothing <= 1.0, f"{op}: label_smoothing must be from 0 to 1, got {label_smoothing}")
    check(0.0 <= z_loss < math.inf, f"{op}: z_loss must be at least 0 and finite, got {z_loss}")


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits [N, V] with targets int64 [N]. "mean" divides by the targets that aren't `ignore_index`.

    label_smoothing e makes the target's probability 1 - e + e / V and every other's e / V, as torch's does. z_loss adds so much
    of each row's logsumexp squared, which keeps it near 0 (https://arxiv.org/abs/2204.02311, section 5).

    The result is fp32 (float64 for float64 logits). As in torch, the mean over no targets is NaN. A target outside the
    vocabulary makes its row's loss and gradient NaN, since a device can't raise. The logits are never written to, and under
    autocast they are taken as they come. Logits with a column stride, or rows that overlap, are copied first.

    In bf16 and fp32 a reduced loss's gradient is finished by the forward pass, and the backward pass scales it where it
    lies: a second one over the same graph raises.
    """
    check_device("cross_entropy", logits=logits, targets=targets)
    check_float("cross_entropy", logits=logits)
    _check("cross_entropy", logits, "logits", targets, reduction, label_smoothing, z_loss)
    check(logits.shape[1] > 0 or logits.shape[0] == 0, f"cross_entropy: logits has no columns, {list(logits.shape)}")
    losses = ignore_index, float(label_smoothing), float(z_loss)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropy.apply(logits, targets, reduction, *losses)
    loss, _ = _cross_entropy(logits, targets, None, *losses, False)
    return _reduced(loss, _count(targets, ignore_index, reduction), reduction)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """cross_entropy(x @ weight.T + bias, targets, ...). x [N, C], weight [V, C], bias [V], targets int64 [N].

    Keeps at most 2 GiB of logits at a time, and a fortieth of the device's memory, whatever N. Where a gradient is needed the
    forward pass computes it, except with reduction "none", whose backward pass makes the logits again. Under autocast x, weight
    and bias are cast to its dtype, and the gradients of fp32 parameters stay fp32 throughout.
    """
    return _linear(x, weight, targets, bias, ignore_index, reduction, label_smoothing, z_loss, False)[0]


def linear_cross_entropy_with_statistics(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(linear_cross_entropy(...), logsumexp [N] in fp32, whether no token was more likely than the target [N]).

    The latter two have no gradient; they are 0 and False where the target is `ignore_index`.
    """
    return _linear(x, weight, targets, bias, ignore_index, reduction, label_smoothing, z_loss, True)


def _linear(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
    ignore_index: int, reduction: str, label_smoothing: float, z_loss: float, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_device("linear_cross_entropy", x=x, weight=weight, targets=targets, bias=bias)
    check_float("linear_cross_entropy", x=x, weight=weight, bias=bias)
    _check("linear_cross_entropy", x, "x", targets, reduction, label_smoothing, z_loss)
    V = weight.shape[0]
    check(
        weight.ndim == 2 and V > 0 and weight.shape[1] == x.shape[1],
        f"linear_cross_entropy: weight must be [V, {x.shape[1]}] for x {list(x.shape)}, got {list(weight.shape)}",
    )
    check(
        bias is None or bias.shape == (V,),
        f"linear_cross_entropy: bias must be [{V}], got {None if bias is None else list(bias.shape)}",
    )
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    dtype = x.dtype
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and torch.float64 not in dtypes:
        dtype = torch.get_autocast_dtype(x.device.type)
    else:
        check(
            len(dtypes) == 1,
            f"linear_cross_entropy: x, weight and bias must share a dtype, got {sorted(map(str, dtypes))}",
        )
    losses = ignore_index, float(label_smoothing), float(z_loss)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        loss, lse, top = _LinearCrossEntropy.apply(x, weight, bias, targets, reduction, dtype, statistics, *losses)
        return loss, lse, top.view(torch.bool)
    operands = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    loss, *_, lse, top = _linear_cross_entropy(*operands, targets, None, *losses, [False] * 3, statistics)
    return _reduced(loss, _count(targets, ignore_index, reduction), reduction), lse, top.view(torch.bool)
