"""Signals and kills: a run ends with a whole checkpoint and goes on as if it had not ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from training_runs import TOKENIZER, at_step, equal, trainer, values

from fastgpt import GPTModel
from fastgpt.text.tokenizer import load_tokenizer
from fastgpt.training import checkpoint
from fastgpt.training.checkpoint import STATE
from fastgpt.training.progress import LOG

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def handlers() -> Iterator[tuple[Any, Any]]:
    """Handlers of our own, so that a signal that the run doesn't take fails the test and not the process."""

    def stray(number: int, frame: Any) -> None:
        raise AssertionError(f"signal {number} went past the run")

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stray) for number in numbers]
    yield stray, stray
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_with_a_whole_checkpoint(tmp_path, handlers, number):
    run = trainer(tmp_path)
    assert run.run(at_step(4, lambda: os.kill(os.getpid(), number))) == number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert (run.step, run.log[-1]["step"]) == (4, 4)
    loaded = GPTModel.from_pretrained(tmp_path)
    assert equal(values(loaded), values(run.model))
    assert load_tokenizer(tmp_path).decode(range(101)) == TOKENIZER.decode(range(101))
    resumed = trainer(tmp_path)
    resumed.resume()
    assert resumed.step == 4
    assert equal(values(resumed.model), values(run.model))


def test_a_second_signal_interrupts_at_once_and_spoils_nothing(tmp_path, handlers):
    run = trainer(tmp_path)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run.run(at_step(8, twice))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = trainer(tmp_path)
    resumed.resume()
    assert resumed.step == 6


def test_training_works_off_the_main_thread(tmp_path):
    run, results = trainer(tmp_path, max_steps=2), []
    thread = threading.Thread(target=lambda: results.append(run.run()))
    thread.start()
    thread.join()
    assert results == [None]
    assert run.step == 2


@pytest.mark.parametrize(("optimizer", "kills"), [("adamw", 20), ("muon", 6)])
def test_kills_change_nothing(tmp_path, optimizer, kills):
    """SIGKILL at random moments: the weights are those of a run that was never stopped, bit for bit."""
    paths = (ROOT, ROOT / "kernels", ROOT / "tests")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "killed_runs.py"), str(tmp_path), str(kills), optimizer]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=400, check=True)
    result = json.loads(done.stdout)
    assert result["statuses"] == [signal.SIGKILL] * kills + [0, 0], done.stderr
    assert 0 < result["reached"][-1] < result["steps"]
    if kills == 20:
        assert any(name.endswith(".partial") for name in result["leftovers"])  # it was killed inside a checkpoint
    states = [checkpoint.place(tmp_path / name, result["steps"]) / STATE for name in ("killed", "straight")]
    assert states[0].read_bytes() == states[1].read_bytes()
    models = [safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("killed", "straight")]
    assert equal(*models)
    logs = [(tmp_path / name / LOG).read_text().splitlines() for name in ("killed", "straight")]
    entries = [[(entry["step"], entry.get("loss")) for entry in map(json.loads, lines)] for lines in logs]
    assert entries[0] == entries[1]
    assert not list((tmp_path / "killed").rglob(".*"))


def test_the_command_is_killed_and_resumed(tmp_path):
    """One real SIGKILL of `fastgpt train`; then the same command with --resume alone, and SIGTERM, which it says it ended by."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 60, encoding="utf-8")
    out = tmp_path / "run"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastgpt", "train", str(tmp_path / "text.txt"), "--out", str(out)]
    small = ["--tokenizer", "char", "--layers", "1", "--heads", "2", "--width", "32", "--context", "16"]
    small += ["--batch-size", "4", "--max-steps", "1000000", "--checkpoint-every", "3"]

    def until(more_than: int, arguments: list[str], number: int) -> tuple[int, str]:
        process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None and checkpoint.steps(out)[-1:] <= [more_than]:
            time.sleep(0.02)
        process.send_signal(number)
        _, error = process.communicate(timeout=100)
        return process.returncode, error.decode()

    assert until(3, small, signal.SIGKILL)[0] == -signal.SIGKILL
    reached = checkpoint.steps(out)[-1]
    status, error = until(reached, ["--resume"], signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at step" in error
    assert "Traceback" not in error
    manifest = checkpoint.read_manifest(out)
    assert manifest["step"] > reached
    steps = [entry["step"] for entry in map(json.loads, (out / LOG).read_text().splitlines()) if "loss" in entry]
    assert steps == list(range(1, manifest["step"] + 1))
    assert (manifest["settings"]["tokenizer"], manifest["settings"]["width"]) == ("char", 32)
