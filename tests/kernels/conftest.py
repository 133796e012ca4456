"""Memory that a kernel forgets to write shows as NaN: torch.empty is poisoned for calls from fastgpt_kernels.

The idea is flash-linear-attention's: https://github.com/fla-org/flash-linear-attention/blob/main/tests/conftest.py
"""

from __future__ import annotations

import sys

import pytest
import torch

# torch keeps the list of functions that `with torch.device(...)` acts on as it finds them at the first use: let it find the
# real ones, or models meant for the meta device would fill the memory of every later test.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    def poison(make):
        def poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith(("fastgpt_kernels", "mutant_")) and tensor.device.type in ("cpu", "cuda"):
                tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2)
            return tensor

        return poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
