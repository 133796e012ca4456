"""What a training step of GPT-2 124M launches, and what it holds, counted from shapes: no more than when it was last lowered."""

from __future__ import annotations

import torch
from fake_gpu.device import h100
from fake_gpu.scenario import ids, made

from benchmarks.models.counted import Peak, Work
from fastgpt import PRESETS, GPTModel

B, T = 32, 1024

# Of the step in bf16 autocast, forward and backward. Lower them with what lowers the counts.
MILLISECONDS = 44.4
OPS = 515
GIGABYTES = 12.14


def step(*modes):
    with h100(launchers=False):
        net = made(lambda: GPTModel(PRESETS["gpt2"].replace(drop_rate=0.0))).train()
        idx = ids(B, T)
        for mode in (made_of := [make(net) for make in modes]):
            mode.__enter__()
        with torch.autocast("cuda", torch.bfloat16):
            loss = net.loss(idx, idx)
        loss.backward()
        for mode in reversed(made_of):
            mode.__exit__(None, None, None)
    return made_of


def test_work():
    (work,) = step(lambda net: Work())
    assert 1e3 * work.seconds <= MILLISECONDS, work.table()
    assert sum(work.calls.values()) <= OPS, work.table(60)
    assert work.seconds > 0.03  # its products alone: something was counted


def test_peak_memory():
    (peak,) = step(lambda net: Peak(net.parameters()))
    assert peak.bytes / 1e9 <= GIGABYTES, peak.at
    assert peak.bytes > 3 * 4 * 124e6  # parameters, gradients, and more
