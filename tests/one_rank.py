"""DistributedDataParallel of one rank, without a backend's threads.

gloo's drop tensors by themselves, for which they need Python's lock, while `destroy_process_group` holds it and waits for them: a
test that hangs, one run in many. https://github.com/pytorch/pytorch/issues/190489
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextlib.contextmanager
def data_parallel(model: nn.Module) -> Iterator[nn.parallel.DistributedDataParallel]:
    """`model` wrapped, among the one rank that there is. Its gradients are gathered in buckets and summed over that rank."""
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped.register_comm_hook(None, _sum_over_one_rank)
        yield wrapped
    finally:
        dist.destroy_process_group()


def _sum_over_one_rank(state, bucket):  # without annotations: DDP reads them, and not as strings
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
