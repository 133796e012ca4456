"""Products on a CPU by the faster of torch's libraries: what `ops` picks beside the reference, with the reference's signatures.

torch multiplies fp32 by MKL, which on processors that aren't Intel's does no better than one thread in a product of a row with a
matrix. oneDNN, which torch carries too, reads the very same weights, in place and as they are:

    x [M, K] @ W.T [K, N], fp32, two cores of an AMD EPYC 9004 (AVX-512), torch 2.13, us by MKL and by oneDNN
    M = 1     768 x 768: 219, 150     3072 x 768: 999, 459     768 x 3072: 674, 430     50257 x 768: 13561, 7244
    M = 8     768 x 768: 248, 181     3072 x 768: 1220, 694    768 x 3072: 999, 661
    M = 256                           3072 x 768: 7781, 7223   768 x 3072: 7059, 6121
    g [M, N] @ W, the gradient of x   M = 8, 3072 x 768: 1249, 681    M = 256, 3072 x 768: 8527, 6218
    g.T @ x, the gradient of W        M = 256, 3072 x 768: 8273, 9705    M = 1024, 3072 x 768: 29742, 33949

So forward and the gradient of x are oneDNN's at any number of rows, and the gradient of W stays where it is. In bf16 torch's own
product is oneDNN's already. On Intel's processors MKL is fast, and nothing here is used. The rule looks at vendor, dtype and
device alone, so that a machine computes the same on every run.

What torch calls private is called here and nowhere else, each op once it has given exact results in this process; without it
the public product of torch runs.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import reference

OPS = ("linear", "mlp", "linear_cross_entropy")


@functools.cache
def vendor() -> str:
    """The processor's maker as it names itself: "GenuineIntel", "AuthenticAMD", ... or whatever the platform says."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    return platform.processor()


@functools.cache
def unavailable(dtype: torch.dtype) -> str | None:
    """Why products of this dtype stay with torch's own choice on this machine, or None where they don't."""
    if dtype != torch.float32:
        return f"torch's own products of {str(dtype).removeprefix('torch.')} are no slower"
    if not torch.backends.mkl.is_available():
        return "torch's fp32 products are not MKL's here"
    if "Intel" in vendor():
        return "on Intel's processors MKL is the faster one"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch has no oneDNN, or no door to it"
    if not _exact():
        return "oneDNN's product gives wrong numbers here"
    return None


def takes(x: Tensor) -> bool:
    """Whether products of x are made here: a plain CPU tensor of a dtype that gains, outside of autocast and transforms."""
    return (
        not torch.compiler.is_compiling()
        and unavailable(x.dtype) is None
        and x.device.type == "cpu"
        and type(x) in (Tensor, nn.Parameter)
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """reference.linear, for an x that `takes` accepts."""
    return reference.activate(_affine(x, weight, bias), activation)


def mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str = "gelu_tanh"
) -> Tensor:
    """reference.mlp, for an x that `takes` accepts."""
    return _affine(reference.activate(_affine(x, w1, b1), activation), w2, b2)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """reference.linear_cross_entropy, for an x that `takes` accepts."""
    return reference.cross_entropy(_affine(x, weight, bias), targets, ignore_index, reduction)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, by oneDNN where it can read these tensors."""
    if not (_readable(x, weight) and (bias is None or (_plain(bias) and bias.shape == weight.shape[:1]))):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    y = (_Product.apply if wanted else _onednn)(rows, weight, bias)
    return y.view(*x.shape[:-1], len(weight))


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _readable(x: Tensor, weight: Tensor) -> bool:
    return (
        _plain(weight)
        and weight.dim() == 2
        and (weight.is_contiguous() or weight.T.is_contiguous())
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and x.numel() > 0
        and weight.numel() > 0
    )


class _Product(torch.autograd.Function):
    """x [M, K] @ weight [N, K].T + bias [N]. Its gradients are products too, so that they have gradients of their own."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _affine(grad, weight.T, None) if of_x else None,
            grad.T @ x if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _exact() -> bool:
    """Whether oneDNN multiplies small integers, whose products fp32 holds exactly, without a fault: weights of both orders."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float()

    for rows in (1, 5):
        x, weight, bias = integers(rows, 48), integers(40, 48), integers(40)
        expected = (x[:, None, :] * weight).sum(-1)
        with torch.no_grad():
            try:
                found = (_onednn(x, weight, bias), _onednn(x, weight.T.contiguous().T, None) + bias)
            except (RuntimeError, TypeError):  # another signature, or a build without it
                return False
        if not all(torch.equal(y, expected + bias) for y in found):
            return False
    return True
