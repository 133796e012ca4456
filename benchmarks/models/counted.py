"""A training step counted from shapes alone: what it launches and the floor of that, and its peak memory. No kernel runs.

    with Work() as work, Peak(model.parameters()) as peak:
        loss(model).backward()
    work.seconds, work.calls, work.bytes; peak.bytes, peak.at

Both are dispatch modes over tensors of any device, so that the step may run on a GPU, or on torch's fake tensors of one, where it
needs no GPU and no memory: tests/fake_gpu counts GPT-2 124M there, and holds it to limits.

`Work.seconds` is the floor of the ops as they are called, no prediction of any kernel's speed: of each the larger of its traffic
over BANDWIDTH and its FLOPs over RATE, and LEAST. Views and allocations are free. Every other op reads its operands and writes
its results once, those of this project that launch several kernels too; linear_cross_entropy has its three products, and one pass
over the logits and their gradient.

`Peak.bytes` counts live storages after every op: parameters, gradients, activations and what ops return; not an allocator's
rounding, nor what a library or an op of ours keeps to itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of an H100 SXM: what benchmarks.harness.floors is expected to find, and what a large product in bf16 reaches at most.
BANDWIDTH = 3.0e12
RATE = 798e12
LEAST = 2e-6  # of a kernel, however small

# fmt: off
FREE = {
    "view", "transpose", "t", "permute", "unbind", "slice", "select", "expand", "_unsafe_view", "unsqueeze", "squeeze", "alias",
    "detach", "detach_", "as_strided", "split", "split_with_sizes", "lift_fresh", "_reshape_alias", "chunk", "narrow", "reshape",
    "unfold", "diagonal", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "is_same_size", "device",
    "promote_types", "sym_size", "size",
}
WRITES = {"zero_", "fill_", "zeros", "ones", "zeros_like", "ones_like", "full"}
GEMMS = {"mm", "_gemm_activation", "_gemm_residual", "_gemm_gradient"}
# fmt: on


class Work(TorchDispatchMode):
    """Calls, bytes and seconds of each op, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.time: Counter[str] = Counter()

    @property
    def seconds(self) -> float:
        return sum(self.time.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        read, written = _tensors((args, kwargs)), _tensors(out)
        if name in FREE or not read + written:
            return out
        moved = sum(map(held, read)) + sum(map(held, written))
        if name in WRITES:
            moved = sum(map(held, written))
        elif name == "copy_":
            moved = sum(map(held, read))
        elif name == "embedding":
            moved = 2 * sum(map(held, written))  # the rows that it takes of the table
        work = flops(name, [tuple(t.shape) for t in read])
        seconds = max(moved / BANDWIDTH, work / RATE, LEAST)
        if name == "_linear_cross_entropy":
            x, weight = read[:2]
            seconds = work / RATE + 2 * len(x) * len(weight) * x.element_size() / BANDWIDTH
        self.calls[name] += 1
        self.bytes[name] += moved
        self.time[name] += seconds
        return out

    def table(self, most: int = 12) -> str:
        """The ops that take longest, a line each."""
        lines = [
            f"{1e3 * seconds:8.2f} ms {self.calls[name]:5d} x {name:36s} {self.bytes[name] / 1e9:7.1f} GB"
            for name, seconds in self.time.most_common(most)
        ]
        return "\n".join([*lines, f"{1e3 * self.seconds:8.2f} ms {sum(self.calls.values()):5d} ops in all"])


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once, and the op after which they were; `parameters` are alive from the start."""

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes, self.at = 0, ""
        self._now = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        for parameter in parameters:
            self._see(parameter)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for key in [key for key, (storage, _) in self._live.items() if storage.expired()]:
            self._now -= self._live.pop(key)[1]
        for tensor in _tensors((args, kwargs, out)):
            self._see(tensor)
        if self._now > self.bytes:
            self.bytes, self.at = self._now, func._schema.name
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._live:
            self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self._now += storage.nbytes()


def flops(name: str, shapes: list[tuple[int, ...]]) -> float:
    """Of an op by the shapes of its operands; 0 where its traffic is what counts."""
    if name in GEMMS:
        return 2.0 * math.prod(shapes[0]) * shapes[1][1]
    if name == "addmm":
        return 2.0 * math.prod(shapes[1]) * shapes[2][1]
    if name == "bmm":
        return 2.0 * math.prod(shapes[0]) * shapes[1][2]
    if name == "_linear_cross_entropy":
        return 6.0 * math.prod(shapes[0]) * shapes[1][0]
    if "attention" in name and "decode" not in name:
        backward = "bwd" in name or "backward" in name
        (B, H, T, D), (*_, S, _) = shapes[backward], shapes[backward + 1]
        return (5.0 if backward else 2.0) * B * H * T * S * D  # causal: half of 10 and 4
    return 0.0


def held(tensor: Tensor) -> int:
    """Bytes that reading all of it moves: dimensions of stride 0 are one."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return math.prod(sizes) * tensor.element_size()


def _tensors(tree: Any) -> list[Tensor]:
    """Those of a device of its own; the host's numbers cost nothing."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type != "cpu"]
