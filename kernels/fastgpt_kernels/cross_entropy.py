"""Cross-entropy over the vocabulary, and the same fused behind the head's projection.

    loss[n]    = logsumexp(logits[n]) - logits[n, t[n]]              0 where t[n] is ignore_index
    dlogits[n] = (softmax(logits[n]) - onehot(t[n])) * scale[n]

    logits, dlogits   [N, V]   bf16 | fp16 | fp32 | fp64   N = batch * time, V = vocabulary, 50257 unpadded for GPT-2
    targets t         [N]      int64
    loss              [N]      fp32 (fp64 for fp64)        then summed or averaged
    x, dx             [N, C]   weight, dweight [V, C], bias, dbias [V]      linear_cross_entropy alone

One program owns one row. Each lane walks the row with 16-byte loads and keeps its own running maximum and sum (the online
softmax of https://arxiv.org/abs/1805.02867); the lanes meet once at the row's end. A second walk, served by the caches, writes
the gradient. 50257 is odd, so 16-bit rows start at any of eight offsets from a 16-byte boundary: the up to VEC - 1 elements
before the first boundary and after the last are the lanes' initial state, and everything between is whole vectors.

Bound by memory: with the gradient 2 * N * V * itemsize bytes (logits in, dlogits out), 1.65 GB or 0.55 ms at 3.0 TB/s for 8192
rows in bf16; without, half of that.

`linear_cross_entropy` sends rows through cuBLAS in chunks of half a gigabyte of logits, lets the kernel turn each chunk into
its gradient in place, and multiplies that on into dx and an fp32 dweight before the next: 6 * N * V * C FLOP, and no [N, V]
tensor is kept. https://github.com/linkedin/Liger-Kernel has the idea; few large chunks keep the GEMMs at full speed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import check, check_device, check_float, launch, register, sm_count

# With the gradient a row is read twice, and the second time should hit the L2: 32 warps of at most 32 registers run two rows
# an SM, which for GPT-2's 100 kB rows of 16-bit logits are 27 MB of an H100's 50. Rows beyond 128 kB (fp32) get four vectors
# a thread, whose 64 registers leave one row an SM: the same bytes. Two rows of 1024 16-byte loads are 32 kB in flight an SM,
# above the 20 kB that an H100 needs (25 B/ns an SM over 0.8 us).
MAX_LANES = 1024
MAX_LANES_WIDE = 4096
WIDE_ROW_BYTES = 128 * 1024

# One chunk of logits in linear_cross_entropy. Each chunk reads and writes the fp32 dweight once, 8 * V * C bytes against
# 6 * rows * V * C FLOP: on an H100 that costs 311 / rows of the GEMMs' time, 6% at the 5341 rows of this size.
CHUNK_BYTES = 512 * 1024**2
CHUNK_MULTIPLE = 128  # rows of a cuBLAS tile

REDUCTIONS = ("mean", "sum", "none")


def _vector(dtype: torch.dtype) -> int:
    """Elements of one 16-byte load."""
    return 16 // dtype.itemsize


def _lanes_and_warps(V: int, dtype: torch.dtype, with_grad: bool) -> tuple[int, int]:
    """A short row in one step, a long one at full width; never fewer lanes than a row's two unaligned ends need."""
    limit = MAX_LANES_WIDE if with_grad and V * dtype.itemsize > WIDE_ROW_BYTES else MAX_LANES
    vector = _vector(dtype)
    lanes = min(max(triton.next_power_of_2(triton.cdiv(V, vector)), 2 * vector), limit)
    return lanes, min(max(lanes // 32, 1), 32)


def _rows_per_chunk(N: int, V: int, dtype: torch.dtype) -> int:
    """Chunks of equal size, of whole tiles, of at most about CHUNK_BYTES."""
    most = max(CHUNK_BYTES // (V * dtype.itemsize), CHUNK_MULTIPLE)
    rows = triton.cdiv(N, triton.cdiv(N, most))
    return min(triton.cdiv(rows, CHUNK_MULTIPLE) * CHUNK_MULTIPLE, N)


@triton.jit
def _exp(x):
    # a third of tl.exp's instructions, which keep results below 2^-126
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _online_softmax(m, l, x):
    """Take x [LANES, VEC] into the running maximum m and the sum l of exp(x - m), both [LANES]."""
    m_new = tl.maximum(m, tl.max(x, axis=1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, l * _exp(m - m_safe) + tl.sum(_exp(x - m_safe[:, None]), axis=1)


# alignment is worked out per row, so one binary serves every size and stride
@triton.jit(
    do_not_specialize=["V", "ignore_index", "stride_logits", "stride_targets", "stride_scale", "stride_dlogits"]
)
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, scale_ptr, loss_ptr, dlogits_ptr,
    V, ignore_index,
    stride_logits, stride_targets, stride_scale, stride_dlogits,
    ACC: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, HAS_SCALE: tl.constexpr, WITH_GRAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row * stride_targets)
    used = target != ignore_index
    in_range = (target >= 0) & (target < V)
    # [first, body) and what is left after body + n_body are the unaligned ends, shorter than VEC each
    first = row * stride_logits
    body = (first + (VEC - 1)) // VEC * VEC
    head = tl.minimum(body - first, V).to(tl.int32)
    n_body = (V - head) // VEC * VEC

    lane = tl.arange(0, LANES)
    cols = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
    end_cols = tl.where(lane < VEC, lane, head + n_body + lane - VEC)
    end_mask = tl.where(lane < VEC, lane < head, end_cols < V)
    x_end = tl.load(logits_ptr + first + end_cols, mask=end_mask & used, other=float("-inf")).to(ACC)
    x_target = tl.load(logits_ptr + first + target, mask=used & in_range, other=0.0).to(ACC)
    m = x_end
    l = _exp(x_end - tl.where(x_end == float("-inf"), 0.0, x_end))
    for start in range(0, n_body, LANES * VEC):
        mask = (start + cols < n_body) & used
        x = tl.load(logits_ptr + body + start + cols, mask, float("-inf"), eviction_policy="evict_last").to(ACC)
        m, l = _online_softmax(m, l, x)

    m_row = tl.max(m, axis=0)
    m_row = tl.where(m_row == float("-inf"), 0.0, m_row)
    l_row = tl.where(used, tl.sum(l * _exp(m - m_row), axis=0), 1.0)
    loss = tl.log(l_row) - (x_target - m_row)
    loss = tl.where(in_range, loss, float("nan"))
    tl.store(loss_ptr + row, tl.where(used, loss, 0.0))

    if WITH_GRAD:
        scale = tl.load(scale_ptr + row * stride_scale).to(ACC) if HAS_SCALE else tl.full((), 1.0, ACC)
        scale = tl.where(in_range, scale, float("nan"))
        # an ignored row reads as -inf throughout: finite factors make its gradient exactly 0
        factor = tl.where(used, scale / l_row, 0.0)
        own_first = row * stride_dlogits
        own_body = (own_first + (VEC - 1)) // VEC * VEC
        for start in range(0, n_body, LANES * VEC):
            in_row = start + cols < n_body
            x = tl.load(logits_ptr + body + start + cols, in_row & used, float("-inf"), eviction_policy="evict_first")
            tl.store(dlogits_ptr + own_body + start + cols, _exp(x.to(ACC) - m_row) * factor, mask=in_row)
        dx_end = _exp(x_end - m_row) * factor
        tl.store(dlogits_ptr + own_first + end_cols, dx_end, mask=end_mask)
        # the target's own element again, after everyone's store: cheaper than a comparison for each of V
        tl.debug_barrier()
        dx_target = _exp(x_target - m_row) * factor - scale
        tl.store(dlogits_ptr + own_first + target, dx_target, mask=used & in_range)


@triton.jit(do_not_specialize=["n"])
def _scale_kernel(x_ptr, scale_ptr, out_ptr, n, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    scale = tl.load(scale_ptr)
    # loss.backward() comes with 1: then a gradient that stays where it is needs no pass
    if (scale != 1.0) | (not IN_PLACE):
        n_body = n // VEC * VEC
        offsets = tl.arange(0, BLOCK)
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, n_body, tl.num_programs(0).to(tl.int64) * BLOCK):
            mask = start + offsets < n_body
            x = tl.load(x_ptr + start + offsets, mask=mask).to(scale.dtype)
            tl.store(out_ptr + start + offsets, x * scale, mask=mask)
        if tl.program_id(0) == 0:
            rest = n_body + tl.arange(0, VEC)
            x = tl.load(x_ptr + rest, mask=rest < n).to(scale.dtype)
            tl.store(out_ptr + rest, x * scale, mask=rest < n)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _launch_rows(
    logits: Tensor, targets: Tensor, row_scale: Tensor | None, loss: Tensor, dlogits: Tensor | None, ignore_index: int
) -> None:
    """logits [N, V] -> loss [N], dlogits [N, V], which may be logits itself; row_scale is [N] or one number for all rows."""
    N, V = logits.shape
    lanes, num_warps = _lanes_and_warps(V, logits.dtype, dlogits is not None)
    launch(
        _cross_entropy_kernel, (N,), logits, targets, row_scale, loss, dlogits,
        V, ignore_index,
        logits.stride(0), targets.stride(0), row_scale.stride(0) if row_scale is not None and row_scale.ndim else 0,
        0 if dlogits is None else dlogits.stride(0),
        ACC=tl.float64 if loss.dtype == torch.float64 else tl.float32, LANES=lanes, VEC=_vector(logits.dtype),
        HAS_SCALE=row_scale is not None, WITH_GRAD=dlogits is not None, num_warps=num_warps,
    )  # fmt: skip


def _rows(logits: Tensor) -> Tensor:
    """logits with a unit inner stride and rows that don't overlap; a copy only where they are otherwise."""
    N, V = logits.shape
    if (V == 1 or logits.stride(1) == 1) and (N == 1 or logits.stride(0) >= V):
        return logits
    return logits.contiguous()


def _gradient_like(logits: Tensor) -> Tensor:
    """An empty [N, V] whose rows lie to 16-byte boundaries as those of logits do."""
    N, V = logits.shape
    stride = V + (logits.stride(0) - V) % _vector(logits.dtype)
    return torch.empty_strided((N, V), (stride, 1), dtype=logits.dtype, device=logits.device)


def _fake_cross_entropy(logits, targets, row_scale, ignore_index, with_grad):
    loss = logits.new_empty(logits.shape[:1], dtype=_accumulator(logits.dtype))
    return loss, _gradient_like(_rows(logits)) if with_grad else logits.new_empty(0)


@register(
    "_cross_entropy(Tensor logits, Tensor targets, Tensor? row_scale, int ignore_index, bool with_grad) -> (Tensor, Tensor)",
    _fake_cross_entropy,
)
def _cross_entropy(
    logits: Tensor, targets: Tensor, row_scale: Tensor | None, ignore_index: int, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """logits [N, V], targets [N], row_scale [N] or [] -> loss [N], dlogits [N, V] times row_scale (empty without gradient)."""
    logits = _rows(logits)
    loss = torch.empty(logits.shape[0], dtype=_accumulator(logits.dtype), device=logits.device)
    dlogits = _gradient_like(logits) if with_grad else None
    _launch_rows(logits, targets, row_scale, loss, dlogits, ignore_index)
    return loss, logits.new_empty(0) if dlogits is None else dlogits


def _launch_scale(x: Tensor, scale: Tensor, out: Tensor) -> None:
    # rows may be a few elements apart; what lies between them belongs to the same storage
    n = x.numel() if x.is_contiguous() else (x.shape[0] - 1) * x.stride(0) + x.shape[1]
    block = 1024 * _vector(x.dtype)
    # persistent, so that finding a scale of 1 costs a launch and not a grid of N * V / block empty programs
    programs = min(triton.cdiv(n, block), 8 * sm_count(x.device))
    launch(
        _scale_kernel, (programs,), x, scale, out, n, IN_PLACE=out is x, BLOCK=block, VEC=_vector(x.dtype), num_warps=8
    )


@register("_scale_(Tensor(a!) x, Tensor scale) -> ()", lambda x, scale: None)
def _scale_(x: Tensor, scale: Tensor) -> None:
    """x *= scale, x [N, V] from `_cross_entropy`, scale []; nothing but a look at the scale where it is 1."""
    _launch_scale(x, scale, x)
    # Triton's writes are invisible to autograd; counted, a second backward over the same buffer raises
    torch.autograd.graph.increment_version(x)


@register(
    "_scaled(Tensor x, Tensor scale, ScalarType dtype) -> Tensor",
    lambda x, scale, dtype: torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format),
)
def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x * scale in `dtype`, x contiguous of any shape, scale [], the product taken in the scale's dtype."""
    out = torch.empty_like(x, dtype=dtype)
    _launch_scale(x, scale, out)
    return out


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta * total + a @ b, the sum in total's dtype throughout."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def _linear_outputs(x, weight, bias, targets, row_scale, ignore_index, wanted):
    acc = _accumulator(x.dtype)
    outputs = [torch.empty(x.shape[:1], dtype=acc, device=x.device)]
    shapes = (x.shape, x.dtype), (weight.shape, acc), (weight.shape[:1], acc)
    for (shape, dtype), w in zip(shapes, wanted, strict=True):
        outputs.append(torch.empty(shape if w else (0,), dtype=dtype, device=x.device))
    return tuple(outputs)


@register(
    "_linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor targets, Tensor? row_scale, int ignore_index, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _linear_outputs,
)
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, row_scale: Tensor | None,
    ignore_index: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x [N, C] -> loss [N], dx [N, C], dweight [V, C], dbias [V]: all but dx in fp32, a gradient empty where not wanted."""
    loss, dx, dweight, dbias = _linear_outputs(x, weight, bias, targets, row_scale, ignore_index, wanted)
    want_dx, want_dweight, want_dbias = wanted
    dbias.zero_()
    N, V = x.shape[0], weight.shape[0]
    if N == 0:
        return loss, dx, dweight.zero_(), dbias
    rows, vector = _rows_per_chunk(N, V, x.dtype), _vector(x.dtype)
    # rows padded to 16 bytes: cuBLAS moves them at full speed although V is odd
    buffer = torch.empty((rows, triton.cdiv(V, vector) * vector), dtype=x.dtype, device=x.device)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        chunk, x_chunk = buffer[: stop - start, :V], x[start:stop]
        if bias is None:
            torch.mm(x_chunk, weight.t(), out=chunk)
        else:
            torch.addmm(bias, x_chunk, weight.t(), out=chunk)
        scale = row_scale[start:stop] if row_scale is not None else None
        _launch_rows(chunk, targets[start:stop], scale, loss[start:stop], chunk if any(wanted) else None, ignore_index)
        if want_dx:
            torch.mm(chunk, weight, out=dx[start:stop])
        if want_dweight:
            _add_product(dweight, chunk.t(), x_chunk, beta=min(start, 1))
        if want_dbias:
            dbias += chunk.sum(0, dtype=dbias.dtype)
    return loss, dx, dweight, dbias


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
    def forward(ctx, logits, targets, ignore_index, reduction):
        ctx.ignore_index = ignore_index
        # The gradient is finished here, while the row is in the caches, where only one number can still multiply it. Not in
        # fp16, where 1 / (N V) is 0 until the loss scale comes; not in fp64, since gradcheck walks a graph twice.
        ctx.finished = reduction != "none" and logits.dtype in (torch.bfloat16, torch.float32)
        count = _count(targets, ignore_index, reduction)
        scale = _gradient_scale(count, _accumulator(logits.dtype))
        loss, dlogits = _cross_entropy(logits, targets, scale if ctx.finished else None, ignore_index, ctx.finished)
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
            _, dlogits = _cross_entropy(logits, targets, row_scale, ctx.ignore_index, True)
        return dlogits, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets, ignore_index, reduction, dtype):
        inputs = x, weight, bias
        ctx.ignore_index, ctx.dtype, ctx.finished = ignore_index, dtype, reduction != "none"
        ctx.dtypes = [t.dtype if needed else None for t, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)]
        operands = [None if t is None else t.to(dtype) for t in inputs]
        wanted = [ctx.finished and d is not None for d in ctx.dtypes]
        loss, *gradients = _linear_cross_entropy(*operands, targets, None, ignore_index, wanted)
        count = _count(targets, ignore_index, reduction)
        if ctx.finished:
            # unscaled, so that fp16 loses nothing to underflow before the loss scale comes
            ctx.save_for_backward(*gradients, _gradient_scale(count, loss.dtype))
        else:
            ctx.save_for_backward(*inputs, targets)
        return _reduced(loss, count, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.finished:
            *unscaled, scale = ctx.saved_tensors
            scale = grad if scale is None else grad * scale
            gradients = [None if d is None else _scaled(g, scale, d) for g, d in zip(unscaled, ctx.dtypes, strict=True)]
        else:
            # every row's own factor has to be in before the rows are summed: the logits are made again
            *inputs, targets = ctx.saved_tensors
            operands = [None if t is None else t.to(ctx.dtype) for t in inputs]
            wanted = [d is not None for d in ctx.dtypes]
            _, *scaled = _linear_cross_entropy(*operands, targets, grad, ctx.ignore_index, wanted)
            gradients = [None if d is None else g.to(d) for g, d in zip(scaled, ctx.dtypes, strict=True)]
        return *gradients, None, None, None, None


def _check_targets(op: str, rows: Tensor, name: str, targets: Tensor, reduction: str) -> None:
    check(rows.ndim == 2, f"{op}: {name} must have two dimensions, got shape {tuple(rows.shape)}")
    check(
        targets.dtype == torch.int64 and targets.shape == rows.shape[:1],
        f"{op}: targets must be int64 [{rows.shape[0]}], one for each row of {name}, "
        f"got {targets.dtype} {list(targets.shape)}",
    )
    check(reduction in REDUCTIONS, f"{op}: reduction must be one of {REDUCTIONS}, got {reduction!r}")


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """Cross-entropy of logits [N, V] with targets int64 [N]. "mean" divides by the targets that aren't `ignore_index`.

    The result is fp32 (float64 for float64 logits). As in torch, the mean over no targets is NaN. A target outside the
    vocabulary makes its row's loss and gradient NaN, since a device can't raise. The logits are never written to, and under
    autocast they are taken as they come. Logits with a column stride, or rows that overlap, are copied first.

    In bf16 and fp32 a reduced loss's gradient is finished by the forward pass, and the backward pass scales it where it
    lies: a second one over the same graph raises.
    """
    check_device("cross_entropy", logits=logits, targets=targets)
    check_float("cross_entropy", logits=logits)
    _check_targets("cross_entropy", logits, "logits", targets, reduction)
    check(logits.shape[1] > 0 or logits.shape[0] == 0, f"cross_entropy: logits has no columns, {list(logits.shape)}")
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropy.apply(logits, targets, ignore_index, reduction)
    loss, _ = _cross_entropy(logits, targets, None, ignore_index, False)
    return _reduced(loss, _count(targets, ignore_index, reduction), reduction)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(x @ weight.T + bias, targets). x [N, C], weight [V, C], bias [V], targets int64 [N].

    Keeps at most half a gigabyte of logits at a time, whatever N. Where a gradient is needed the forward pass computes it,
    except with reduction "none", whose backward pass makes the logits again. Under autocast x, weight and bias are cast to
    its dtype, and the gradients of fp32 parameters stay fp32 throughout.
    """
    check_device("linear_cross_entropy", x=x, weight=weight, targets=targets, bias=bias)
    check_float("linear_cross_entropy", x=x, weight=weight, bias=bias)
    _check_targets("linear_cross_entropy", x, "x", targets, reduction)
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
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _LinearCrossEntropy.apply(x, weight, bias, targets, ignore_index, reduction, dtype)
    operands = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    loss, *_ = _linear_cross_entropy(*operands, targets, None, ignore_index, [False] * 3)
    return _reduced(loss, _count(targets, ignore_index, reduction), reduction)
