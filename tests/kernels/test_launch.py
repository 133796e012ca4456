"""What a launch asks of its surroundings."""

from __future__ import annotations

import os
import subprocess
import sys

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


MATMUL = "torch.backends.cuda.matmul"
SETTINGS = [
    [("pass", False), *((f"torch.set_float32_matmul_precision({p!r})", p != "highest") for p in ("high", "medium", "highest"))],
    [(f"{MATMUL}.allow_tf32 = True", True), (f"{MATMUL}.allow_tf32 = False", False)],
    [("torch.backends.fp32_precision = 'tf32'", True), (f"{MATMUL}.fp32_precision = 'ieee'", False),
     (f"{MATMUL}.fp32_precision = 'tf32'", True)],
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=["set_float32_matmul_precision", "allow_tf32", "fp32_precision"])
def test_fp32_products_follow_each_of_torchs_settings_and_others_ask_nothing(settings):
    """Each way in a process of its own, since after one of them torch may refuse the others."""
    lines = ["import torch", "from fastgpt_kernels import _launch, attention"]
    for setting, expected in settings:
        lines += [setting, f"assert _launch.tf32(torch.float32) is {expected}, {setting!r}"]
    lines += ["q = torch.randn(1, 1, 3, 16)", "attention(q, q, q)", "q = q.half()"]
    lines += [f"{MATMUL} = None  # whoever asks now fails", "attention(q, q, q)"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-W", "ignore", "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_host_arithmetic_is_tritons():
    for a in range(40):
        assert _launch.next_power_of_2(a + 1) == triton.next_power_of_2(a + 1)
        assert all(_launch.cdiv(a, b) == triton.cdiv(a, b) for b in range(1, 9))
