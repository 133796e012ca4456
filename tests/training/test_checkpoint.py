"""A run resumed is the run uninterrupted; checkpoints that fail, are damaged, or belong to another run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_config, tiny_model
from training_runs import TOKENS, at_step, equal, files, losses, trainer, values

from fastgpt import GPTModel
from fastgpt.checkpoints import weights
from fastgpt.text.data import TokenStream
from fastgpt.training import checkpoint, new_model
from fastgpt.training.checkpoint import STATE, CheckpointError
from fastgpt.training.progress import LOG


def crash() -> None:
    raise MemoryError("the machine is gone")


@pytest.mark.parametrize("how", ["signal", "crash", "crash later"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, how):
    straight = trainer(tmp_path / "straight")
    straight.run()
    stopped = trainer(tmp_path / "stopped")
    if how == "signal":
        assert stopped.run(at_step(6, lambda: os.kill(os.getpid(), signal.SIGINT))) == signal.SIGINT
    else:
        with pytest.raises(MemoryError, match="the machine is gone"):
            stopped.run(at_step(7 if how == "crash" else 10, crash))
    resumed = trainer(tmp_path / "stopped", new_model(tiny_config(drop_rate=0.2), 99, torch.device("cpu")))
    torch.manual_seed(12345)
    resumed.resume()
    assert resumed.step == 6
    assert resumed.run() is None
    assert losses(resumed) == losses(straight)
    assert len({loss for _, _, loss in losses(straight)}) == 12 + 3
    assert equal(values(resumed.model), values(straight.model))
    logs = [(tmp_path / name / LOG).read_text().splitlines() for name in ("straight", "stopped")]
    assert [json.loads(line).get("loss") for line in logs[0]] == [json.loads(line).get("loss") for line in logs[1]]
    saved = [values(GPTModel.from_pretrained(tmp_path / name)) for name in ("straight", "stopped")]
    assert equal(*saved)


def test_a_run_can_be_made_longer(tmp_path):
    run = trainer(tmp_path)
    run.run()
    longer = trainer(tmp_path, max_steps=14, validate_every=2, checkpoint_every=1)
    longer.resume()
    assert (longer.step, len(longer.log)) == (12, len(run.log))
    longer.run()
    assert [step for step, key, _ in losses(longer) if key == "loss"] == list(range(1, 15))


@pytest.mark.parametrize("when", ["state", "manifest", "rename", "model"])
def test_a_checkpoint_that_fails_leaves_the_one_before(tmp_path, monkeypatch, when):
    run = trainer(tmp_path)
    with pytest.raises(MemoryError):
        run.run(at_step(7, crash))
    before = files(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        if when == "state":
            Path(args[1]).write_bytes(b"half")
        raise OSError("disk full")

    places = {
        "state": (checkpoint, "save_file"),
        "manifest": (checkpoint, "write_text"),
        "rename": (checkpoint.os, "rename"),
        "model": (weights, "save_pretrained"),
    }
    monkeypatch.setattr(*places[when], fail)
    with pytest.raises(CheckpointError, match="disk full; the last whole checkpoint is") as caught:
        run.checkpoint()
    monkeypatch.undo()
    assert str(caught.value).endswith(f"checkpoints{os.sep}step-0000000{7 if when == 'model' else 6}")
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert when == "model" or after.keys() == before.keys()
    resumed = trainer(tmp_path)
    resumed.resume()
    assert resumed.step == (7 if when == "model" else 6)


def test_a_full_disk_is_named_and_the_last_checkpoint_kept(tmp_path):
    """The kernel itself refuses: no file may pass 40 kB, and the state has more."""
    run = trainer(tmp_path)
    run.run(at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    before = files(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    further = trainer(tmp_path)
    further.resume()
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written: .*last whole checkpoint is .*step-00000006"):
            further.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == before
    assert further.step == 12
    again = trainer(tmp_path)
    again.resume()
    assert again.step == 6
    again.run()


def test_a_log_that_the_disk_refuses_names_the_last_checkpoint(tmp_path):
    run, limits = trainer(tmp_path, checkpoint_every=5), resource.getrlimit(resource.RLIMIT_FSIZE)

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / LOG).stat().st_size + 10, limits[1]))

    try:
        with pytest.raises(OSError, match=r"the log can't be written: .*the last whole checkpoint is .*step-00000005"):
            run.run(at_step(7, full))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resumed = trainer(tmp_path, checkpoint_every=5)
    resumed.resume()
    assert (resumed.step, len(resumed.log)) == (5, 6)


def test_the_newest_checkpoints_are_kept(tmp_path):
    run = trainer(tmp_path, checkpoint_every=2, keep=3)
    run.run()
    assert checkpoint.steps(tmp_path) == [8, 10, 12]
    assert not list(tmp_path.rglob(".*"))


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    run.run()
    before = files(tmp_path)
    (tmp_path / "checkpoints" / ".step-00000004.partial").mkdir()
    (tmp_path / "checkpoints" / ".step-00000004.partial" / STATE).write_bytes(b"half")
    (tmp_path / "checkpoints" / ".step-00000001.old").mkdir()
    (tmp_path / ".model.safetensors.0123456789abcdef").write_bytes(b"half")
    (tmp_path / ".tmpNHS7hy").write_bytes(b"half")
    (tmp_path / ".mine").write_bytes(b"not the run's")
    again = trainer(tmp_path, max_steps=2)
    again.resume()
    again.run()
    assert files(tmp_path).keys() == {*before, ".mine"}


@pytest.fixture
def finished(tmp_path) -> Path:
    trainer(tmp_path / "run", max_steps=2).run()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"lr": 1e-4}, "lr: 0.003 in the checkpoint, 0.0001 now"),
        ({"batch_size": 4}, "batch_size: 3 in the checkpoint, 4 now"),
        ({"seed": 12}, "seed: 11 in the checkpoint, 12 now"),
        ({"weight_decay": 0.0}, "weight_decay: 0.1 in the checkpoint, 0.0 now"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' in the checkpoint, 'bfloat16' now"),
        ({"warmup_steps": 5}, "warmup_steps: 4 in the checkpoint, 5 now"),
    ],
)
def test_other_settings_are_refused_by_name(finished, changes, difference):
    run = trainer(finished, **changes)
    before = values(run.model)
    with pytest.raises(ValueError, match="step-00000002 was made with other settings") as caught:
        run.resume()
    assert difference in str(caught.value)
    assert f"To go on from its weights with these, begin a new run: --init {finished} --out" in str(caught.value)
    assert str(caught.value).count("\n") == 2
    assert run.step == 0
    assert equal(values(run.model), before)


def test_another_model_or_text_is_refused_by_name(finished):
    run = trainer(finished, tiny_model(n_layers=1, qkv_bias=False, drop_rate=0.2), beta1=0.5)
    with pytest.raises(ValueError, match="other settings") as caught:
        run.resume()
    for difference in ("n_layers: 2 in the checkpoint, 1 now", "qkv_bias: True in the", "beta1: 0.9 in the"):
        assert difference in str(caught.value)
    run = trainer(finished)
    run.data = TokenStream(TOKENS[:999], 16, 3, 11)
    with pytest.raises(ValueError, match="tokens: 1000 in the checkpoint, 999 now"):
        run.resume()


def test_fewer_steps_than_were_made_are_refused(finished):
    run = trainer(finished, max_steps=1)
    with pytest.raises(ValueError, match=r"max_steps must be at least the 2 steps that .*run has made, got 1"):
        run.resume()


def test_nothing_to_resume_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing to resume: .*checkpoints has no checkpoint"):
        trainer(tmp_path).resume()


def test_damaged_checkpoints_are_refused_with_the_last_whole_one_named(tmp_path):
    run = trainer(tmp_path, max_steps=12, checkpoint_every=6)
    run.run()
    newest = checkpoint.place(tmp_path, 12)
    whole, manifest = (newest / STATE).read_bytes(), (newest / "manifest.json").read_bytes()
    other = trainer(tmp_path)
    before = values(other.model)
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    damages: list[tuple[str, bytes | None]] = [(STATE, whole[:size]) for size in (0, 100, len(whole) - 1)]
    damages += [(STATE, bytes(flipped)), (STATE, None), ("manifest.json", None), ("manifest.json", b"{}")]
    damages += [("manifest.json", manifest[:50]), ("manifest.json", b"[" * 99999), ("manifest.json", b"\xff")]
    for name, content in damages:
        if content is None:
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="step-00000012 is not a whole checkpoint") as caught:
            other.resume()
        assert f"the last whole checkpoint is {checkpoint.place(tmp_path, 6)}" in str(caught.value)
        assert other.step == 0
        assert equal(values(other.model), before)
        (newest / STATE).write_bytes(whole)
        (newest / "manifest.json").write_bytes(manifest)
    shutil.rmtree(newest)
    other.resume()
    assert other.step == 6


def test_a_manifest_reaches_no_file_outside_its_checkpoint(finished, tmp_path):
    path = checkpoint.place(finished, 2) / "manifest.json"
    manifest = json.loads(path.read_text())
    (tmp_path / "secret").write_bytes(b"abc")
    manifest["files"]["../../../secret"] = [3, 0]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="it lacks"):
        trainer(finished).resume()


def test_a_run_of_the_older_layout_says_how_to_go_on(finished):
    shutil.rmtree(finished / "checkpoints")
    (finished / "state.pt").write_bytes(b"old")
    with pytest.raises(CheckpointError, match=f"state.pt, which is read no more; .* --init {finished}"):
        trainer(finished).resume()


def test_half_a_line_in_the_log_is_forgotten(finished):
    lines = (finished / LOG).read_text().splitlines(keepends=True)
    (finished / LOG).write_text("".join(lines) + lines[-1][:17])
    run = trainer(finished)
    run.resume()
    run.resume()
    assert [json.dumps(entry) + "\n" for entry in run.log] == lines


def test_what_does_not_change_the_result_may_change_on_resuming(finished):
    run = trainer(finished, accumulate=3, recompute=True, keep=5, sample_every=3, max_steps=4, log_every=2)
    run.resume()
    run.run()
    assert [entry["step"] for entry in run.log if "sample" in entry] == [3]
