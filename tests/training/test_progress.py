"""What a run says of itself: its log, the curve, samples, tensorboard and wandb, utilisation."""

from __future__ import annotations

import json
import math
import sys
import types
from typing import Any

import pytest
import torch
from models import tiny_model
from training_runs import TOKENIZER, trainer

from fastgpt.config import PRESETS
from fastgpt.training import checkpoint
from fastgpt.training.progress import CURVE, LOG, flops_per_token, peak_flops, summary
from fastgpt.training.settings import TrainSettings


def test_the_log_has_every_step_and_the_curve_is_drawn(tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="needs matplotlib")
    run, reported = trainer(tmp_path), []
    run.run(reported.append)
    entries = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert entries == run.log == reported
    steps = [entry["step"] for entry in entries if "loss" in entry]
    assert steps == list(range(1, 13))
    assert [entry["step"] for entry in entries if "validation_loss" in entry] == [5, 10, 12]
    for entry in entries:
        assert math.isfinite(entry.get("loss", entry.get("validation_loss")))
        assert entry.get("lr", 1) > 0
        assert entry.get("tokens_per_second", 1) > 0
    assert run.draw_curve() == tmp_path / CURVE
    drawn = image.imread(tmp_path / CURVE)
    run.log.clear()
    run.draw_curve()
    empty = image.imread(tmp_path / CURVE)
    blue = (drawn[..., 2] > drawn[..., 0] + 0.2).sum()  # the first two colours of matplotlib's cycle
    orange = (drawn[..., 0] > drawn[..., 2] + 0.2).sum()
    assert blue > 300
    assert orange > 300
    assert not (empty[..., 2] > empty[..., 0] + 0.2).any()


def test_no_curve_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = trainer(tmp_path)
    assert run.draw_curve() is None
    assert not (tmp_path / CURVE).exists()


def test_samples_are_text_by_the_model(tmp_path):
    run = trainer(tmp_path, sample_every=6, sample_prompt="!#", sample_tokens=5)
    run.run()
    samples = {entry["step"]: entry["sample"] for entry in run.log if "sample" in entry}
    assert samples.keys() == {6, 12}
    generator = torch.Generator().manual_seed(11)
    idx = torch.tensor([TOKENIZER.encode("!#")])
    ids = run.model.generate(idx, 5, temperature=0.8, top_k=101, generator=generator)
    assert samples[12] == TOKENIZER.decode(ids[0].tolist())


def test_a_sample_ends_no_run(tmp_path, monkeypatch):
    """Ids that the tokenizer lacks are shown as such; and whatever happens to a sample, the step is kept."""
    wide = tiny_model(vocab_size=3000, n_layers=1)  # the tokenizer has 101
    run = trainer(tmp_path / "wide", wide, max_steps=1, sample_every=1)
    run.run()
    (sample,) = [entry["sample"] for entry in run.log if "sample" in entry]
    assert "\ufffd" in sample

    def fails(run: Any) -> str:
        raise RuntimeError("no sample")

    run = trainer(tmp_path / "run", max_steps=2, sample_every=1, checkpoint_every=1)
    monkeypatch.setattr(type(run), "sample", fails)
    with pytest.raises(RuntimeError, match="no sample"):
        run.run()
    assert checkpoint.steps(tmp_path / "run") == [1]


def test_mfu_is_by_llmc_s_convention(tmp_path):
    # facts of llm.c's train_gpt2.cu: 6 N + 6 L C T for 124,439,808 parameters at T = 1024
    assert flops_per_token(PRESETS["gpt2"], 1024) == 6 * 124_439_808 + 6 * 12 * 768 * 1024
    assert peak_flops(TrainSettings(), "NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops(TrainSettings(), "NVIDIA A100-SXM4-40GB") == 312e12
    for name in ("NVIDIA RTX A1000", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "Tesla V100"):
        assert peak_flops(TrainSettings(), name) is None
    assert peak_flops(TrainSettings(), "NVIDIA L40") == 181e12, "an L4 is another card"
    assert peak_flops(TrainSettings(), "NVIDIA GH200 480GB") == 989e12
    assert peak_flops(TrainSettings(), "Some other GPU") is peak_flops(TrainSettings(), None) is None
    run = trainer(tmp_path, tiny_model(), peak_tflops=0.001, max_steps=4)
    run.run()
    for entry in run.log:
        if "loss" in entry:
            expected = entry["tokens_per_second"] * flops_per_token(run.model.config, 16) / 1e9
            assert entry["mfu"] == pytest.approx(expected, abs=1e-4, rel=1e-3)


def test_the_summary_is_of_the_log():
    entries: list[dict[str, Any]] = [
        {"step": i, "loss": float(i), "tokens_per_second": 10.0 * i, "mfu": 0.1 * i} for i in range(1, 8)
    ]
    entries += [{"step": 3, "validation_loss": 0.5}, {"step": 7, "validation_loss": 0.75}]
    found = summary(entries)
    assert (found["steps"], found["loss_of_last_100_steps"], found["tokens_per_second"]) == (7, 4.0, 50.0)
    assert (found["validation_loss"], found["best_validation_loss"], found["best_step"]) == (0.75, 0.5, 3)
    assert summary([]) == {"steps": 0}


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer(tmp_path, tiny_model(), tensorboard=True, max_steps=3, sample_every=2)
    run.run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [(scalar.step, pytest.approx(scalar.value, rel=1e-6)) for scalar in events.Scalars("loss")]
    assert [(entry["step"], entry["loss"]) for entry in run.log if "loss" in entry] == logged
    assert "validation_loss" in events.Tags()["scalars"]


def test_wandb_gets_every_number(tmp_path, monkeypatch):
    """What is asked of the library, with a stand-in for it: the real one wants the network."""
    logged: list[tuple[int, dict[str, Any]]] = []

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append((-1, {}))

    stand_in = types.ModuleType("wandb")
    stand_in.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    asked: dict[str, Any] = {}
    stand_in.init = lambda **options: (asked.update(options), Run())[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    run = trainer(tmp_path, tiny_model(), wandb="project", max_steps=2)
    run.run()
    assert (asked["project"], asked["config"]["lr"]) == ("project", 3e-3)
    assert [step for step, _ in logged] == [1, 2, 2, -1]
    assert logged[0][1]["loss"] == run.log[0]["loss"]
