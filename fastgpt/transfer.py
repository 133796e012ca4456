"""The host's numbers on their way to a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def uploaded(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """`values`, a tensor of the CPU or what torch.tensor takes, on `device`; a tensor keeps its dtype.

    On a GPU by way of pinned memory: the host goes on at once, where a copy from pageable memory would wait until the GPU has
    done all that it was given. The memory is torch's, which keeps it until the copy has been made.
    """
    pinned = device.type == "cuda"
    if isinstance(values, Tensor):
        host = values.pin_memory() if pinned else values
    else:
        host = torch.tensor(values, dtype=dtype, pin_memory=pinned)
    return host.to(device, non_blocking=pinned)
