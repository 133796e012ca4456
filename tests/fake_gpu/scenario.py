"""What scenarios run: models on the pretended device, and ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fake_gpu.trace import unwatched
from fastgpt import GPTConfig, GPTModel

# GPT-2 124M, two layers of it.
CONFIG = GPTConfig(50257, 1024, 768, 12, 2, qkv_bias=True, tie_weights=True, drop_rate=0.0)


def made(build: Any, dtype: torch.dtype = torch.float32) -> Any:
    """What `build` makes on the device with that default dtype, unwatched."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with unwatched(), torch.device("cuda"):
            return build()
    finally:
        torch.set_default_dtype(before)


def model(dtype: torch.dtype = torch.bfloat16, train: bool = False, **changes: Any) -> GPTModel:
    return made(lambda: GPTModel(CONFIG.replace(**changes)), dtype).train(train)


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device="cuda")
