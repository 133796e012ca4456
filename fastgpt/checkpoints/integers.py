"""Matrices in 8 bits: row r is scale[r] times integers from -127 to 127. In a file, `NAME` is I8 and `NAME.row_scale` fp32.

What is read is floats again, so that a model of any dtype can be made of it; a quarter of fp32's bytes on disk, none in memory.
(A model that computes with the integers is fastgpt.quantize's.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastgpt.checkpoints.formats import Opened

SUFFIX = ".row_scale"


def to_int8(exact: Tensor) -> tuple[Tensor, Tensor]:
    """(integers int8 [N, K], scale fp32 [N]) of fp32 [N, K]: the nearest of 255 equal steps between -max |row| and max |row|."""
    most = exact.abs().amax(dim=1)
    scale = torch.where(most > 0.0, most / 127.0, 1.0)
    return torch.round(exact / scale[:, None]).clamp(-127, 127).to(torch.int8), scale


def from_int8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [N, K] that the integers stand for, rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    return (weight.to(wide) * scale.to(wide)[:, None]).to(dtype)


def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for a file: matrices as integers with their scales, the rest in fp32. ValueError for what isn't finite."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        exact = tensor.float()
        if tensor.dim() != 2:
            out[name] = exact
            continue
        if not bool(exact.isfinite().all()):
            raise ValueError(f"{name}: weights must be finite to be stored as int8, got {exact[~exact.isfinite()][0]}")
        out[name], out[name + SUFFIX] = to_int8(exact)
    return out


def restored(opened: Opened) -> Opened:
    """The checkpoint as if it held the floats. Integers without fitting scales stay as they are, for the plan to refuse."""
    scales = {
        name: name + SUFFIX
        for name, shape in opened.shapes.items()
        if len(shape) == 2
        and opened.dtypes[name] == "I8"
        and opened.shapes.get(name + SUFFIX) == shape[:1]
        and opened.dtypes[name + SUFFIX] == "F32"
    }
    if not scales:
        return opened
    kept = {name: shape for name, shape in opened.shapes.items() if name not in scales.values()}

    def read(name: str) -> Tensor:
        if name not in scales:
            return opened.read(name)
        return from_int8(opened.read(name), opened.read(scales[name]), torch.float32)

    return dataclasses.replace(
        opened,
        shapes=kept,
        dtypes={name: "F32" if name in scales else opened.dtypes[name] for name in kept},
        read=read,
        size=opened.size + 3 * sum(math.prod(kept[name]) for name in scales),  # each byte is read as four
    )
