"""Training: a step uploads its batch pinned and reads nothing; a log reads once, and a validation once in all."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from fake_gpu.budgets import TRAINING
from fake_gpu.device import h100
from fake_gpu.scenario import model
from fake_gpu.trace import unwatched, watching

from fastgpt.graphs import CaptureError
from fastgpt.text.data import TokenStream
from fastgpt.training.capture import WARMUP_STEPS, CapturedStep
from fastgpt.training.loop import Trainer
from fastgpt.training.settings import TrainSettings

CONTEXT, BATCH = 64, 4

SETTINGS = [
    {},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "recompute": True},
    {"dtype": "pure-bfloat16", "accumulate": 2},
    {"dtype": "bfloat16", "grad_clip": 0.0, "accumulate": 4},
]
CAPTURED = [
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
    {"dtype": "pure-bfloat16", "accumulate": 2},
]


class Tokenizer:
    end_of_text = None

    def encode(self, text):
        return [1, 2]

    def decode(self, ids):
        return "x"


@contextlib.contextmanager
def training(directory, separate=False, **changes):
    """A Trainer before its first step; rows of `separate` documents say where each begins."""
    tokens = np.arange(6000, dtype=np.int64) % 1000
    starts = np.arange(0, 6000, 100) if separate else None
    with h100():
        with unwatched():
            net = model(torch.float32, train=True, drop_rate=0.1, context_length=CONTEXT)
            net.to = lambda *args: net  # a fake parameter can't change its dtype in place
            settings = TrainSettings(batch_size=BATCH, max_steps=100, sample_tokens=20, **changes)
            data = [TokenStream(tokens, CONTEXT, BATCH, starts=starts) for _ in range(2)]
            trainer = Trainer(net, Tokenizer(), *data, settings, directory)
            trainer._clock = 0.0
        yield trainer


def steps(trainer, count):
    with watching() as seen:
        for _ in range(count):
            trainer._train_step(False)
    return seen


@pytest.mark.parametrize("separate", [False, True], ids=["joined", "separate documents"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_reads_nothing(settings, separate, tmp_path):
    with training(tmp_path, separate, **settings) as trainer:
        steps(trainer, 1)
        TRAINING["step of packed documents" if separate else "step"].check(steps(trainer, 5), 5)


@pytest.mark.parametrize("separate", [False, True], ids=["joined", "separate documents"])
@pytest.mark.parametrize("settings", CAPTURED, ids=str)
def test_a_captured_step(settings, separate, tmp_path):
    with training(tmp_path, separate, cuda_graph=True, **settings) as trainer:
        seen = steps(trainer, WARMUP_STEPS)
        assert (seen.captures, seen.replays) == (0, 0)
        seen = steps(trainer, 5)
        assert (seen.captures, seen.replays) == (1, 5)
        budget = TRAINING["step of packed documents" if separate else "step"]
        budget._replace(captures=1).check(seen, 5)


def test_a_step_that_cannot_be_captured_says_so_each_time():
    """And never replays a graph that isn't whole."""
    with h100():
        device = torch.device("cuda")
        step = CapturedStep(lambda x: torch.zeros((), device=device) + x.sum().item(), device)
        batch = [torch.zeros(4, device=device)]
        for _ in range(WARMUP_STEPS):
            step(batch)
        for _ in range(2):
            with pytest.raises(CaptureError, match=r"a value at tests/fake_gpu/lane/test_training\.py"):
                step(batch)


@pytest.mark.parametrize("separate", [False, True], ids=["joined", "separate documents"])
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_a_log_and_a_validation_read_once(separate, captured, tmp_path):
    with training(tmp_path, separate, dtype="bfloat16", cuda_graph=captured, validation_batches=6) as trainer:
        steps(trainer, 10)
        entries = []
        with watching() as seen:
            trainer._read(lambda **entry: entries.append(entry))
        assert len(entries) == 10
        TRAINING["log"].check(seen)
        with watching() as seen:
            trainer.validate()
        TRAINING["validation of packed documents" if separate else "validation"].check(seen, 6)


def test_a_sample(tmp_path):
    with training(tmp_path) as trainer:
        with watching() as seen:
            trainer.sample()
        TRAINING["sample"].check(seen, 20)


def test_reading_every_step_is_one_read_a_step(tmp_path):
    """Where the loss is logged at each step it is read before the update, while the weights are still good."""
    with training(tmp_path, log_every=1) as trainer:
        TRAINING["step"]._replace(each_reads=1).check(steps(trainer, 3), 3)


def test_evaluation_reads_once_in_all():
    from fastgpt.evaluation import evaluate

    class Words(Tokenizer):
        n_vocab = 1000

        def encode(self, text):
            return list(range(200))

    with h100():
        net = model(context_length=CONTEXT)
        with watching() as seen:
            evaluate(net, Words(), ["text"] * 3, stride=32)
        TRAINING["evaluation"].check(seen, 3)
