"""What a launch asks of its surroundings."""

from __future__ import annotations

import numpy
import pytest
import torch
import triton

import fastgpt_kernels
from fastgpt import ops
from fastgpt_kernels import _launch


class Abacus:
    """Takes launches on tensors of any one type of device, and makes none."""

    device_types = ("meta",)

    def __init__(self):
        self.grids = []

    def launch(self, kernel, grid, args, kwargs):
        self.grids.append(grid)

    def arch(self, device):
        return 123

    def sm_count(self, device):
        return 7


def test_whoever_launches_is_asked_everything():
    abacus, meta = Abacus(), torch.device("meta")
    with _launch.launched_by(abacus):
        _launch.launch(None, (3, 1), 5)
        _launch.launch(None, (3, 0), 5)
        assert (abacus.grids, _launch.arch(meta), _launch.sm_count(meta)) == ([(3, 1)], 123, 7)
        assert ops.triton_unavailable(meta, torch.bfloat16) is None
        assert "tensors are on cpu" in ops.triton_unavailable(torch.device("cpu"), torch.bfloat16)
        with pytest.raises(ValueError, match="gelu: Triton kernels need CUDA tensors, got cpu"):
            fastgpt_kernels.gelu(torch.ones(3))


def test_the_launcher_before_comes_back_after_an_error():
    before = _launch.device_types()
    with pytest.raises(KeyError), _launch.launched_by(Abacus()):
        raise KeyError
    assert _launch.device_types() == before


@pytest.mark.parametrize(
    ("compiler", "arrays", "runs"),
    [("3.6.0", "2.5.5", False), ("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.4.6", True)],
)
def test_an_interpreter_that_fails_in_every_loop_says_why(compiler, arrays, runs, monkeypatch):
    monkeypatch.setattr(triton, "__version__", compiler)
    monkeypatch.setattr(numpy, "__version__", arrays)
    if runs:
        _launch._check_interpreter.__wrapped__()
        return
    with pytest.raises(RuntimeError, match=rf"Triton {compiler} doesn't run with numpy {arrays}: install numpy<2\.4"):
        _launch._check_interpreter.__wrapped__()
