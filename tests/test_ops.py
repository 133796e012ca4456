"""Dispatch: which implementation a call gets, why, and what happens when the one asked for can't run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastgpt import ops, reference, use_backend

ROOT = Path(__file__).parent.parent


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FASTGPT_BACKEND")}
    env |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


def test_cpu_tensors_take_the_reference():
    x, w = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(ops.layer_norm(x, w, None), reference.layer_norm(x, w, None))
    assert ops.explain("layer_norm", x.device, x.dtype)[0] == "reference"


def test_use_backend_nests_and_restores_after_an_error():
    assert ops.current_backend() == "auto"
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("triton"):
            raise KeyError
        assert ops.current_backend() == "reference"
    assert ops.current_backend() == "auto"
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'cuda'"), use_backend("cuda"):
        pass


def test_use_backend_as_a_call_holds_from_then_on():
    try:
        use_backend("reference")
        assert ops.current_backend() == "reference"
        with use_backend("triton"):
            assert ops.current_backend() == "triton"
        assert ops.current_backend() == "reference"
        with pytest.raises(ValueError, match="got 'nope'"):
            use_backend("nope")
        assert ops.current_backend() == "reference"
    finally:
        use_backend("auto")
    assert ops.current_backend() == "auto"


def test_contexts_of_several_threads_leave_nothing_behind():
    entered, left = threading.Barrier(2), threading.Barrier(2)

    def first() -> None:
        with use_backend("reference"):
            entered.wait()
            left.wait()  # leaves while the other is inside

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait()
    with use_backend("triton"):
        left.wait()
        thread.join()
        assert ops.current_backend() == "triton", "the newest that is open"
    assert ops.current_backend() == "auto"

    # Any order of entering and leaving, many at once.
    def hurry(name: str) -> None:
        for _ in range(300):
            with use_backend(name), use_backend("auto"):
                pass

    threads = [threading.Thread(target=hurry, args=(name,)) for name in ("reference", "triton", "auto", "reference")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ops.current_backend() == "auto"


def test_asking_for_triton_on_the_cpu_raises_with_the_reason():
    code = """
import torch
from fastgpt import GPTModel, PRESETS, use_backend
model = GPTModel(PRESETS["gpt2"].replace(n_layers=1, emb_dim=64, n_heads=1, vocab_size=64))
with use_backend("triton"):
    model(torch.zeros(1, 4, dtype=torch.long))
"""
    done = run(code)
    assert done.returncode == 1
    assert "ValueError: backend 'triton' was asked for, but" in done.stderr
    assert "tensors are on cpu; Triton kernels need a CUDA device" in done.stderr


def test_environment_variable_chooses_and_is_checked():
    code = "from fastgpt import ops; print(ops.current_backend())"
    assert run(code, FASTGPT_BACKEND="reference").stdout.strip() == "reference"
    done = run(code, FASTGPT_BACKEND="fast")
    assert "FASTGPT_BACKEND must be one of ('auto', 'triton', 'reference'), got 'fast'" in done.stderr


def test_missing_triton_is_said_with_the_install_hint(monkeypatch):
    monkeypatch.setattr(ops, "_TRITON_INSTALLED", False)
    assert "pip install triton" in ops.triton_unavailable(torch.device("cuda"), torch.bfloat16)
    assert ops.explain("mlp", torch.device("cuda"), torch.bfloat16)[0] == "reference"


@pytest.mark.gpu
def test_cuda_tensors_take_triton_with_a_reason():
    device = torch.device("cuda")
    for op in ops.OPS:
        module, reason = ops.explain(op, device, torch.bfloat16)
        assert module == "triton"
        assert reason
    assert ops.explain("mlp", device, torch.int8)[0] == "reference"
