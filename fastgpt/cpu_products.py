"""Products on a CPU by the faster of torch's libraries: what `ops` picks beside the reference, with the reference's signatures.

torch multiplies fp32 by MKL, which on processors that aren't Intel's does no better than one thread in a product of a row with a
matrix. oneDNN, which torch carries too, reads the very same weights, in place and as they are:

    x [M, K] @ W.T [K, N], fp32, two cores of an AMD EPYC 9004 (AVX-512), torch 2.13, us by MKL and by oneDNN
    M = 1     768 x 768: 219, 150     3072 x 768: 999, 459     768 x 3072: 674, 430     50257 x 768: 13561, 7244
    M = 8     768 x 768: 248, 181     3072 x 768: 1220, 694    768 x 3072: 999, 661
    M = 256                           3072 x 768: 7781, 7223   768 x 3072: 7059, 6121
    g [M, N] @ W, the gradient of x   M = 8, 3072 x 768: 1249, 681    M = 256, 3072 x 768: 8527, 6218
    g.T @ x, the gradient of W        M = 256, 3072 x 768: 8273, 9705    M = 1024, 3072 x 768: 29742, 33949

So forward and the gradient of x are oneDNN's at any number of rows, and the gradient of W stays where it is. On Intel's
processors MKL is fast, and it stays. In bf16 torch's own product is oneDNN's already; on two Xeon cores a row took it a fifth
longer than the product of the matrix with a vector, on the EPYC it takes 117 us where that takes 156 (768 x 768). The rule looks
at vendor, dtype and rows alone, so that a machine computes the same on every run.

What torch calls private is called here and nowhere else, each op once it has given exact results in this process; without it
the public product of torch runs.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastgpt import reference

OPS = ("linear", "mlp", "linear_cross_entropy", "linear_cross_entropy_with_statistics")

# Rows that int8 weights are multiplied with as they are, by dtype of x; more are multiplied with widened weights. On the machine
# above, ms as they are and widened: fp32 3072 x 768, 8 rows 0.63 and 1.68, 16 rows 1.46 and 1.75, 32 rows 2.46 and 2.19;
# bf16, 8 rows 0.63 and 1.36, 16 rows 1.46 and 0.88.
INT8_ROWS = {torch.float32: 16, torch.bfloat16: 8, torch.float16: 16}
# The same of int4 weights. 3072 x 768 on one core, ms as they are and widened: fp32 64 rows 3.8 and 17.8, 128 rows 7.5 and 21.6,
# 512 rows 28.7 and 30.7; bf16 128 rows 7.3 and 17.4, 512 rows 28.7 and 18.7; 768 x 768 in bf16, 128 rows 1.87 and 1.92.
INT4_ROWS = 128

# Outputs that a tile of int8 weights holds, and inputs at most. Wide tiles are read faster, narrow ones give every core some. One
# row, two cores, us at 128, 256 and 512 wide: 768 x 768 42, 45, 55; 3072 x 768 110, 96, 133; 50257 x 768 1334, 1176, 1465.
# A tile's products are summed one after the other: 768, 192 and 64 in a row have 2.7, 1.4 and 0.9 times the error of torch's
# product. Few inputs are divided too, since torch's error falls with their number.
TILE, DEEP, LEAST = 256, 64, 4


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
    intel = "Intel" in vendor()
    if dtype == torch.bfloat16 and intel:
        return None
    if dtype != torch.float32:
        return f"torch's own products of {str(dtype).removeprefix('torch.')} are no slower"
    if not torch.backends.mkl.is_available():
        return "torch's fp32 products are not MKL's here"
    if intel:
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


def product(x: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """What multiplies rows like x [M, K] without gradients: (rows, weight, bias) -> rows @ weight.T + bias.

    For a caller who knows that weights and biases are plain contiguous tensors of x's dtype: a token makes 72 such products, and
    looking at all of them each time takes 12 us a product.
    """
    if not takes(x) or torch.is_grad_enabled():
        return F.linear
    return _row if x.dtype == torch.bfloat16 else _onednn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """reference.linear, for an x that `takes` accepts."""
    return reference.activate(_affine(x, weight, bias), activation)


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu_tanh",
    residual: Tensor | None = None,
) -> Tensor:
    """reference.mlp, for an x that `takes` accepts."""
    y = _affine(reference.activate(_affine(x, w1, b1), activation), w2, b2)
    return y if residual is None else residual + y


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *how: Any) -> Tensor:
    """reference.linear_cross_entropy, for an x that `takes` accepts; `how` is cross_entropy's."""
    return reference.cross_entropy(_affine(x, weight, bias), targets, *how)


def linear_cross_entropy_with_statistics(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """reference.linear_cross_entropy_with_statistics, for an x that `takes` accepts; `how` is cross_entropy's."""
    return reference.cross_entropy_with_statistics(_affine(x, weight, bias), targets, *how)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """reference.int8_linear on a CPU, in fp32 sums whatever x's dtype.

    Up to INT8_ROWS rows read the integers: a bag of embeddings, whose FBGEMM kernel widens bytes in registers, is a product of a
    row with a matrix, and its weights are exact. It wants another order of the bytes, a second copy that lives as long as
    `weight`, made anew where `weight` changed in place. 3072 x 768 takes a row 0.10 ms, by torch._weight_int8pack_mm in bf16
    0.22, by quantized::linear_dynamic, which rounds x to 8 bits, 0.13.
    """
    rows = x.reshape(-1, x.shape[-1])
    if 0 < len(rows) <= INT8_ROWS.get(x.dtype, 0) and _as_they_are(x) and _bags_are_exact():
        sums = _bags(rows.float(), _packed(weight, _tiles), len(weight))
        y = sums * scale if bias is None else torch.addcmul(bias, sums, scale)
        return y.to(x.dtype).view(*x.shape[:-1], len(weight))
    return reference.int8_linear(x, weight, scale, bias, _widened_product(x))


def int4_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """reference.int4_linear on a CPU. Up to INT4_ROWS rows are rounded to bf16 and read the four bits as they are.

    torch's packed product is fast in bf16 alone. Its order of the bits is a second copy of `weight`, as int8_linear's.
    """
    rows = x.reshape(-1, x.shape[-1])
    if 0 < len(rows) <= INT4_ROWS and x.dtype in INT8_ROWS and _as_they_are(x) and _int4_is_exact():
        y = _int4(rows.bfloat16(), _packed(weight, _bits), _packed(scale, _groups), len(weight))
        y = y if bias is None else y + bias
        return y.to(x.dtype).view(*x.shape[:-1], len(weight))
    return reference.int4_linear(x, weight, scale, bias, _widened_product(x))


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, by oneDNN, or a bf16 row by torch.mv, where they can read these tensors."""
    if not _readable(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y = F.linear(rows, weight, bias) if x.dtype == torch.bfloat16 else _Product.apply(rows, weight, bias)
    else:
        y = _row(rows, weight, bias) if x.dtype == torch.bfloat16 else _onednn(rows, weight, bias)
    return y.view(*x.shape[:-1], len(weight))


def _row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if len(x) > 1:
        return F.linear(x, weight, bias)
    y = torch.mv(weight, x[0])
    return (y if bias is None else y.add_(bias))[None]


def _readable(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        _beside(x, weight)
        and weight.dim() == 2
        and (weight.is_contiguous() or weight.T.is_contiguous())
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and x.numel() > 0
        and weight.numel() > 0
        and (bias is None or (_beside(x, bias) and bias.shape == weight.shape[:1]))
    )


def _beside(x: Tensor, other: Tensor) -> bool:
    return type(other) in (Tensor, nn.Parameter) and other.dtype == x.dtype and other.device == x.device


def _widened_product(x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return linear if takes(x) else F.linear


def _as_they_are(x: Tensor) -> bool:
    """Whether x can be multiplied by an op that torch's compiler, transforms and autograd know nothing of."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _packed(weight: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """pack(weight), kept until `weight` goes or changes."""
    version = None if weight.is_inference() else weight._version, weight.data_ptr()
    kept = _copies.get(weight)
    if kept is None or kept[0] != version:
        kept = _copies[weight] = version, pack(weight)
    return kept[1]


def _tiles(weight: Tensor) -> Tensor:
    """int8 [N, K] as uint8 [tiles * inputs, TILE + 8]: q + 128 of a tile's outputs, a row an input.

    The tiles of the first inputs come first; zeros fill the last ones. Behind each row stand 1.0 and -128.0, the scale and the
    offset that a row of embeddings has.
    """
    N, K = weight.shape
    depth, deep = _depths(K)
    q = F.pad(weight, (0, depth * deep - K, 0, -N % TILE)).view(torch.uint8) ^ 128
    tiles = q.view(-1, TILE, depth, deep).permute(2, 0, 3, 1).reshape(-1, TILE)
    return torch.cat((tiles, torch.tensor([1.0, -128.0]).view(torch.uint8).expand(len(tiles), 8)), dim=1)


def _depths(K: int) -> tuple[int, int]:
    """How many tiles lie behind each other, and how many of the K inputs each has."""
    depth = max(-(-K // DEEP), LEAST)
    return depth, -(-K // depth)


def _bags(x: Tensor, tiles: Tensor, outputs: int) -> Tensor:
    """fp32 x [M, K] times int8 weights as `_tiles` has them -> [M, outputs]. A bag is a row's inputs to a tile, weighted by x."""
    M, K = x.shape
    depth, deep = _depths(K)
    if missing := depth * deep - K:
        x = F.pad(x, (0, missing))
    across = len(tiles) // (depth * deep)
    shares = x.view(M, depth, 1, deep).expand(M, depth, across, deep).reshape(-1)
    y = _bag_op()(tiles, *_places(M, depth * across, deep), False, 0, False, shares, None, True)
    y = y.view(M, depth, across * TILE).sum(dim=1)
    return y if y.shape[1] == outputs else y[:, :outputs]


@functools.cache
def _bag_op() -> Callable[..., Tensor]:
    return torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default


@functools.lru_cache(maxsize=32)
def _places(rows: int, tiles: int, deep: int) -> tuple[Tensor, Tensor]:
    """Which rows of the tiles are in which bag: int32 indices, and where each bag begins and the last one ends."""
    with torch.inference_mode(False):
        indices = torch.arange(tiles * deep, dtype=torch.int32).repeat(rows)
        return indices, torch.arange(0, len(indices) + 1, deep, dtype=torch.int32)


def _bits(weight: Tensor) -> Tensor:
    """uint8 [N, K / 2] as torch._weight_int4pack_mm_for_cpu reads it, rows up to a multiple of 16."""
    q = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1).int()
    return torch._convert_weight_to_int4pack_for_cpu(F.pad(q, (0, 0, 0, -len(q) % 16)), 1)


def _groups(scale: Tensor) -> Tensor:
    """[N, K / group, 2] as bf16 [K / group, N, 2], N up to a multiple of 16."""
    return F.pad(scale.bfloat16().transpose(0, 1), (0, 0, 0, -len(scale) % 16)).contiguous()


def _int4(x: Tensor, bits: Tensor, groups: Tensor, outputs: int) -> Tensor:
    """bf16 x [M, K] times int4 weights as `_bits` and `_groups` have them -> bf16 [M, outputs]."""
    return torch._weight_int4pack_mm_for_cpu(x, bits, x.shape[1] // len(groups), groups)[:, :outputs]


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


def _integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(0))


def _gives(expected: Tensor, product: Callable[[], Tensor]) -> bool:
    """Whether a product of small integers, which every dtype here holds exactly, is made without a fault."""
    with torch.no_grad():
        try:
            return torch.equal(product().float(), expected)
        except (AttributeError, RuntimeError, TypeError):  # no such op, or of another signature, or in another build
            return False


def _exact() -> bool:
    """Whether oneDNN's product is right: of one row and of more, with weights of both orders."""
    weight, bias = _integers(-8, 8, 40, 48).float(), _integers(-8, 8, 40).float()
    xs = [_integers(-8, 8, rows, 48).float() for rows in (1, 5)]
    return all(
        _gives((x[:, None] * weight).sum(-1) + bias, functools.partial(_onednn, x, w, bias))
        for x in xs
        for w in (weight, weight.T.contiguous().T)
    )


@functools.cache
def _bags_are_exact() -> bool:
    """Whether bags of embeddings are a right product, and FBGEMM's: without it they are made by a plain loop."""
    weight, x = _integers(-127, 127, TILE + 3, DEEP + 3).to(torch.int8), _integers(-8, 8, 3, DEEP + 3).float()
    expected = (x[:, None] * weight).sum(-1)
    known = "fbgemm" in torch.backends.quantized.supported_engines
    return known and _gives(expected, lambda: _bags(x, _tiles(weight), len(weight)))


@functools.cache
def _int4_is_exact() -> bool:
    """Whether torch's packed product is right: sums of a few columns, which bf16 holds."""
    weight, x = _integers(0, 255, 19, 32).to(torch.uint8), F.pad(_integers(-2, 2, 3, 4).float(), (29, 31))
    scale = torch.stack((_integers(1, 2, 19, 2), _integers(-3, 3, 19, 2)), dim=-1).float()
    expected = (x[:, None] * reference.int4_weights(weight, scale, torch.float32)).sum(-1)
    return _gives(expected, lambda: _int4(x.bfloat16(), _bits(weight), _groups(scale), len(weight)))
