"""`h100()`: inside, "cuda" is a device; tensors have shapes, dtypes and places but no data, and what the host does is noted.

torch's FakeTensorMode computes what comes of every op; a dispatch mode above it looks at what crosses between host and device.
Values that are read are made up: 1, 0.5, and for a bool what `h100(truth=…)` says; ids that generation reads are 0.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fake_gpu import trace
from fake_gpu.runtime import RUNTIME
from fastgpt_kernels import _launch

_NUMPY = {
    dtype: np.dtype(name)
    for name in ("int64", "int32", "float32", "float64", "bool")
    for dtype in [getattr(torch, name)]
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Stale(AssertionError):
    """The host read memory that an asynchronous copy hadn't filled yet."""


class Recorder(_launch.Recorder):
    """Counts launches by kernel instead of making them, and keeps none of their tensors."""

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for seen in trace.current():
            seen.kernels[kernel.fn.__name__] += 1


class Pinned:
    """Storages of page-locked memory, and the newest copy from the device to each."""

    def __init__(self) -> None:
        self._copies: dict[StorageWeakRef, int] = {}

    def add(self, tensor: Tensor) -> Tensor:
        self._copies[StorageWeakRef(tensor.untyped_storage())] = 0
        return tensor

    def __contains__(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()) in self._copies

    def copied_to(self, tensor: Tensor) -> None:
        RUNTIME.copied = next(RUNTIME.copies)
        self._copies[StorageWeakRef(tensor.untyped_storage())] = RUNTIME.copied

    def check(self, tensor: Tensor) -> None:
        """Raise Stale if the tensor's copy hasn't been waited for."""
        if self._copies.get(StorageWeakRef(tensor.untyped_storage()), 0) > RUNTIME.arrived:
            raise Stale(f"read at {trace.where()} of a copy from the device that nobody has waited for")


PINNED = Pinned()


class FakeDevices(FakeTensorMode):
    """Fake tensors of a device that torch must not initialize, though it is said to be available."""

    avoid_device_init = True


class Watch(TorchDispatchMode):
    """Above the fake mode: what crosses between host and device, what waits, what a capture forbids."""

    def __init__(self, truth: bool) -> None:
        super().__init__()
        self.truth = truth

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if torch.is_inference_mode_enabled() and _composite(
            func
        ):  # autograd, which takes them apart, isn't on the way here
            with self:
                return func.decompose(*args, **kwargs)
        if name == "aten::_local_scalar_dense":
            return self._value(args[0])
        if torch.Tag.nondeterministic_seeded in func.tags:
            _check_generator(name, args, kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            _crossing(name, args, kwargs)
        elif name == "aten::nonzero":
            return _everywhere(args[0], "aten::nonzero")
        elif name in INDEXING:
            args = (args[0], _indices(name, args[1], _on_gpu(args[0])), *args[2:])
        if name == "aten::addmm" and func._schema.overload_name == "dtype_out":
            return kwargs["out"]  # torch 2.11's fake takes it for another overload
        if kwargs.get("pin_memory"):
            RUNTIME.forbid("an allocation of pinned memory")
            return PINNED.add(func(*args, **{**kwargs, "pin_memory": False}))
        out = func(*args, **kwargs)
        if name == "aten::lift_fresh" and not isinstance(args[0], FakeTensor):
            with _disable_current_modes():  # torch.tensor(…, pin_memory=True) makes it before any mode is asked
                pinned = args[0].is_pinned()
            if pinned:
                PINNED.add(out)
        if name == "aten::copy_" and args[0] in PINNED and _on_gpu(args[1]):
            PINNED.copied_to(args[0])
        return out

    def _value(self, tensor: Tensor) -> Any:
        if not _on_gpu(tensor):
            PINNED.check(tensor)
            if tensor.constant is not None:
                return tensor.constant.item()
        else:
            RUNTIME.wait("a value")
        if tensor.dtype == torch.bool:
            return self.truth
        return 0.5 if tensor.dtype.is_floating_point else 1


@functools.cache
def _composite(func: Any) -> bool:
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )


def _everywhere(mask: Tensor, what: str) -> Tensor:
    """What nonzero gives, where everything is: its size is data, and the host waits for it."""
    if _on_gpu(mask):
        RUNTIME.wait(what)
    return torch.zeros(mask.numel(), mask.dim(), dtype=torch.int64, device=mask.device)


def _indices(name: str, given: Any, on_gpu: bool) -> list[Any]:
    """Masks among indices as places, which is what torch makes of them."""
    indices: list[Any] = []
    for index in given:
        if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
            indices += _everywhere(index, f"{name} with a mask").unbind(1)
            continue
        if isinstance(index, Tensor) and index.device.type == "cpu" and index.dim() and on_gpu:
            _upload(f"{name} with an index of the host's", index, False)
        indices.append(index)
    return indices


def _on_gpu(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == "cuda"


def _check_generator(name: str, args: Any, kwargs: Any) -> None:
    generator = kwargs.get("generator")
    device = next((a.device for a in args if isinstance(a, Tensor)), torch.device(kwargs.get("device") or "cpu"))
    if device.type != "cuda":
        return
    if RUNTIME.in_capture and generator is not None:
        RUNTIME.forbid(f"{name} with a generator that the capture doesn't know")
    if not RUNTIME.in_capture and not RUNTIME.generator_usable:
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


def _crossing(name: str, args: Any, kwargs: Any) -> None:
    source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], None)
    if not isinstance(source, Tensor):
        return
    there = torch.device(kwargs.get("device") or source.device) if target is None else target.device
    asynchronous = bool(kwargs.get("non_blocking", args[2] if target is not None and len(args) > 2 else False))
    shape = list(source.shape)
    if source.device.type == "cpu" and there.type == "cuda":
        _upload(f"{shape}", source, asynchronous)
    elif source.device.type == "cuda" and there.type == "cpu":
        if asynchronous and target is not None and target in PINNED:
            trace.note(trace.DOWNLOAD, f"{shape}")
        else:
            RUNTIME.wait(f"a copy of {shape} to the host")


def _upload(what: str, source: Tensor, asynchronous: bool) -> None:
    if source.numel() == 0:
        return
    if source in PINNED and asynchronous:
        trace.note(trace.PINNED, what)
        return
    RUNTIME.forbid(f"an upload of {what}")
    kind = trace.STAGED if asynchronous else trace.UPLOAD
    trace.note(kind, f"{what}{', pinned but blocking' if source in PINNED else ''}")


def _tolist(self: FakeTensor) -> Any:
    if _on_gpu(self):
        RUNTIME.wait("tolist")
    elif isinstance(self, FakeTensor):
        PINNED.check(self)
        if self.constant is not None:
            return self.constant.tolist()
    value = 0 if not self.dtype.is_floating_point else 0.5

    def nested(shape: tuple[int, ...]) -> Any:
        return [nested(shape[1:]) for _ in range(shape[0])] if shape else value

    return nested(tuple(self.shape))


def _numpy(self: FakeTensor, *, force: bool = False) -> np.ndarray:
    if _on_gpu(self) and not force:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
    return np.array(_tolist(self), dtype=_NUMPY[self.dtype]).reshape(self.shape)


def _pin(self: Tensor, device: Any = None) -> Tensor:
    if not isinstance(self, FakeTensor):
        raise TypeError(f"a tensor of {list(self.shape)} was made outside h100()")
    RUNTIME.forbid("an allocation of pinned memory")
    return PINNED.add(self.clone())


def _data_ptr(self: FakeTensor) -> int:
    """An address of its own for each storage, aligned as an allocator's."""
    return (1 << 40) + 512 * (self.untyped_storage()._cdata % (1 << 30)) + self.storage_offset() * self.element_size()


def _fused_adamw(*args: Any, **kwargs: Any) -> None:
    """Works in place, and has no fake kernel for a learning rate on the device."""


def install() -> None:
    """What fake tensors lack, for the rest of the process."""
    fake_tensor.init_gpu_context = lambda device: None
    fake_tensor.CONSTANT_NUMEL_LIMIT = 1 << 16  # what torch.tensor makes of the host's numbers keeps its values
    FakeTensor.tolist, FakeTensor.numpy = _tolist, _numpy
    FakeTensor.data_ptr = _data_ptr
    FakeTensor.pin_memory = _pin
    FakeTensor.is_pinned = lambda self, device=None: self in PINNED
    FakeTensor.is_cuda = property(lambda self: self.device.type == "cuda")
    FakeTensor.is_cpu = property(lambda self: self.device.type == "cpu")
    torch._fused_adamw_ = _fused_adamw


@contextlib.contextmanager
def h100(*, truth: bool = True, launchers: bool = True) -> Iterator[None]:
    """Inside, "cuda" works.

    Args:
        truth: of every bool that is read.
        launchers: run the host's code of every op down to the launch; else the shapes that torch.compile is told.
    """
    with (
        _launch.launched_by(Recorder(90) if launchers else _launch.GPU()),
        FakeDevices(allow_non_fake_inputs=True),
        Watch(truth),
        torch.autograd.set_multithreading_enabled(False),
    ):
        yield
