"""Head tiles: rows of an attention head of any size D as one tile of BLOCK_D columns or two, the second of BLOCK_E.

Triton's tiles are powers of two. Padding a head of 80 columns to 128 would cost 1.6 times its products, shared memory and
registers, so where two tiles waste less (80 = 64 + 16, 96 = 64 + 32) a head tile is the tuple of them, and otherwise of one.
Of two ptxas spills in fp64 and in narrow TF32, which have one, and behind 128 columns where the second has fewer than 64.
https://github.com/ROCm/aiter/issues/3858 found the split ahead of padding.

Where products are asynchronous (Hopper, B200), the tiles that a loop walks over are boxes of tensor descriptors: the memory
accelerator fetches them, and so no address is computed for them and no fence is wanted between a copy and a product, which
Triton 3.6 leaves out (https://github.com/triton-lang/triton/pull/9610). Elsewhere they are read by pointers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._launch import arch, asynchronous, next_power_of_2, tf32


def ieee(dtype: torch.dtype) -> bool:
    """Whether products are computed in full precision, rather than in 16 bits or tf32."""
    return dtype == torch.float64 or (dtype == torch.float32 and not tf32(dtype))


def head_constants(q: Tensor) -> dict[str, Any]:
    """D, BLOCK_D, BLOCK_E and how products are computed, for kernels that take heads of q's size and dtype."""
    size = q.shape[-1]
    first = max(16, 1 << (size.bit_length() - 1))
    second = max(64 if size > 128 else 16, next_power_of_2(size - first)) if size > first else 0
    tf32_narrow = q.dtype == torch.float32 and not ieee(q.dtype) and size < 64
    if size > first and (q.dtype == torch.float64 or tf32_narrow):
        second = first  # one block of twice the width: of two, ptxas spills the backward's
    return {
        "D": size,
        "BLOCK_D": first if second < first else 2 * first,
        "BLOCK_E": second % first,
        "PRECISION": "ieee" if ieee(q.dtype) else "tf32",
        "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
    }


def unit_last(x: Tensor) -> Tensor:
    """x, copied if its last stride isn't 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def walked(rows: int, head: dict[str, Any], *heads: Tensor) -> tuple[list[Tensor], list[TensorDescriptor | None]]:
    """(heads, box and rest of each for `next_head`): heads [B, H, T, D] that a loop walks over, `rows` at a time.

    The heads are those given, whose last stride is 1, or what had to be copied of them: rows padded to 16 bytes. Boxes are None
    where tiles are read by pointers.
    """
    if not asynchronous(arch(heads[0].device), heads[0].dtype) or any(x.numel() == 0 for x in heads):
        return list(heads), [None] * (2 * len(heads))
    described = [_describable(x) for x in heads]
    return described, [box for x in described for box in _boxes(x, rows, head)]


def _describable(x: Tensor) -> Tensor:
    step = 16 // x.itemsize
    strides = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    if x.data_ptr() % 16 == 0 and all(stride > 0 and stride % step == 0 for stride in strides):
        return x
    return F.pad(x, (0, -x.shape[3] % step))[..., : x.shape[3]]


def _boxes(x: Tensor, rows: int, head: dict[str, Any]) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Boxes of `rows` by BLOCK_D, and by BLOCK_E or None."""
    step = 16 // x.itemsize
    strides = [stride if size > 1 else step for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)]

    def described(width: int) -> TensorDescriptor:
        return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, width])

    return described(head["BLOCK_D"]), described(head["BLOCK_E"]) if head["BLOCK_E"] else None


@triton.jit
def _load_part(
    ptr, rows, stride, limit, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr
):
    d = tl.arange(0, WIDTH)[None, :] + FIRST
    mask = d < D
    if CHECK:
        mask = mask & (rows[:, None] < limit)
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + d, mask=mask, other=0.0)


@triton.jit
def load_head(
    ptr, rows, stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CHECK: tl.constexpr
):
    """ptr[rows, :D] as a tuple of one or two tiles; columns past D read as zero and, with CHECK, rows from `limit` on."""
    first = _load_part(ptr, rows, stride, limit, D, 0, BLOCK_D, CHECK)
    if BLOCK_E == 0:
        return (first,)
    else:
        return first, _load_part(ptr, rows, stride, limit, D, BLOCK_D, BLOCK_E, CHECK)


@triton.jit
def next_head(
    ptr, box, rest, rows, stride, b, h, row, limit,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """load_head of `rows`, which begin at `row`, by the descriptors `box` and `rest` of `walked` where there are some.

    A box reads as zero past the end of x, whatever CHECK and `rows` say.
    """
    if box is None:
        return load_head(ptr, rows, stride, limit, D, BLOCK_D, BLOCK_E, CHECK)
    else:
        first = box.load([b, h, row, 0]).reshape([rows.shape[0], BLOCK_D])
        if BLOCK_E == 0:
            return (first,)
        else:
            return first, rest.load([b, h, row, BLOCK_D]).reshape([rows.shape[0], BLOCK_E])


@triton.jit
def store_head(ptr, rows, stride, limit, head, D: tl.constexpr):
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride
    d = tl.arange(0, head[0].shape[1])[None, :]
    tl.store(ptrs + d, head[0].to(ptr.dtype.element_ty), mask=(rows[:, None] < limit) & (d < D))
    if len(head) == 2:
        d = tl.arange(0, head[1].shape[1])[None, :] + head[0].shape[1]
        tl.store(ptrs + d, head[1].to(ptr.dtype.element_ty), mask=(rows[:, None] < limit) & (d < D))


@triton.jit
def zero_head(ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr):
    if BLOCK_E == 0:
        return (tl.zeros([ROWS, BLOCK_D], ACC),)
    else:
        return tl.zeros([ROWS, BLOCK_D], ACC), tl.zeros([ROWS, BLOCK_E], ACC)


@triton.jit
def scale_head(head, factor):
    if len(head) == 1:
        return (head[0] * factor,)
    else:
        return head[0] * factor, head[1] * factor


@triton.jit
def dot_heads(a, b, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a @ b.T for the rows of two heads.

    Two products may share the accumulator because it begins here: carried around a loop, Triton up to 3.7 pipelines such a pair
    wrongly for sm100 (https://github.com/triton-lang/triton/issues/10821).
    """
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION, out_dtype=ACC)
    if len(a) == 2:
        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision=PRECISION, out_dtype=ACC)
    return product


@triton.jit
def add_dot(acc, p, head, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """acc + p @ head for a tile p of probabilities."""
    p = p.to(head[0].dtype)
    first = tl.dot(p, head[0], acc[0], input_precision=PRECISION, out_dtype=ACC)
    if len(head) == 1:
        return (first,)
    else:
        return first, tl.dot(p, head[1], acc[1], input_precision=PRECISION, out_dtype=ACC)
