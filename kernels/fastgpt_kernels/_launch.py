"""How every kernel is launched, registered with torch, and recorded for ahead-of-time compiling.

`launch(kernel, grid, *args, **constants)` is the only place that starts a Triton kernel. It hands over to a `Launcher`: the GPU,
or Triton's interpreter under TRITON_INTERPRET=1, unless `launched_by` says another. Everything that depends on who launches is
asked of it: which tensors it takes, its architecture, its multiprocessors. `record(arch)` writes launches down instead of
making them: run an op on meta tensors there, and what is recorded is what production would launch on that architecture.

`register` makes a launcher function a `torch.library` op under the namespace `fastgpt`, so that it survives
`torch.compile(fullgraph=True)` and passes `torch.library.opcheck`. Plain `define` and `impl` cost a third of
`torch.library.custom_op` per call (https://github.com/meta-pytorch/attention-gym, its notes on validating custom ops); autograd
stays outside, in each file's `torch.autograd.Function`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy
import torch
import triton
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"

# Streaming multiprocessors of the full chip that people have per architecture; only grids of persistent kernels use them.
SM_COUNT = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


class Launcher(Protocol):
    """Who makes the launches, and what kernels are to be prepared for."""

    device_types: tuple[str, ...]  # of the tensors that it takes

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`kernel[grid](*args, **kwargs)`; the grid isn't empty."""

    def arch(self, device: torch.device) -> int:
        """Compute capability as one number: 90 is sm90."""

    def sm_count(self, device: torch.device) -> int:
        """Streaming multiprocessors."""


class GPU:
    """Launches on the device of a kernel's first tensor."""

    device_types: tuple[str, ...] = ("cuda",)

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = next(t for t in (getattr(a, "base", a) for a in args) if isinstance(t, Tensor))  # base: a descriptor's
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                kernel[grid](*args, **kwargs)
        else:
            kernel[grid](*args, **kwargs)

    def arch(self, device: torch.device) -> int:
        return _chip(device)[0]

    def sm_count(self, device: torch.device) -> int:
        return _chip(device)[1]


@functools.cache
def _chip(device: torch.device) -> tuple[int, int]:
    """(architecture, multiprocessors) of a GPU; torch takes 6 us to say either, longer than some kernels run."""
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


class Interpreter(GPU):
    """Triton's own, program after program in numpy: on tensors of a GPU with its constants, elsewhere with those of sm90."""

    device_types: tuple[str, ...] = ("cpu", "cuda")

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _check_interpreter()
        super().launch(kernel, grid, args, kwargs)

    def arch(self, device: torch.device) -> int:
        return super().arch(device) if device.type == "cuda" else 90

    def sm_count(self, device: torch.device) -> int:
        # Programs run one after another: a small grid keeps it quick and still shares rows.
        return super().sm_count(device) if device.type == "cuda" else 4


class Launch(NamedTuple):
    """One recorded kernel launch."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recorder:
    """Writes launches down, as if the device were the full chip of compute capability `arch`."""

    device_types: tuple[str, ...] = ("meta", "cpu", "cuda")

    def __init__(self, arch: int) -> None:
        self.launches: list[Launch] = []
        self._arch = arch

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.launches.append(Launch(kernel, grid, args, kwargs))

    def arch(self, device: torch.device) -> int:
        return self._arch

    def sm_count(self, device: torch.device) -> int:
        return SM_COUNT.get(self._arch, 132)


_launcher: Launcher = Interpreter() if INTERPRETING else GPU()


@contextlib.contextmanager
def launched_by(launcher: Launcher) -> Iterator[None]:
    """Hand every launch inside to `launcher`. Holds for the whole process, threads included."""
    global _launcher
    previous, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = previous


@contextlib.contextmanager
def record(arch: int) -> Iterator[list[Launch]]:
    """Collect launches instead of making them, as if the current device were of compute capability `arch` (90 is sm90)."""
    recorder = Recorder(arch)
    with launched_by(recorder):
        yield recorder.launches


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Start `kernel[grid](*args, **kwargs)` on the device of its first tensor; an empty grid is a no-op."""
    if 0 not in grid:
        _launcher.launch(kernel, grid, args, kwargs)


@functools.cache
def _check_interpreter() -> None:
    """RuntimeError where every loop would fail with a TypeError: https://github.com/triton-lang/triton/issues/9171"""
    versions = [tuple(map(int, package.__version__.split(".")[:2])) for package in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        raise RuntimeError(
            f"the interpreter of Triton {triton.__version__} doesn't run with numpy {numpy.__version__}: "
            "install numpy<2.4, or Triton 3.7 or later"
        )


def device_types() -> tuple[str, ...]:
    """Types of the devices whose tensors can be launched on now."""
    return _launcher.device_types


def arch(device: torch.device) -> int:
    """Compute capability as one number (90 is sm90); the interpreter counts as sm90."""
    return _launcher.arch(device)


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    return _launcher.sm_count(device)


def tf32(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are rounded to tf32: fp32 ones where torch's setting lets cuBLAS do it.

    16-bit products ask nothing. torch has three ways to set it: set_float32_matmul_precision, allow_tf32, and the newer
    fp32_precision, after which reading either of the others may raise. This reads the newest, which follows them all.
    """
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def asynchronous(capability: int, dtype: torch.dtype) -> bool:
    """Whether products are wgmma's or tcgen05's, fed by the memory accelerator. sm120 has mma.sync, as Ampere has."""
    return 90 <= capability < 120 and (dtype.itemsize == 2 or tf32(dtype))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is a `constexpr_function`, which costs 6 to 10 us a call on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << max(n - 1, 0).bit_length()


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`."""
    if not condition:
        raise ValueError(message)


def check_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors on one device, of a type that whoever launches takes."""
    given = {name: t for name, t in tensors.items() if t is not None}
    devices = {str(t.device) for t in given.values()}
    if len(devices) != 1:
        where = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {where}")
    tensor = next(iter(given.values()))
    if tensor.device.type not in _launcher.device_types and not torch.compiler.is_compiling():
        raise ValueError(
            f"{op}: Triton kernels need CUDA tensors, got {tensor.device}. Move the tensors to a GPU, use the reference backend, "
            "or set TRITON_INTERPRET=1 before Python starts to run the kernels slowly on the CPU."
        )


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_float(op: str, **tensors: Tensor | None) -> None:
    """Every tensor is fp16, bf16, fp32 or fp64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _FLOATS:
            raise ValueError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


_libraries: dict[str, torch.library.Library] = {}


def register(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make `impl`, which launches, the torch op `fastgpt::<name>` of `schema`, with `fake` giving its output shapes.

    schema: e.g. "_layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)".
    The decorated name calls the op; inside `record` it calls `impl` itself, since ops on meta tensors run only `fake`.
    """

    def decorate(impl: Callable[..., Any]) -> Callable[..., Any]:
        # A mutated copy of a kernel module (tests) registers beside the original, under its own module's name.
        package, _, _ = impl.__module__.partition(".")
        namespace = "fastgpt" if package == "fastgpt_kernels" else impl.__module__.replace(".", "_")
        library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
        name = schema[: schema.index("(")]
        library.define(schema)
        for key in ("CUDA", "CPU"):
            library.impl(name, impl, key)
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        op = getattr(getattr(torch.ops, namespace), name).default

        def call(*args: Any) -> Any:
            return impl(*args) if isinstance(_launcher, Recorder) else op(*args)

        call.__name__, call.__doc__ = impl.__name__, impl.__doc__
        call.op = op  # type: ignore[attr-defined]
        return call

    return decorate


def dropout_seed(device: torch.device, seed: int | None) -> Tensor:
    """The int64 [1] tensor that dropout kernels read: `seed`, or a draw from torch's generator of that device.

    A tensor rather than a number, so that a captured CUDA graph draws anew on each replay, `torch.manual_seed` reproduces, and
    activation checkpointing (which restores the generator) sees the same mask.
    """
    if seed is None:
        return torch.randint(0, 2**31 - 1, (1,), device=device, dtype=torch.int64)
    return torch.full((1,), seed, device=device, dtype=torch.int64)
