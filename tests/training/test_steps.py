"""Ways to compute a step: dtypes, accumulation, recomputation, captured graphs, kernels."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F
from launches import launched_kernels
from models import tiny_config, tiny_model
from plain_gpt import Plain
from training_runs import equal, losses, trainer, values

from fastgpt import GPTModel, use_backend
from fastgpt.training import new_model
from fastgpt.training.capture import WARMUP_STEPS

ROOT = Path(__file__).parents[2]


def test_bfloat16_is_close_to_float32_and_keeps_wide_parameters(tmp_path):
    runs = {
        dtype: trainer(tmp_path / dtype, tiny_model(), dtype=dtype, max_steps=3) for dtype in ("float32", "bfloat16")
    }
    for run in runs.values():
        run.run()
    wide, half = (losses(runs[dtype]) for dtype in runs)
    assert [loss for *_, loss in half] == pytest.approx([loss for *_, loss in wide], rel=0.02)
    assert half != wide
    assert {p.dtype for p in runs["bfloat16"].model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "changes", [{"accumulate": 3}, {"recompute": True}, {"accumulate": 3, "recompute": True}], ids=str
)
def test_memory_is_saved_without_changing_the_losses(tmp_path, changes):
    straight = trainer(tmp_path / "a", tiny_model(), validate_every=12)
    other = trainer(tmp_path / "b", tiny_model(), validate_every=12, **changes)
    assert straight.run() is other.run() is None
    for (*where, loss), (*there, expected) in zip(losses(other), losses(straight), strict=True):
        assert where == there
        assert loss == pytest.approx(expected, rel=1e-5)


def test_recomputed_blocks_draw_the_same_dropout_and_keep_less(tmp_path):
    runs = {
        on: trainer(tmp_path / str(on), tiny_model(drop_rate=0.3), recompute=on, max_steps=4) for on in (False, True)
    }
    kept = {}
    for on, run in runs.items():
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            run.model.train()
            run.engine.loss(*run.data.batch(0))
        kept[on] = sum(sizes)
        run.run()
    assert losses(runs[True]) == losses(runs[False])
    assert equal(values(runs[True].model), values(runs[False].model))
    assert kept[True] < 0.5 * kept[False]


def test_dropout_is_dropout_on_average(tmp_path):
    """The mean of many first losses with dropout is that of a plain model with nn.Dropout's masks, within their spread."""
    model = tiny_model(drop_rate=0.2, attn_drop_rate=0.0, tie_weights=True)
    run = trainer(tmp_path, model)
    inputs, targets = run.data.batch(0)
    plain = Plain(model)
    ours, theirs = [], []
    model.train()
    for seed in range(60):
        torch.manual_seed(seed)
        ours.append(model.loss(inputs, targets).item())
        torch.manual_seed(1000 + seed)
        theirs.append(F.cross_entropy(plain(inputs, 0.2).flatten(0, 1), targets.flatten()).item())
    spread = math.sqrt(np.var(ours) / 60 + np.var(theirs) / 60)
    assert abs(np.mean(ours) - np.mean(theirs)) < 4 * spread
    assert np.std(ours) == pytest.approx(np.std(theirs), rel=0.5)
    quiet = F.cross_entropy(plain(inputs).flatten(0, 1), targets.flatten()).item()
    assert abs(quiet - np.mean(ours)) > 4 * spread


def test_pure_bfloat16_follows_wide_copies(tmp_path):
    """Each update against AdamW in fp32 on the gradients that the bf16 model gives, written out."""
    model = tiny_model(tie_weights=True)
    run = trainer(
        tmp_path, model, dtype="pure-bfloat16", max_steps=8, lr=1e-4, warmup_steps=0, weight_decay=0.0, grad_clip=0
    )
    wide = {name: p.detach().float().clone() for name, p in tiny_model(tie_weights=True).named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in wide.items()} for _ in range(2))
    twin = tiny_model(tie_weights=True).bfloat16()
    for step in range(8):
        twin.load_state_dict({name: p.bfloat16() for name, p in wide.items()}, strict=False)
        loss = twin.train().loss(*run.data.batch(step))
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        for (name, p), g in zip(wide.items(), gradients, strict=True):
            g = g.float()
            first[name].mul_(0.9).add_(g, alpha=0.1)
            second[name].mul_(0.95).add_(g * g, alpha=0.05)
            rate = run.settings.lr_at(step)
            p -= (
                rate
                * (first[name] / (1 - 0.9 ** (step + 1)))
                / ((second[name] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            )
    run.run()
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}
    state = run.updater.tensors()
    moved = 0
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(state[f"model.{name}"], wide[name], rtol=1e-4, atol=2e-6)
        assert torch.equal(p, state[f"model.{name}"].bfloat16())
        moved += int((p == tiny_model(tie_weights=True).get_parameter(name).bfloat16()).sum())
    # The rate is so small that bf16 parameters alone would have stood still in most places.
    assert moved > 0.2 * sum(p.numel() for p in run.model.parameters())
    resumed = trainer(
        tmp_path,
        tiny_model(1, tie_weights=True),
        dtype="pure-bfloat16",
        max_steps=8,
        lr=1e-4,
        **{"warmup_steps": 0, "weight_decay": 0.0, "grad_clip": 0.0},
    )
    resumed.resume()
    assert equal(resumed.updater.tensors(), state)
    assert equal(values(resumed.model), values(run.model))


def test_a_padded_vocabulary_changes_nothing_and_is_not_saved(tmp_path):
    saved = []
    for multiple in (1, 128):
        model = tiny_model(tie_weights=True)
        wide = new_model(tiny_config(tie_weights=True, vocab_multiple=multiple), 0, torch.device("cpu"))
        for name, tensor in model.state_dict().items():
            wide.state_dict()[name][: len(tensor)] = tensor
        run = trainer(tmp_path / str(multiple), wide, sample_every=6)
        run.run()
        assert run.model.tok_emb.weight.shape[0] == (101 if multiple == 1 else 128)
        saved.append((losses(run), values(GPTModel.from_pretrained(tmp_path / str(multiple)))))
    assert [loss for *_, loss in saved[0][0]] == pytest.approx([loss for *_, loss in saved[1][0]], rel=1e-5)
    with safetensors.safe_open(tmp_path / "128" / "model.safetensors", "pt") as file:
        assert file.get_slice("transformer.wte.weight").get_shape() == [101, 32]


def test_parameters_must_be_wide_when_training_begins(tmp_path):
    with pytest.raises(ValueError, match=r"parameters must be float32 .*bfloat16"):
        trainer(tmp_path, tiny_model().bfloat16())


@pytest.mark.parametrize(
    "said",
    [
        "pass",
        "torch.set_float32_matmul_precision('medium')",
        "products.allow_tf32 = True",
        "products.fp32_precision = 'tf32'",
    ],
)
def test_tf32_on_a_gpu_is_as_the_settings_say_while_training(said):
    """In a process of its own: what a process has said once, torch remembers."""
    code = f"""
import torch
from fastgpt.training import loop
from fastgpt.training.settings import TrainSettings
products = torch.backends.cuda.matmul
{said}
before = products.fp32_precision
for tf32, precision in ((True, "tf32"), (False, "ieee")):
    with loop._matmul_precision(TrainSettings(tf32=tf32), torch.device("cuda")):
        assert products.fp32_precision == precision
    assert products.fp32_precision == before
    with loop._matmul_precision(TrainSettings(tf32=tf32), torch.device("cpu")):
        assert products.fp32_precision == before
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "pure-bfloat16"])
def test_a_captured_step_trains_as_an_eager_one(dtype, tmp_path, device):
    """Dropout's draws, the schedule's rate and micro-batches included."""
    runs = []
    for captured in (False, True):
        model = new_model(tiny_config(drop_rate=0.2), 0, device)
        options = {"cuda_graph": captured, "batch_size": 4, "accumulate": 2, "dtype": dtype}
        runs.append(trainer(tmp_path / str(captured), model, **options))
        assert runs[-1].run() is None
    eager, graphed = map(losses, runs)
    assert len(eager) > 2 * WARMUP_STEPS
    assert [entry[:2] for entry in eager] == [entry[:2] for entry in graphed]
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    assert [loss for *_, loss in graphed] == pytest.approx([loss for *_, loss in eager], rel=tolerance)


def test_the_trainer_runs_the_kernels(tmp_path, device):
    """The Triton path, in the interpreter where there is no GPU: the same losses as the reference path's."""
    pytest.importorskip("triton", reason="needs triton")
    runs, launched = [], []
    for backend in ("reference", "triton"):
        with use_backend(backend), launched_kernels() as names:
            model = tiny_model(n_layers=1).to(device)
            run = trainer(tmp_path / backend, model, max_steps=3, validation_batches=1, tf32=False)
            run.run()
        runs.append([loss for *_, loss in losses(run)])
        launched.append(names)
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
    assert launched[0] == []
    for kernel in ("attention_fwd", "attention_bwd", "gemm", "layer_norm_fwd", "layer_norm_bwd", "embedding_bwd"):
        assert sum(kernel in name for name in launched[1]) >= 3, kernel  # at least one a step


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"dtype": "pure-bfloat16", "accumulate": 3}], ids=str)
def test_training_on_a_gpu_follows_the_reference_on_a_cpu(tmp_path, changes):
    expected = trainer(tmp_path / "cpu", tiny_model())
    run = trainer(tmp_path / "gpu", tiny_model().cuda(), tf32=False, recompute=True, **changes)
    for each in (expected, run):
        each.run()
    rel = 2e-2 if changes else 1e-4
    assert [loss for *_, loss in losses(run)] == pytest.approx([loss for *_, loss in losses(expected)], rel=rel)
