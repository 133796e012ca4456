"""fastgpt_kernels.decode_persistent where tests call decode_token."""

from __future__ import annotations

import importlib
import types
from typing import Any

import torch

persistent = importlib.import_module("fastgpt_kernels.decode_persistent")


def as_one_kernel(ops: Any, one_kernel: Any = persistent) -> types.SimpleNamespace:
    """`ops` with decode_persistent behind decode_token's signature."""
    barrier: dict[torch.device, torch.Tensor] = {}

    def decode(tokens, positions, weights, *rest):
        zeros = torch.zeros(3, dtype=torch.int32, device=tokens.device)
        pointers = one_kernel.layer_pointers(weights)
        return one_kernel.decode_persistent(
            tokens, positions, weights, pointers, barrier.setdefault(tokens.device, zeros), *rest
        )

    return types.SimpleNamespace(**vars(ops) | {"decode_token": decode})


def small_shares(target: Any) -> Any:
    """Several tiles a share, since the one program of the interpreter owns all rows."""
    target.SPLIT_KEYS, target.TILE_BYTES = 16, 4096
    return target
