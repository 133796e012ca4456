"""Settings: what is refused, TOML, and the schedules of the learning rate."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fastgpt.config import PRESETS, GPTConfig
from fastgpt.training.settings import RunSettings, TrainSettings, read_toml, to_toml

ROOT = Path(__file__).parent.parent.parent


def test_the_schedule_at_its_corners():
    settings = TrainSettings(lr=1.0, min_lr_ratio=0.1, warmup_steps=10, max_steps=110)
    expected = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 0.55, 35: 0.55 + 0.45 * math.sqrt(0.5), 110: 0.1, 5000: 0.1}
    assert {step: settings.lr_at(step) for step in expected} == pytest.approx(expected, rel=1e-12)
    assert dataclasses.replace(settings, warmup_steps=0).lr_at(0) == 1.0
    assert dataclasses.replace(settings, min_lr_ratio=0.0).lr_at(110) == pytest.approx(0.0, abs=1e-15)
    assert dataclasses.replace(settings, warmup_steps=500).lr_at(109) == pytest.approx(110 / 500)


def test_the_schedule_is_torchs_cosine():
    settings = TrainSettings(lr=3e-3, min_lr_ratio=0.25, warmup_steps=0, max_steps=37)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=37, eta_min=0.25 * 3e-3)
    for step in range(38):
        assert settings.lr_at(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"validate_every": 0}, "validate_every must be at least 1, got 0"),
        ({"validation_batches": -1}, "validation_batches must be at least 1, got -1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be over 0, got 0.0"),
        ({"lr": math.nan}, "lr must be over 0, got nan"),
        ({"grad_clip": math.inf}, "grad_clip must be at least 0, got inf"),
        ({"warmup_steps": -2}, "warmup_steps must be at least -1, got -2"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"weight_decay": math.inf}, "weight_decay must be at least 0, got inf"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio must be at least 0 and at most 1, got 1.5"),
        ({"min_lr_ratio": math.nan}, "min_lr_ratio must be at least 0 and at most 1, got nan"),
        ({"beta1": 1.0}, "beta1 must be at least 0 and less than 1, got 1.0"),
        ({"beta2": -0.1}, "beta2 must be at least 0 and less than 1, got -0.1"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, pure-bfloat16, got 'float16'"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**changes)


def test_warmup_stable_decay():
    settings = TrainSettings(
        schedule="wsd", lr=1.0, warmup_steps=10, max_steps=100, decay_fraction=0.2, min_lr_ratio=0.1
    )
    expected = {0: 0.1, 9: 1.0, 10: 1.0, 79: 1.0, 80: 1.0, 90: 0.55, 95: 0.325, 100: 0.1, 200: 0.1}
    assert {step: settings.lr_at(step) for step in expected} == pytest.approx(expected, rel=1e-12)
    assert dataclasses.replace(settings, decay_fraction=0.0).lr_at(99) == 1.0
    # What makes it worth having: a longer run goes on from the stable part as if it had been planned.
    longer = dataclasses.replace(settings, max_steps=1000)
    assert all(settings.lr_at(step) == longer.lr_at(step) for step in range(80))


def test_settings_survive_toml(tmp_path):
    settings = RunSettings(
        max_steps=7,
        lr=1e-05,
        tf32=False,
        sample_prompt='a "quoted"\n\\ \x7f é 🙂',
        validation=("a b.txt", "c"),
        wandb="x",
    )
    (tmp_path / "s.toml").write_text(to_toml(settings), encoding="utf-8")
    assert RunSettings(**read_toml(tmp_path / "s.toml", RunSettings)) == settings


def test_the_settings_file_of_gpt2_is_nanogpts():
    """Against what its config/train_gpt2.py and train.py say."""
    settings = RunSettings(**read_toml(ROOT / "examples" / "gpt2.toml", RunSettings))
    size = (settings.context, settings.width, settings.heads, settings.layers, settings.dropout)
    config = GPTConfig(50257, *size, qkv_bias=True, tie_weights=True)
    assert config.num_parameters == PRESETS["gpt2"].num_parameters == 124_439_808
    assert settings.batch_size * settings.context == 12 * 1024 * 5 * 8
    assert all(settings.batch_size % (processes * settings.accumulate) == 0 for processes in (1, 2, 4, 8))
    assert (settings.beta1, settings.beta2, settings.weight_decay, settings.grad_clip) == (0.9, 0.95, 1e-1, 1.0)
    for step in (0, 1000, 2000, 300_000, 600_000):
        ratio = (step - 2000) / (600_000 - 2000)
        cosine = 6e-5 + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (6e-4 - 6e-5)
        expected = 6e-4 * (step + 1) / 2001 if step < 2000 else cosine
        assert settings.lr_at(step) == pytest.approx(expected, rel=6e-4)  # its warmup is one step longer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = 'x'", "lr must be float, got 'x'"),
        ("lr = -1", "lr must be over 0, got -1"),
        ("tf32 = 1", "tf32 must be bool, got 1"),
        ("max-steps = true", "max_steps must be int, got True"),
        ("validation = [1]", "validation must hold strings"),
        ("rl = 1", "unknown option 'rl'"),
        ("layer = 1", "unknown option 'layer'; did you mean 'layers'?"),
        ("import os", "is not TOML"),
        ("schedule = 'linear'", "schedule must be one of cosine, wsd, got 'linear'"),
    ],
)
def test_bad_toml_is_named(tmp_path, text, message):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_toml(tmp_path / "s.toml", RunSettings)
    assert "s.toml" in str(caught.value)


def test_settings_that_contradict_each_other():
    with pytest.raises(ValueError, match="cuda_graph can't be combined with recompute"):
        TrainSettings(cuda_graph=True, recompute=True)
    with pytest.raises(ValueError, match="batch_size must be a multiple of accumulate, got 8 rows in 3 micro-batches"):
        TrainSettings(accumulate=3)
    with pytest.raises(TypeError, match="lr must be float, got '1'"):
        TrainSettings(lr="1")
