"""Providers of benchmarks are captured in a CUDA graph: what reads the device there would be timed from the host instead."""

from __future__ import annotations

import pytest
import torch
from fake_gpu.device import h100
from fake_gpu.scenario import ids, model
from fake_gpu.trace import unwatched, watching

from benchmarks.harness import op as harness
from benchmarks.harness.measure import OURS, Absent
from benchmarks.models.graphed import GraphedLoop
from benchmarks.suite import OP_FILES
from fastgpt.graphs import capture

COMPILED = {"FlexAttention"}  # by torch.compile: what it launches isn't here to be seen
ASKS_THE_DRIVER = {"SDPA flash", "SDPA cuDNN"}  # torch's choice among backends, in a build with CUDA
OPS = [entry for file in OP_FILES for entry in file.OPS]


def cases():
    """Each op's first size on a GPU in each mode."""
    for entry in OPS:
        modes: dict[str, object] = {}
        for case in entry.benchmark.cases("gpu"):
            modes.setdefault(case.mode, case)
        for case in modes.values():
            for name in (OURS, harness.PLAIN, *(name for name in entry.peers if name not in COMPILED)):
                yield pytest.param(entry, case, name, id=f"{entry.name}-{case.label}-{name}")


@pytest.mark.parametrize(("entry", "case", "name"), [*cases()])
def test_a_graph_holds_the_provider(entry, case, name, monkeypatch):
    if torch.version.cuda and name in ASKS_THE_DRIVER:
        pytest.skip("in a torch built with CUDA this asks the driver, which isn't here")
    monkeypatch.setattr(harness, "MAX_BUFFERS", {"cuda": 1})
    with h100():
        with unwatched():
            problem = harness.Problem(entry, case)
            try:
                call = problem.call(0, entry.function(name, case))
            except Absent as absent:
                pytest.skip(str(absent))
        with watching() as seen:
            replay, outputs = capture(call, torch.device("cuda"))
            replay()
        assert (seen.captures, seen.replays) == (1, 1)
        assert all(out.is_cuda for out in outputs)


def test_the_loop_written_by_hand_is_captured_once():
    with h100():
        loop = GraphedLoop(model(), 2)
        with watching() as seen:
            for _ in range(2):
                loop.generate(ids(2, 8), 4)
        assert (seen.captures, seen.replays, seen.events) == (1, 6, [])
