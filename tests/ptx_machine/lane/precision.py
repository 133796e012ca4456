"""Dtypes as the lane runs them, and an op beside torch in the same dtype and in float64."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from compare import ProductsInSequence, TruncatedProducts, assert_as_accurate_as_torch
from ptx_machine.machine import machine
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclasses.dataclass(frozen=True)
class Precision:
    """tf32: fp32 tensors whose products may be rounded."""

    dtype: torch.dtype
    tf32: bool = False

    @contextlib.contextmanager
    def torchs(self) -> Iterator[None]:
        """Where torch computes what the op is held to."""
        with contextlib.ExitStack() as stack:
            if self.tf32:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                stack.enter_context(TruncatedProducts())
            elif self.dtype == torch.float32:
                stack.enter_context(ProductsInSequence())
            yield

    @contextlib.contextmanager
    def machine(self, arch: int, **options: Any) -> Iterator[Any]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            with machine(arch, **options) as m:
                yield m
        finally:
            torch.set_float32_matmul_precision(before)


PRECISIONS = {
    "bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16),
    "fp32": Precision(torch.float32),
    "tf32": Precision(torch.float32, tf32=True),
}


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


def results(op: Callable, inputs: list, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Outputs of op and the gradients of its floating inputs, for gradients of the outputs that depend on their shapes alone."""
    inputs = [
        t.detach().to(dtype).requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs
    ]
    outputs = op(*inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    needed = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, needed, grads)]


def compare(arch: int, precision: Precision, ours: Callable, reference: Callable, inputs: list, **options: Any) -> None:
    """ours(*inputs, **options) on the machine, forward and backward, beside reference(*inputs)."""
    inputs = [t.to(precision.dtype).double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    with precision.machine(arch):
        got = results(ours, inputs, precision.dtype, **options)
    with precision.torchs():
        plain = results(reference, inputs, precision.dtype)
    exact = results(reference, inputs, torch.float64)
    for i, three in enumerate(zip(got, plain, exact, strict=True)):
        assert_as_accurate_as_torch(*three, f"result {i} of {len(got)}")
