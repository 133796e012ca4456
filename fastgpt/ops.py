"""The one file that knows which implementations there are, and picks one per call.

"auto" takes the Triton kernels for CUDA tensors of a supported dtype where Triton is installed, `fastgpt.cpu_products` for
products on a CPU whose processor gains by it, and `fastgpt.reference` everywhere else. "triton" and "reference" force one;
"triton" raises with the reason where it can't run. The choice is made by `use_backend`, else by the environment variable
FASTGPT_BACKEND, else it is "auto".
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from fastgpt import cpu_products, reference
from fastgpt.config import SAMPLERS

BACKENDS = ("auto", "triton", "reference")
OPS = (
    "embedding",
    "layer_norm",
    "add_layer_norm",
    "dropout_add",
    "softmax",
    "gelu",
    "bias_gelu",
    "linear",
    "mlp",
    "attention",
    "packed_attention",
    "decode_attention",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_cross_entropy_with_statistics",
)

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MIN_CAPABILITY = (8, 0)  # Triton's tl.dot has no tensor-core path before Ampere

# Read once, so that torch.compile sees a constant that it can guard.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_ENVIRONMENT = os.environ.get("FASTGPT_BACKEND", "auto")
_backend = _ENVIRONMENT


class use_backend:
    """Run on one backend: "auto", "triton" or "reference". As a call from now on, as a context until it is left.

    It holds for the whole process, since autograd's own threads must see what the forward saw. Of several, the newest that was
    not left holds, whatever thread made it; when all contexts have been left, the last call holds, else FASTGPT_BACKEND.
    Raises ValueError for any other name.
    """

    def __init__(self, name: str) -> None:
        self.name, self._open = _checked(name, "backend"), 0
        with _choosing:
            calls = [choice for choice in _choices if not choice._open]
            _choose([choice for choice in _choices if choice not in calls[:-1]] + [self])

    def __enter__(self) -> None:
        with _choosing:
            self._open += 1
            # A context that is entered again, or whose call another thread has replaced meanwhile, is the newest.
            _choose(_choices if self._open == 1 and self in _choices else [*_choices, self])

    def __exit__(self, *error: object) -> None:
        with _choosing:
            self._open -= 1
            newest = len(_choices) - 1 - _choices[::-1].index(self)
            _choose(_choices[:newest] + _choices[newest + 1 :])


_choices: list[use_backend] = []  # calls and open contexts, the newest last
_choosing = threading.Lock()


def _choose(choices: list[use_backend]) -> None:
    global _backend
    _choices[:] = choices
    _backend = choices[-1].name if choices else _ENVIRONMENT


def device_of(name: str | torch.device) -> torch.device:
    """The device of that name; ValueError for what is none, and for one that isn't here."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps", "meta"):
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {name!r}")
    here = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(device.type, 1)
    if (device.index or 0) >= here:
        raise ValueError(
            f"device {str(name)!r} was asked for, but torch {torch.__version__} sees {here or 'no'} {device.type.upper()} "
            f"device{'' if here == 1 else 's'} here"
        )
    return device


def current_backend() -> str:
    """The backend in force: `use_backend`'s, else FASTGPT_BACKEND's as it was at import, else "auto"."""
    return _checked(_backend, "FASTGPT_BACKEND")


def _checked(name: str, what: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{what} must be one of {BACKENDS}, got {name!r}")
    return name


def triton_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels can't run on tensors of this device and dtype, or None if they can."""
    if not _TRITON_INSTALLED:
        return "Triton is not installed (pip install triton; Linux only)"
    if device.type != "cuda" and device.type not in _launchable():
        return f"tensors are on {device.type}; Triton kernels need a CUDA device"
    if device.type == "cuda" and _capability(device) < _MIN_CAPABILITY:
        return f"compute capability {_capability(device)} is below {_MIN_CAPABILITY}"
    if dtype not in _TRITON_DTYPES and not (device.type != "cuda" and dtype == torch.float64):
        return f"dtype {dtype} is not one of {[str(d) for d in _TRITON_DTYPES]}"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    """Asked once: torch takes 6 us to say it, and every op wants to know."""
    if torch.compiler.is_compiling():
        return torch.cuda.get_device_capability(device)  # a constant there
    if device not in _capabilities:
        _capabilities[device] = torch.cuda.get_device_capability(device)
    return _capabilities[device]


_capabilities: dict[torch.device, tuple[int, int]] = {}


def _launchable() -> tuple[str, ...]:
    """Device types besides "cuda" that kernels run on: the interpreter's, or of what stands in for a GPU. Imports Triton."""
    from fastgpt_kernels import _launch

    return _launch.device_types()


def explain(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(implementation, reason) that a call of `op` gets here: ("triton" | "reference" | "cpu_products", why)."""
    backend = current_backend()
    if backend == "reference":
        return "reference", "asked for"
    if backend == "auto" and device.type != "cuda":
        if op in cpu_products.OPS and device.type == "cpu":
            kept = cpu_products.unavailable(dtype)
            return ("reference", kept) if kept else ("cpu_products", f"faster on {cpu_products.vendor()}")
        return "reference", f"tensors are on {device.type}; Triton kernels need a CUDA device"
    unavailable = triton_unavailable(device, dtype)
    if backend == "triton":
        if unavailable:
            raise ValueError(f"backend 'triton' was asked for, but {op} can't run there: {unavailable}")
        return "triton", "asked for"
    if unavailable:
        return "reference", unavailable
    return "triton", f"CUDA tensors of {str(dtype).removeprefix('torch.')}"


def _module(op: str, x: Tensor) -> ModuleType:
    backend = current_backend()
    if backend != "triton" and not x.is_cuda:  # the CPU path pays for a few comparisons, no more
        return cpu_products if backend == "auto" and op in cpu_products.OPS and cpu_products.takes(x) else reference
    if explain(op, x.device, x.dtype)[0] == "reference":
        return reference
    import fastgpt_kernels

    return fastgpt_kernels


def _of_bytes(x: Tensor) -> ModuleType:
    """Where products with int8 and int4 weights are made: there are no kernels for them but a token's."""
    return cpu_products if x.device.type == "cpu" and current_backend() != "reference" else reference


def token_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | str:
    """`fastgpt_kernels.decode_token`, a whole token in fused kernels; or why they can't run there.

    It has no counterpart in the reference: where it doesn't run, the modules do.
    """
    choice, why = explain("decode_token", device, dtype)
    if choice == "reference":
        return why
    from fastgpt_kernels import decode_token

    return decode_token


def dependent_launches(device: torch.device) -> bool:
    """Whether a Triton kernel can start there while the one before runs out: compute capability 9.0 and later."""
    from fastgpt_kernels import _launch

    return not _launch.INTERPRETING and _launch.arch(device) >= 90


def sampler_kernels(sampler: str, device: torch.device, dtype: torch.dtype, greedy: bool = False) -> ModuleType | None:
    """What `sampler` draws with: `fastgpt_kernels.sampling` for "fused", None for "torch".

    The two make different draws, so that nothing chooses between them unasked: ValueError with the reason where "fused" can't
    run on logits of this device and dtype. The most likely token is the same in both: `greedy` gives the kernels where they run.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {SAMPLERS}, got {sampler!r}")
    if sampler == "torch" and not greedy:
        return None
    choice, why = explain("sample_tokens", device, dtype)
    if choice == "reference":
        if sampler == "torch":
            return None
        raise ValueError(f"sampler 'fused' runs on the Triton backend alone, and here that is not in use: {why}")
    from fastgpt_kernels import sampling

    return sampling


def embedding(
    idx: Tensor,
    tok_weight: Tensor,
    pos_weight: Tensor,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    positions: Tensor | None = None,
) -> Tensor:
    module = _module("embedding", tok_weight)
    return module.embedding(idx, tok_weight, pos_weight, dropout_p, seed, offset, positions)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> Tensor:
    return _module("layer_norm", x).layer_norm(x, weight, bias, eps, dtype)


def add_layer_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    module = _module("add_layer_norm", residual if x is None else x)
    return module.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed, dtype)


def dropout_add(x: Tensor, residual: Tensor, dropout_p: float = 0.0, seed: int | None = None) -> Tensor:
    return _module("dropout_add", x).dropout_add(x, residual, dropout_p, seed)


def softmax(x: Tensor, scale: float = 1.0, causal: bool = False) -> Tensor:
    return _module("softmax", x).softmax(x, scale, causal)


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    return _module("gelu", x).gelu(x, approximate)


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    return _module("bias_gelu", x).bias_gelu(x, bias, approximate)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    return _module("linear", x).linear(x, weight, bias, activation)


def product(x: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """See fastgpt.cpu_products.product; x is on a CPU."""
    return cpu_products.product(x) if current_backend() == "auto" else reference.linear


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return _of_bytes(x).int8_linear(x, weight, scale, bias)


def int4_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return _of_bytes(x).int4_linear(x, weight, scale, bias)


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu_tanh",
    residual: Tensor | None = None,
) -> Tensor:
    return _module("mlp", x).mlp(x, w1, b1, w2, b2, activation, residual)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    first: Tensor | None = None,
) -> Tensor:
    return _module("attention", q).attention(q, k, v, causal, scale, dropout_p, seed, first)


def packed_attention(
    qkv: Tensor,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    first: Tensor | None = None,
) -> Tensor:
    return _module("packed_attention", qkv).packed_attention(qkv, causal, scale, dropout_p, seed, first)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, first: Tensor | None = None
) -> Tensor:
    return _module("decode_attention", q).decode_attention(q, k_cache, v_cache, lengths, first)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    module = _module("cross_entropy", logits)
    return module.cross_entropy(logits, targets, ignore_index, reduction, label_smoothing, z_loss)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    module = _module("linear_cross_entropy", x)
    return module.linear_cross_entropy(x, weight, targets, bias, ignore_index, reduction, label_smoothing, z_loss)


def linear_cross_entropy_with_statistics(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    module = _module("linear_cross_entropy", x)
    how = ignore_index, reduction, label_smoothing, z_loss
    return module.linear_cross_entropy_with_statistics(x, weight, targets, bias, *how)
