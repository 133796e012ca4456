"""A capture that fails says which line broke it, and leaves torch as it was."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fastgpt.graphs import CaptureError, Graph, capture


class Runtime:
    """torch.cuda's capture, without a GPU: what torch 2.11's does with a stream, the generator and a memory pool."""

    def __init__(self, monkeypatch):
        self.current, self.capturing, self.invalid = "outside", False, False
        self.generator_usable, self.pools, self.replays = True, [], 0
        runtime, cuda = self, torch.cuda

        class Stream:
            device_index = 0

            def __init__(self, name="side"):
                self.name = name

            def wait_stream(self, other):
                pass

        class CUDAGraph:
            def replay(self):
                runtime.replays += 1

        class Capture:
            def __init__(self, graph, pool, stream, capture_error_mode):
                self.pool, self.stream = pool, stream

            def __enter__(self):
                self.before, runtime.current = runtime.current, self.stream.name
                runtime.capturing, runtime.generator_usable = True, False
                runtime.pools.append(self.pool)

            def __exit__(self, *error):
                runtime.capturing = False
                if runtime.invalid:
                    runtime.invalid = False
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nhints")
                runtime.pools.remove(self.pool)
                runtime.generator_usable, runtime.current = True, self.before

        class Generator:
            def clone_state(self):
                return "a copy"

            def graphsafe_set_state(self, state):
                runtime.generator_usable = state == "a copy"

        @contextlib.contextmanager
        def on(stream):
            before, runtime.current = runtime.current, stream.name
            yield
            runtime.current = before

        def end_pool(device, pool):
            if pool not in runtime.pools:
                raise RuntimeError("not currently recording to mempool_id")

        names = {
            "device": lambda device: contextlib.nullcontext(),
            "Stream": Stream,
            "stream": on,
            "current_stream": lambda: Stream(runtime.current),
            "set_stream": lambda stream: setattr(runtime, "current", stream.name),
            "CUDAGraph": CUDAGraph,
            "graph": Capture,
            "graph_pool_handle": lambda: (0, 1),
            "default_generators": (Generator(),),
        }
        for name, value in names.items():
            monkeypatch.setattr(cuda, name, value, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_pool, raising=False)
        monkeypatch.setattr(
            torch._C, "_cuda_releasePool", lambda device, pool: runtime.pools.remove(pool), raising=False
        )

    def read(self):
        """What a capture doesn't allow."""
        if self.capturing:
            self.invalid = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch for it")

    def as_before(self):
        return self.current == "outside" and self.generator_usable and not self.pools and not self.capturing


@pytest.fixture
def runtime(monkeypatch):
    return Runtime(monkeypatch)


def test_what_a_warm_up_moves_is_put_back_and_the_outputs_are_the_captures(runtime):
    x, calls = torch.zeros(2), []

    def run():
        calls.append((runtime.current, runtime.capturing))
        return x.add_(1)

    replay, outputs = capture(run, torch.device("cuda"), moved=[x], warmups=2)
    assert calls == [("side", False), ("side", False), ("side", True)]
    assert outputs.tolist() == [1, 1]  # of the capture alone, which on a GPU runs nothing
    replay()
    assert runtime.replays == 1
    assert runtime.as_before()


def test_a_failed_capture_names_the_line_and_leaves_torch_usable(runtime):
    def run():
        runtime.read()

    with pytest.raises(CaptureError) as caught:
        capture(run, torch.device("cuda"))
    told = str(caught.value)
    assert "no CUDA graph can hold `raise RuntimeError(" in told  # the innermost line that isn't torch's
    assert "test_graphs.py:" in told
    assert "operation not permitted when stream is capturing" in told
    assert "previous error" not in told
    assert runtime.as_before()


def test_a_capture_that_only_fails_at_its_end(runtime):
    def run():
        runtime.invalid |= runtime.capturing

    with pytest.raises(
        CaptureError, match="couldn't be ended, and no op in it had raised: CUDA error: operation failed"
    ):
        capture(run, torch.device("cuda"))
    assert runtime.as_before()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), KeyboardInterrupt(), ValueError("of its own")])
@pytest.mark.parametrize("invalid", [False, True])
def test_what_is_no_graphs_fault_is_raised_as_it_is(runtime, error, invalid):
    def run():
        if runtime.capturing:
            runtime.invalid = invalid
            raise error

    with pytest.raises(type(error)) as caught:
        capture(run, torch.device("cuda"))
    assert caught.value is error
    assert runtime.as_before()


def test_a_graph_that_could_not_be_captured_is_captured_at_the_next_call(runtime):
    broken = [True]
    graph = Graph([], torch.device("cuda"))

    def run():
        if broken:
            runtime.read()

    with pytest.raises(CaptureError):
        graph(run)
    broken.clear()
    graph(run)
    assert runtime.replays == 1


@pytest.mark.gpu
def test_on_a_gpu_random_numbers_and_captures_go_on_after_a_failed_one(device):
    x, outside = torch.zeros(4, device=device), torch.cuda.current_stream(device)
    torch.manual_seed(3)
    expected = torch.rand(8, device=device)

    with pytest.raises(CaptureError, match=r"x\.tolist\(\)"):
        capture(lambda: (torch.rand(8, device=device), x.tolist()), device, warmups=0)
    assert torch.cuda.current_stream(device) == outside
    torch.manual_seed(3)
    torch.testing.assert_close(torch.rand(8, device=device), expected, rtol=0, atol=0)

    replay, drawn = capture(lambda: torch.rand(8, device=device), device)
    torch.manual_seed(3)
    replay()
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0)
