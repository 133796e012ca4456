"""The one comparator of the suite: at most twice the error that PyTorch itself makes in the same dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def assert_as_accurate_as_torch(ours: Tensor, torch_same_dtype: Tensor, exact: Tensor, name: str = "result") -> None:
    """err(ours) <= 2 * err(torch) + one rounding of the dtype, against float64 `exact`, on the maximum and on the RMS.

    NaN and Inf must stand where float64 has them. float64 results are held to 4096 roundings, since there torch is the truth.
    """
    assert ours.dtype == torch_same_dtype.dtype, f"{name}: dtype {ours.dtype}, torch gives {torch_same_dtype.dtype}"
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    # Where ours is: on a GPU, millions of elements take no time.
    ours64, torch64, exact = (t.detach().to(ours.device, torch.float64) for t in (ours, torch_same_dtype, exact))
    # Where the low precision overflows, torch's own result says what is right.
    odd = ~torch64.isfinite() | ~exact.isfinite()
    torch.testing.assert_close(ours64[odd], torch64[odd], rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")
    ours64, torch64, exact = ours64[~odd], torch64[~odd], exact[~odd]
    if exact.numel() == 0:
        return
    assert ours64.isfinite().all(), f"{name}: {int((~ours64.isfinite()).sum())} values are not finite"
    rounding = torch.finfo(ours.dtype).eps * (4096 if ours.dtype == torch.float64 else 1)
    for norm, measure in (("max", lambda e: e.abs().max().item()), ("rms", lambda e: e.square().mean().sqrt().item())):
        error, allowed = measure(ours64 - exact), 2 * measure(torch64 - exact) + rounding * measure(exact)
        assert error <= allowed, (
            f"{name}: {norm} error {error:.3e} over {allowed:.3e} (twice torch's, plus one rounding)"
        )


class TruncatedProducts(TorchDispatchMode):
    """Inside, torch's fp32 products see operands cut to the 19 bits of tf32, as tensor cores cut those of `tl.dot`.

    The hardware drops the low 13 bits, and Triton hands it plain fp32: https://github.com/triton-lang/triton/issues/4574
    Whether torch's own tf32 on a card rounds to nearest first, only a card can tell. Use the math backend of attention.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            first = 1 if name in ("addmm", "baddbmm") else 0
            args = tuple(self._cut(a) if first <= i < first + 2 else a for i, a in enumerate(args))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _cut(x: Tensor) -> Tensor:
        return (x.contiguous().view(torch.int32) & -8192).view(torch.float32) if x.dtype == torch.float32 else x


class ProductsInSequence(TorchDispatchMode):
    """Inside, torch's fp32 products of two matrices add one fused product after another, as a thread of our compiled kernel does.

    A CPU's torch may have a sum a lane of its vectors, so that its error depends on the processor. Batched products stay torch's.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in ("mm", "addmm") or args[-1].dtype != torch.float32 or kwargs:
            return func(*args, **(kwargs or {}))
        *beside, a, b = args
        out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32)
        for column, row in zip(a.double().T, b.double(), strict=True):
            out = out.double().addr_(column, row).float()
        return out.add_(beside[0]) if beside else out
