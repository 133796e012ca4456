"""Each thing that the pretended device is to notice, done once."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import trace
from fake_gpu.device import Stale, h100
from fake_gpu.runtime import RUNTIME, Forbidden
from fake_gpu.trace import DOWNLOAD, PINNED, READ, STAGED, UPLOAD, watching

from fastgpt.graphs import CaptureError, capture


@pytest.fixture(autouse=True)
def _h100():
    with h100():
        yield


def on_gpu() -> torch.Tensor:
    with trace.unwatched():
        return torch.tensor([1, 2, 3], device="cuda")


READS = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.all()),
    "int": lambda x: int(x.sum()),
    "float": lambda x: float(x.sum()),
    "format": lambda x: f"{x.sum().item()}",
    "an index into a list": lambda x: [0, 1][x[0] * 0 + 1],
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "copied to pageable memory": lambda x: torch.empty(3, dtype=torch.int64).copy_(x, non_blocking=True),
    "a mask as an index": lambda x: x[x > 1],
    "a mask assigned to": lambda x: x.__setitem__(x > 1, 0),
    "nonzero": lambda x: x.nonzero(),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "a stream's synchronize": lambda x: torch.cuda.current_stream().synchronize(),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_is_noticed_with_its_line(name):
    x = on_gpu()
    with watching() as seen:
        READS[name](x)
    assert seen.count(READ) == len(seen.events) == 1, seen.told()
    assert f"instrument/test_device.py:{READS[name].__code__.co_firstlineno} <lambda>" in seen.events[0].where


UPLOADS = {
    UPLOAD: [
        lambda: torch.tensor([1, 2], device="cuda"),
        lambda: torch.tensor([1, 2]).to("cuda"),
        lambda: torch.tensor([1, 2]).cuda(),
        lambda: torch.tensor([1, 2], pin_memory=True).to("cuda"),
        lambda: on_gpu()[torch.tensor([0, 1])],
        lambda: on_gpu().copy_(torch.tensor([1, 2, 3])),
    ],
    STAGED: [lambda: torch.tensor([1, 2]).to("cuda", non_blocking=True)],
    PINNED: [
        lambda: torch.tensor([1, 2], pin_memory=True).to("cuda", non_blocking=True),
        lambda: torch.tensor([1, 2]).pin_memory()[1:].to("cuda", non_blocking=True),
        lambda: on_gpu().copy_(torch.zeros(3, dtype=torch.int64, pin_memory=True), non_blocking=True),
    ],
}


@pytest.mark.parametrize(("kind", "do"), [(kind, do) for kind, made in UPLOADS.items() for do in made])
def test_an_upload_is_told_by_who_waits(kind, do):
    with watching() as seen:
        do()
    assert [event.kind for event in seen.events] == [kind], seen.told()


FREE = {
    "made there": lambda x: (torch.zeros(3, device="cuda"), torch.arange(3, device="cuda"), x + 1, x.fill_(2)),
    "the host's own": lambda x: (torch.tensor([1, 2]).tolist(), torch.tensor(3).item(), bool(torch.tensor(True))),
    "a mask that selects by value": lambda x: torch.where(x > 1, x, 0),
    "shapes": lambda x: (len(x), x.shape, x.numel(), x.dtype),
    "a backward pass": lambda x: torch.randn(4, 4, device="cuda", requires_grad=True).sum().backward(),
}


@pytest.mark.parametrize("name", FREE)
def test_what_nobody_waits_for_is_free(name):
    x = on_gpu()
    with watching() as seen:
        FREE[name](x)
    assert not seen.events, seen.told()


def test_the_hosts_numbers_keep_their_values():
    x = torch.tensor([3, 1, 2])
    assert (x.tolist(), x.max().item(), x[1:].sum().item(), x.numpy().tolist()) == ([3, 1, 2], 3, 3, [3, 1, 2])


def test_a_copy_to_the_host_must_be_waited_for():
    x = on_gpu()
    host = torch.empty(3, dtype=torch.int64, pin_memory=True)
    before = torch.cuda.Event()
    before.record()
    with watching() as seen:
        host.copy_(x, non_blocking=True)
    assert [event.kind for event in seen.events] == [DOWNLOAD]
    before.synchronize()  # which was before the copy
    with pytest.raises(Stale, match=r"test_device\.py"):
        host.tolist()
    after = torch.cuda.Event()
    after.record()
    after.synchronize()
    assert host.tolist() == [0, 0, 0]


FORBIDDEN = {
    "a read": lambda x: x.tolist(),
    "an upload": lambda x: torch.tensor([1], device="cuda"),
    "a staged upload": lambda x: torch.tensor([1]).to("cuda", non_blocking=True),
    "pinned memory": lambda x: torch.empty(3, pin_memory=True),
    "a synchronization": lambda x: torch.cuda.synchronize(),
    "an event asked": lambda x: torch.cuda.Event().query(),
    "a generator of its own": lambda x: torch.rand(3, device="cuda", generator=torch.Generator("cuda")),
    "a size that is data": lambda x: x.nonzero(),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_a_capture_forbids_names_its_line_and_leaves_the_process_usable(name):
    x = on_gpu()
    with pytest.raises(CaptureError) as caught:
        capture(lambda: FORBIDDEN[name](x), torch.device("cuda"))
    assert f"test_device.py:{FORBIDDEN[name].__code__.co_firstlineno}" in str(caught.value)
    assert isinstance(caught.value.__cause__, Forbidden)
    assert RUNTIME.as_new()
    torch.rand(3, device="cuda")
    replay, _ = capture(lambda: torch.rand(3, device="cuda"), torch.device("cuda"))
    replay()


def test_without_the_door_a_failed_capture_takes_random_numbers_down():
    """As torch 2.11 does."""
    with pytest.raises(RuntimeError, match="previous error during capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        on_gpu().tolist()
    try:
        assert torch.cuda.current_stream() != torch.cuda.default_stream()
        torch.cuda.set_stream(torch.cuda.default_stream())
        with pytest.raises(RuntimeError, match="Offset increment outside graph capture"):
            torch.rand(3, device="cuda")
    finally:
        RUNTIME.generator_usable = True
        RUNTIME.pools.clear()


def test_two_devices_in_one_op_are_an_error():
    with pytest.raises(RuntimeError, match="devices"):
        torch.zeros(3) + on_gpu()


def test_launches_are_counted_by_kernel():
    from fastgpt import ops

    x, w = torch.zeros(4, 64, device="cuda"), torch.ones(64, device="cuda")
    with watching() as seen:
        ops.layer_norm(x, w, w)
    assert sum(seen.kernels.values()) == 1
    with watching() as seen, h100(launchers=False):
        assert ops.layer_norm(x, w, w).shape == x.shape
    assert not seen.kernels
