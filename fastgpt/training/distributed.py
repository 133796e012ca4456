"""Several processes through PyTorch's own engines: torchrun's process group, DDP, FSDP2.

    torchrun --nproc-per-node 8 -m fastgpt train data/ --out run --parallel fsdp

A process is known by a World. Without torchrun there is one process, and nothing here touches torch.distributed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

# A rank that waits longer than this for another ends with an error; a large checkpoint on a slow disk takes minutes.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process's rank among `size`, and its device."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """The rank that writes files and talks to the terminal."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """x summed over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        if self.size > 1:
            self.sum(torch.zeros(1, device=self.device)).item()

    def together(self, error: BaseException | None) -> None:
        """Raise `error`, and on the ranks that have none a RuntimeError if another has one: nobody waits for the dead."""
        failed = int(self.sum(torch.tensor([float(error is not None)], device=self.device)).item())
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(f"{failed} of {self.size} processes failed; their own message says why")


@contextlib.contextmanager
def launched(device: torch.device | None = None) -> Iterator[World]:
    """This process's World: of a torchrun launch, else alone.

    Args:
        device: "cuda" becomes this process's own GPU of the machine. None: CUDA where there is one, else the CPU.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_torchelastic_launched():
        yield World(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started process {device.index + 1} on a machine with {torch.cuda.device_count()} GPUs; "
                "lower --nproc-per-node, or pass --device cpu"
            )
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ValueError(f"several processes run on cuda or cpu, got device {device}")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process of a torchrun launch with `status`, and without Python's own end.

    DTensor's caches keep the process group, and so gloo's threads, beyond destroy_process_group. One that drops its last tensor
    while Python ends takes a lock that is gone, and the process aborts with all its work done:
    https://github.com/pytorch/pytorch/issues/190489.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Loss(nn.Module):
    """The model's loss as a forward, which is what DDP hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor, starts: Tensor | None = None) -> Tensor:
        return cast(Any, self.model).loss(inputs, targets, starts=starts)


class Engine:
    """The model's loss over `world`: alone, under DDP, or with parameters sharded by FSDP2 (in place).

    FSDP2 groups: each block; and the rest in the root, where a tied embedding and head are one parameter of one group (torch
    2.13 refuses a tie across groups).

    Args:
        kind: "ddp" or "fsdp"; one process uses neither.
        half: with FSDP2, gather parameters as bf16 and reduce gradients in fp32; the shards stay fp32.
    """

    def __init__(self, model: nn.Module, world: World, kind: str, half: bool = False) -> None:
        self.sharded = world.size > 1 and kind == "fsdp"
        self._model: Any = model
        if world.size == 1:
            self.loss: Any = self._model.loss
        elif kind == "ddp":
            ids = [world.device.index] if world.device.type == "cuda" else None
            self._ddp = nn.parallel.DistributedDataParallel(_Loss(model), device_ids=ids, gradient_as_bucket_view=True)
            self.loss = self._ddp
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

            mesh = init_device_mesh(world.device.type, (world.size,))
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
            for block in cast(Any, model).trf_blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            register_fsdp_forward_method(model, "loss")
            self.loss = self._model.loss
        self._ddp_kind = world.size > 1 and kind == "ddp"

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; gradients are exchanged in the last one alone."""
        if self._ddp_kind and not last:
            with self._ddp.no_sync():
                yield
            return
        if self.sharded:
            self._model.set_requires_gradient_sync(last)
        yield


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, on every rank; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
