"""Documents packed into rows train as each alone does, and a run of them goes on as if it had never stopped."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import tiny_model
from plain_gpt import Plain
from torch import nn
from training_runs import TOKENS, at_step, equal, losses, trainer, values

from fastgpt.text.data import TokenStream

STARTS = np.concatenate(([0], np.sort(np.random.default_rng(2).choice(np.arange(1, 1000), 99, replace=False))))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_packed_run_trains_as_each_document_alone_does(tmp_path, accumulate):
    """Losses, gradient norms and weights beside plain PyTorch in float64, which sees one document a call."""
    steps, rate, clip = 6, 3e-3, 0.5
    model = tiny_model(drop_rate=0.0, tie_weights=True)
    plain = Plain(model).double()
    settings = {"batch_size": 4, "max_steps": steps, "lr": rate, "warmup_steps": 0, "min_lr_ratio": 1.0}
    run = trainer(tmp_path, model, STARTS, grad_clip=clip, weight_decay=0.1, accumulate=accumulate, **settings)
    assert run.run() is None

    stream = TokenStream(TOKENS[:1000], 16, 4, run.settings.seed, STARTS)
    groups = [{"params": [p for p in plain.parameters() if (p.dim() > 1) is wide]} for wide in (True, False)]
    groups[1]["weight_decay"] = 0.0
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    expected, norms, several = [], [], 0
    for step in range(steps):
        inputs, targets, starts = stream.batch(step)
        total = torch.zeros((), dtype=torch.float64)
        for row in range(4):
            for begin in starts[row].unique().tolist():
                part = starts[row] == begin
                logits = plain(inputs[row : row + 1, part])[0]
                total = total + F.cross_entropy(logits, targets[row, part], reduction="sum")
                several += 1
        loss = total / (targets != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(plain.parameters(), clip).item())
        optimizer.step()
        expected.append(loss.item())
    assert several > 2 * 4 * steps
    entries = [entry for entry in run.log if "loss" in entry]
    assert [entry["loss"] for entry in entries] == pytest.approx(expected, rel=1e-5)
    assert [entry["grad_norm"] for entry in entries] == pytest.approx(norms, rel=1e-4)
    torch.testing.assert_close(model.tok_emb.weight.double(), plain.wte.weight, rtol=1e-3, atol=1e-5)


def test_validation_keeps_documents_apart(tmp_path):
    run = trainer(tmp_path, tiny_model(), validation_batches=3)
    run.validation = TokenStream(TOKENS[:1000], 16, 4, 0, STARTS)
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(3):
            inputs, targets, starts = run.validation.batch(index)
            for row in range(4):
                for begin in starts[row].unique().tolist():
                    part = starts[row] == begin
                    logits = run.model.eval()(inputs[row : row + 1, part])[0]
                    total += F.cross_entropy(logits, targets[row, part], reduction="sum").item()
            count += int((targets != -100).sum())
    assert run.validate() == pytest.approx(total / count, rel=1e-5)


def test_a_packed_run_goes_on_bit_for_bit(tmp_path):
    straight = trainer(tmp_path / "straight", starts=STARTS)
    straight.run()
    stopped = trainer(tmp_path / "stopped", starts=STARTS)
    assert stopped.run(at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))) == signal.SIGTERM
    resumed = trainer(tmp_path / "stopped", starts=STARTS)
    resumed.resume()
    assert resumed.step == 7
    resumed.run()
    assert equal(values(resumed.model), values(straight.model))
    assert losses(resumed) == losses(straight)


def test_a_checkpoint_of_joined_documents_is_not_continued_with_packed_ones(tmp_path):
    trainer(tmp_path, max_steps=2).run()
    with pytest.raises(ValueError, match="separate: False in the checkpoint, 'packed' now"):
        trainer(tmp_path, starts=STARTS).resume()
