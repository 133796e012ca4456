"""Tensors of given values in the memory layouts that users hand to an op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _offset(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def _padded_rows(x: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype, device=x.device)[..., : x.shape[-1]].copy_(x)


def _every_other(x: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)[..., ::2].copy_(x)


# The last two change the values: all rows, or all columns, are the first.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "offset by one": _offset,
    "padded rows": _padded_rows,
    "every other column": _every_other,
    "last two transposed": lambda x: x.mT.contiguous().mT,
    "first two transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one row": lambda x: x[..., :1, :].expand(x.shape),
    "one column": lambda x: x[..., :1].expand(x.shape),
}
