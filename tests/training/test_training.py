"""Training beside a loop written out in plain PyTorch; resuming, stopping, and runs that go wrong."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from models import tiny_config, tiny_model
from torch import Tensor, nn

from fastgpt import GPTModel, use_backend
from fastgpt.checkpoints import weights
from fastgpt.checkpoints.weights import BUNDLED
from fastgpt.cli import main
from fastgpt.config import PRESETS, GPTConfig, TokenIdError
from fastgpt.text.data import TokenStream
from fastgpt.text.shards import Tokens, read_shard, write_shard
from fastgpt.text.tokenizer import SymbolTokenizer, load_tokenizer
from fastgpt.training import NonFiniteLoss, Trainer, checkpoint, loop, lora, new_model
from fastgpt.training.capture import WARMUP_STEPS
from fastgpt.training.checkpoint import STATE, CheckpointError
from fastgpt.training.optimizer import configure_optimizers, optimizer_groups
from fastgpt.training.progress import CURVE, LOG, flops_per_token, peak_flops, summary
from fastgpt.training.settings import RunSettings, TrainSettings, read_toml, to_toml

ROOT = Path(__file__).parent.parent.parent
TOKENIZER = SymbolTokenizer("char", [chr(33 + n) for n in range(101)])
TOKENS = np.random.default_rng(1).integers(0, 101, 1200).astype(np.uint16)
FAST = {
    "max_steps": 12,
    "batch_size": 3,
    "lr": 3e-3,
    "warmup_steps": 4,
    "validate_every": 5,
    "validation_batches": 2,
    "checkpoint_every": 6,
    "seed": 11,
}


def trainer(directory: Path, model: GPTModel | None = None, **changes: Any) -> Trainer:
    settings = TrainSettings(**{**FAST, **changes})
    return Trainer(
        new_model(tiny_config(drop_rate=0.2), settings.seed, torch.device("cpu")) if model is None else model,
        TOKENIZER,
        TokenStream(TOKENS[:1000], 16, settings.batch_size, settings.seed),
        TokenStream(TOKENS[1000:], 16, 4),
        settings,
        directory,
    )


def at_step(step: int, act: Callable[[], object]) -> Callable[[dict[str, Any]], None]:
    """A report that acts once, when `step` has been trained."""

    def report(entry: dict[str, Any]) -> None:
        if entry["step"] == step and "loss" in entry:
            act()

    return report


def losses(run: Trainer) -> list[tuple[int, str, float]]:
    return [
        (entry["step"], key, entry[key]) for entry in run.log for key in ("loss", "validation_loss") if key in entry
    ]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Plain(nn.Module):
    """The same GPT, with nothing but nn modules and F."""

    def __init__(self, source: GPTModel) -> None:
        super().__init__()
        size, C = source.config, source.config.emb_dim
        self.wte, self.wpe = nn.Embedding(size.vocab_size, C), nn.Embedding(size.context_length, C)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln1": nn.LayerNorm(C),
                    "attention": nn.MultiheadAttention(C, size.n_heads, batch_first=True),
                    "ln2": nn.LayerNorm(C),
                    "up": nn.Linear(C, 4 * C),
                    "down": nn.Linear(4 * C, C),
                }
            )
            for _ in range(size.n_layers)
        )
        self.ln = nn.LayerNorm(C)
        state = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
        places = {"wte.weight": "tok_emb.weight", "wpe.weight": "pos_emb.weight", "ln.weight": "final_norm.scale"}
        places["ln.bias"] = "final_norm.shift"
        mine = {name: state[theirs] for name, theirs in places.items()}
        for i in range(size.n_layers):
            ours, theirs = f"blocks.{i}.", f"trf_blocks.{i}."
            for kind in ("weight", "bias"):
                parts = [state[f"{theirs}att.W_{part}.{kind}"] for part in ("query", "key", "value")]
                mine[f"{ours}attention.in_proj_{kind}"] = torch.cat(parts)
                mine[f"{ours}attention.out_proj.{kind}"] = state[f"{theirs}att.out_proj.{kind}"]
                mine[f"{ours}up.{kind}"] = state[f"{theirs}ff.layers.0.{kind}"]
                mine[f"{ours}down.{kind}"] = state[f"{theirs}ff.layers.2.{kind}"]
                norm = "scale" if kind == "weight" else "shift"
                mine[f"{ours}ln1.{kind}"] = state[f"{theirs}norm1.{norm}"]
                mine[f"{ours}ln2.{kind}"] = state[f"{theirs}norm2.{norm}"]
        self.load_state_dict(mine)

    def forward(self, idx: Tensor, drop: float = 0.0) -> Tensor:
        T = idx.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        x = F.dropout(self.wte(idx) + self.wpe.weight[:T], drop)
        for block in self.blocks:
            y = block["ln1"](x)
            x = x + F.dropout(block["attention"](y, y, y, attn_mask=mask, need_weights=False)[0], drop)
            x = x + F.dropout(block["down"](F.gelu(block["up"](block["ln2"](x)), approximate="tanh")), drop)
        return self.ln(x) @ self.wte.weight.T


def test_every_loss_is_that_of_a_plain_loop(tmp_path):
    """AdamW, its groups, warmup, cosine and clipping, written out from their papers."""
    steps, peak, warmup, beta1, beta2, decay, clip = 50, 4e-3, 5, 0.9, 0.95, 0.3, 0.5
    model = tiny_model(drop_rate=0.0, tie_weights=True)
    plain = Plain(model)
    settings = {"max_steps": steps, "lr": peak, "warmup_steps": warmup, "weight_decay": decay, "grad_clip": clip}
    run = trainer(tmp_path, model, **settings, validate_every=50, checkpoint_every=50)
    assert run.run() is None

    stream = TokenStream(TOKENS[:1000], 16, 3, seed=11)
    parameters = list(plain.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    expected, norms, rates = [], [], []
    for step in range(steps):
        inputs, targets = stream.batch(step)
        loss = -F.log_softmax(plain(inputs), -1).gather(-1, targets[..., None]).mean()
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        rate = (
            peak * (step + 1) / warmup
            if step < warmup
            else peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup)))
        )
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                g = g * min(clip / norm, 1.0)
                m.mul_(beta1).add_(g, alpha=1 - beta1)
                v.mul_(beta2).add_(g * g, alpha=1 - beta2)
                if p.dim() > 1:
                    p.mul_(1 - rate * decay)
                p -= rate * m / (1 - beta1 ** (step + 1)) / ((v / (1 - beta2 ** (step + 1))).sqrt() + 1e-8)
        expected.append(loss.item())
        norms.append(norm)
        rates.append(rate)

    entries = [entry for entry in run.log if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, steps + 1))
    assert [entry["loss"] for entry in entries] == pytest.approx(expected, rel=1e-4)
    assert [entry["grad_norm"] for entry in entries] == pytest.approx(norms, rel=1e-3)
    assert [entry["lr"] for entry in entries] == pytest.approx(rates, rel=1e-12)
    assert max(norms) > clip
    torch.testing.assert_close(model.tok_emb.weight, plain.wte.weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        model.trf_blocks[1].att.out_proj.weight, plain.blocks[1]["attention"].out_proj.weight, rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(model.final_norm.scale, plain.ln.weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("dtype", "rel"), [("float32", 1e-4), ("bfloat16", 5e-3)])
def test_the_bundled_models_recipe_is_a_plain_loop(tmp_path, dtype, rel):
    """`fastgpt train` with the committed settings, on shorter and fewer rows, beside torch's own modules and AdamW."""
    steps, warmup, context = 10, 4, 32
    text = tmp_path / "argparse.py"
    shutil.copy(argparse.__file__, text)
    command = ["train", str(text), "--config", str(ROOT / "examples" / "bundled_model.toml"), "--tokenizer", "bundled"]
    command += ["--out", str(tmp_path / "run"), "--context", str(context), "--batch-size", "2", "--dtype", dtype]
    command += ["--max-steps", str(steps), "--warmup-steps", str(warmup), "--validation-batches", "1"]
    assert main(command) == 0

    tokenizer = load_tokenizer(BUNDLED)
    config = GPTConfig(2048, context, 256, 4, 4, 0.0, qkv_bias=True, tie_weights=True, init="gpt2")
    plain = Plain(new_model(config, 0, torch.device("cpu")))
    ids = np.array([*tokenizer.encode(text.read_text(encoding="utf-8")), tokenizer.end_of_text])
    stream = TokenStream(ids[: -int(len(ids) * 0.02)], context, 2, seed=0)
    groups = [{"params": [p for p in plain.parameters() if (p.dim() > 1) is wide]} for wide in (True, False)]
    groups[1]["weight_decay"] = 0.0
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    expected = []
    for step in range(steps):
        cosine = 0.51 + 0.49 * math.cos(math.pi * (step - warmup) / (steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * ((step + 1) / warmup if step < warmup else cosine)
        inputs, targets = stream.batch(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = F.cross_entropy(plain(inputs).flatten(0, 1).float(), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert logged(tmp_path / "run", "loss") == pytest.approx(expected, rel=rel)
    assert expected[-1] < 0.9 * expected[0]


def test_it_learns_what_can_be_learned(tmp_path):
    model = new_model(tiny_config(drop_rate=0.0), 0, torch.device("cpu"))
    repeated = np.tile(np.random.default_rng(0).permutation(101), 12).astype(np.uint16)
    settings = TrainSettings(**{**FAST, "max_steps": 60, "lr": 1e-2, "batch_size": 8, "validate_every": 60})
    stream = TokenStream(repeated, 16, 8, 0)
    run = Trainer(model, TOKENIZER, stream, TokenStream(repeated, 16, 4), settings, tmp_path)
    run.run()
    assert run.log[0]["loss"] > 4.4
    assert run.log[-1]["validation_loss"] < 1.0


def test_the_validation_loss_is_the_mean_of_its_batches(tmp_path):
    model = tiny_model(drop_rate=0.5)
    run = trainer(tmp_path, model, validation_batches=3)
    expected = []
    for i in range(3):
        inputs, targets = TokenStream(TOKENS[1000:], 16, 4).batch(i)
        with torch.no_grad():
            expected.append(F.cross_entropy(model.eval()(inputs).flatten(0, 1), targets.flatten()).item())
    assert run.validate() == pytest.approx(sum(expected) / 3, rel=1e-6)
    model.train()
    run.step = 7
    assert run.validate() == pytest.approx(sum(expected) / 3, rel=1e-6)


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


def test_dropout_and_the_seed_matter(tmp_path):
    results = []
    for name, seed, rate in (("a", 1, 0.2), ("b", 1, 0.2), ("c", 2, 0.2), ("d", 1, 0.0)):
        model = new_model(tiny_config(drop_rate=rate), seed, torch.device("cpu"))
        run = trainer(tmp_path / name, model, seed=seed, max_steps=3)
        run.run()
        results.append(losses(run))
    assert results[0] == results[1]
    assert results[0] != results[2]
    assert results[0] != results[3]


def test_a_run_can_be_made_longer(tmp_path):
    run = trainer(tmp_path)
    run.run()
    longer = trainer(tmp_path, max_steps=14, validate_every=2, checkpoint_every=1)
    longer.resume()
    assert (longer.step, len(longer.log)) == (12, len(run.log))
    longer.run()
    assert [step for step, key, _ in losses(longer) if key == "loss"] == list(range(1, 15))


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


def files(directory: Path) -> dict[str, bytes]:
    """All of a run's files but for its log."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != LOG
    }


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


def test_every_step_and_rank_has_its_own_seed(tmp_path):
    seeds: list[int] = []
    run = trainer(tmp_path)
    run.run(lambda entry: seeds.append(torch.initial_seed()) if "loss" in entry else None)
    for rank in (0, 1):
        loop._seed(11, 5, rank)
        seeds.append(torch.initial_seed())
    assert seeds[-2] == seeds[5]  # step 6 of seed 11 on the first rank
    assert len(set(seeds)) == 13


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
    assert str(caught.value).count("\n") == 1
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


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_names_the_last_checkpoint_and_leaves_it(tmp_path, what):
    run = trainer(tmp_path, checkpoint_every=4)
    kept: dict[str, bytes] = {}

    def poison() -> None:
        kept.update(files(tmp_path))
        if what == "loss":
            run.model.final_norm.scale.data[3] = math.nan
        else:
            run.model.final_norm.scale.register_hook(lambda gradient: gradient / 0.0)
        kept["bias"] = run.model.trf_blocks[0].att.W_key.bias.detach().numpy().tobytes()

    with pytest.raises(NonFiniteLoss, match="lower learning rate") as caught:
        run.run(at_step(5, poison))
    assert f"step 6: loss {'nan' if what == 'loss' else ''}" in str(caught.value)
    assert f"the last whole checkpoint is {checkpoint.place(tmp_path, 4)}" in str(caught.value)
    assert run.model.trf_blocks[0].att.W_key.bias.detach().numpy().tobytes() == kept.pop("bias")
    assert files(tmp_path) == kept
    resumed = trainer(tmp_path, checkpoint_every=4)
    resumed.resume()
    assert resumed.step == 4
    assert len(losses(resumed)) == 4
    resumed.run()
    assert all(math.isfinite(loss) for _, _, loss in losses(resumed))


def test_a_loss_that_is_no_number_before_any_checkpoint(tmp_path):
    model = tiny_model()
    model.tok_emb.weight.data.fill_(math.inf)
    with pytest.raises(NonFiniteLoss, match=r"step 1: loss nan.*the last whole checkpoint is none yet"):
        trainer(tmp_path, model).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fastgpt_tokenizer.json", LOG, "settings.toml"]


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


@pytest.mark.parametrize("changes", [{}, {"tie_weights": True}, {"head_bias": True}, {"bias": False}], ids=str)
def test_matrices_and_embeddings_decay_and_nothing_else(changes):
    model = GPTModel(tiny_config(**changes))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decaying, other = optimizer_groups(model, 0.3)
    assert (decaying["weight_decay"], other["weight_decay"]) == (0.3, 0.0)
    kinds = (nn.Linear, nn.Embedding)
    expected = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)} & set(
        names.values()
    )
    assert {names[p] for p in decaying["params"]} == expected
    assert {names[p] for p in other["params"]} == set(names.values()) - expected
    assert len(decaying["params"]) + len(other["params"]) == len(names)


def test_frozen_parameters_are_left_alone(tmp_path):
    model = tiny_model()
    model.tok_emb.requires_grad_(False)
    before = values(model)
    trainer(tmp_path, model, max_steps=2).run()
    assert torch.equal(model.tok_emb.weight, before["tok_emb.weight"])
    assert not torch.equal(model.pos_emb.weight, before["pos_emb.weight"])


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


def test_a_run_directory_is_a_model(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    run.run()
    shutil.rmtree(tmp_path / "checkpoints")
    idx = torch.arange(16)[None]
    assert torch.equal(GPTModel.from_pretrained(tmp_path)(idx), run.model.eval()(idx))


def test_new_models_are_drawn_from_their_seed():
    first, again, other = (values(new_model(tiny_config(), seed, torch.device("cpu"))) for seed in (3, 3, 4))
    assert equal(first, again)
    assert not equal(first, other)


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
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
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


def test_text_of_another_vocabulary_is_refused_before_any_step(tmp_path):
    good, bad = TokenStream(TOKENS, 16, 2), TokenStream(TOKENS.astype(np.int64) + 5, 16, 2)
    for data, validation, name in ((bad, good, "data"), (good, bad, "validation")):
        with pytest.raises(TokenIdError, match=f"{name} has token ids 5 to 105, the model a vocabulary of 101"):
            Trainer(tiny_model(), TOKENIZER, data, validation, TrainSettings(batch_size=2), tmp_path / "run")
    with pytest.raises(TokenIdError, match="token ids -1 to 100"):
        Trainer(
            tiny_model(), TOKENIZER, TokenStream(np.arange(-1, 101), 16, 2), good, TrainSettings(), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_twenty_kills_change_nothing(tmp_path):
    """SIGKILL at twenty random moments: the weights are those of a run that was never stopped, bit for bit."""
    paths = (ROOT, ROOT / "kernels", ROOT / "tests")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "killed_runs.py"), str(tmp_path), "20"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=400, check=True)
    result = json.loads(done.stdout)
    assert result["statuses"] == [signal.SIGKILL] * 20 + [0, 0], done.stderr
    assert 0 < result["reached"][-1] < result["steps"]
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
    """One real SIGKILL of `fastgpt train`; then the same command with --resume alone, and SIGTERM, which exits 0."""
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
    assert status == 0
    assert "stopped by SIGTERM at step" in error
    assert "Traceback" not in error
    manifest = checkpoint.read_manifest(out)
    assert manifest["step"] > reached
    steps = [entry["step"] for entry in map(json.loads, (out / LOG).read_text().splitlines()) if "loss" in entry]
    assert steps == list(range(1, manifest["step"] + 1))
    assert (manifest["settings"]["tokenizer"], manifest["settings"]["width"]) == ("char", 32)


# Ways to compute a step.


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cuda_graph": True}, "cuda_graph needs one process on a CUDA device, got 1 on cpu"),
        ({"batch_size": 4}, "data has batches of 3 rows, settings.batch_size is 4"),
        ({"tensorboard": True}, "--tensorboard was asked for, but tensorboard isn't installed"),
        ({"wandb": "project"}, "--wandb was asked for, but wandb isn't installed"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    stream = TokenStream(TOKENS[:1000], 16, 3)
    with pytest.raises(ValueError, match=re.escape(message)):
        Trainer(tiny_model(), TOKENIZER, stream, stream, TrainSettings(**{**FAST, **changes}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_parameters_must_be_wide_when_training_begins(tmp_path):
    with pytest.raises(ValueError, match=r"parameters must be float32 .*bfloat16"):
        trainer(tmp_path, tiny_model().bfloat16())


def test_ids_of_a_mapped_file_are_checked_batch_by_batch(tmp_path):
    TOKENS.tofile(tmp_path / "a.bin")
    bad = TOKENS.copy()
    bad[40:60] = 101
    write_shard(tmp_path / "b.bin", bad, np.array([0]), 101)
    good = TokenStream(TOKENS, 16, 3)
    for name, raises in (("a.bin", False), ("b.bin", True)):
        stream = TokenStream(Tokens([read_shard(tmp_path / name)]), 16, 3)
        run = Trainer(
            tiny_model(), TOKENIZER, stream, good, TrainSettings(**{**FAST, "max_steps": 30}), tmp_path / name[0]
        )
        if raises:
            with pytest.raises(TokenIdError, match=r"step \d+ has token ids up to 101, the model a vocabulary of 101"):
                run.run()
        else:
            run.run()
    write_shard(tmp_path / "c.bin", TOKENS, np.array([0]), 500)
    stream = TokenStream(Tokens([read_shard(tmp_path / "c.bin")]), 16, 3)
    with pytest.raises(TokenIdError, match="data has token ids 0 to 499, the model a vocabulary of 101"):
        Trainer(tiny_model(), TOKENIZER, stream, good, TrainSettings(**FAST), tmp_path / "c")


def test_losses_read_late_are_the_same(tmp_path):
    """As on a GPU, where reading waits: every tenth step here, and before each validation and checkpoint."""
    runs = [trainer(tmp_path / str(every), log_every=every) for every in (1, 10)]
    for run in runs:
        run.run()
    assert losses(runs[0]) == losses(runs[1])
    late = trainer(tmp_path / "nan", log_every=4, checkpoint_every=3)
    with pytest.raises(NonFiniteLoss, match=r"step \d: .*step-00000003"):
        late.run(at_step(3, lambda: late.model.final_norm.scale.data.fill_(math.nan)))
    assert checkpoint.steps(tmp_path / "nan") == [3]


# Schedules, settings, reports.


@pytest.mark.parametrize(("tf32", "precision"), [(True, "high"), (False, "highest")])
def test_tf32_on_a_gpu_is_as_the_settings_say_while_training(tf32, precision):
    before = torch.get_float32_matmul_precision()
    with loop._matmul_precision(TrainSettings(tf32=tf32), torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == precision
    with loop._matmul_precision(TrainSettings(tf32=tf32), torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before


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
        ("import os", "is not TOML"),
        ("schedule = 'linear'", "schedule must be one of cosine, wsd, got 'linear'"),
    ],
)
def test_bad_toml_is_named(tmp_path, text, message):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_toml(tmp_path / "s.toml", RunSettings)
    assert "s.toml" in str(caught.value)


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


def test_settings_that_contradict_each_other():
    with pytest.raises(ValueError, match="cuda_graph can't be combined with recompute"):
        TrainSettings(cuda_graph=True, recompute=True)
    with pytest.raises(ValueError, match="batch_size must be a multiple of accumulate, got 8 rows in 3 micro-batches"):
        TrainSettings(accumulate=3)
    with pytest.raises(TypeError, match="lr must be float, got '1'"):
        TrainSettings(lr="1")


def test_what_does_not_change_the_result_may_change_on_resuming(finished):
    run = trainer(finished, accumulate=3, recompute=True, keep=5, sample_every=3, max_steps=4, log_every=2)
    run.resume()
    run.run()
    assert [entry["step"] for entry in run.log if "sample" in entry] == [3]


def test_samples_are_text_by_the_model(tmp_path):
    run = trainer(tmp_path, sample_every=6, sample_prompt="!#", sample_tokens=5)
    run.run()
    samples = {entry["step"]: entry["sample"] for entry in run.log if "sample" in entry}
    assert samples.keys() == {6, 12}
    generator = torch.Generator().manual_seed(11)
    idx = torch.tensor([TOKENIZER.encode("!#")])
    ids = run.model.generate(idx, 5, temperature=0.8, top_k=101, generator=generator)
    assert samples[12] == TOKENIZER.decode(ids[0].tolist())


def test_mfu_is_by_llmc_s_convention(tmp_path):
    # facts of llm.c's train_gpt2.cu: 6 N + 6 L C T for 124,439,808 parameters at T = 1024
    assert flops_per_token(PRESETS["gpt2"], 1024) == 6 * 124_439_808 + 6 * 12 * 768 * 1024
    assert peak_flops(TrainSettings(), "NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops(TrainSettings(), "NVIDIA A100-SXM4-40GB") == 312e12
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


def test_configure_optimizers_is_nanogpts(tmp_path):
    model = GPTModel(tiny_config(tie_weights=True))
    optimizer = configure_optimizers(model, 0.1, 6e-4, (0.9, 0.95), "cpu")
    assert [(group["weight_decay"], group["lr"], group["betas"]) for group in optimizer.param_groups] == [
        (0.1, 6e-4, (0.9, 0.95)),
        (0.0, 6e-4, (0.9, 0.95)),
    ]
    assert optimizer.defaults["fused"]
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    assert sum(sizes) == sum(p.numel() for p in model.parameters())


def test_views_of_another_models_weights_train_as_copies_do(tmp_path):
    """from_hf's queries, keys and values lie side by side in one matrix, where torch's fused AdamW would write over gaps."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from fastgpt.compat.huggingface import from_hf

    torch.manual_seed(3)
    sizes = {"vocab_size": 101, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    runs = [trainer(tmp_path / str(copy), from_hf(theirs, copy=copy)) for copy in (True, False)]
    assert [run.updater.optimizer.defaults["fused"] for run in runs] == [True, False]
    for run in runs:
        run.run()
    expected = [loss for *_, loss in losses(runs[0])]
    assert [loss for *_, loss in losses(runs[1])] == pytest.approx(expected, rel=1e-5)
    weight = runs[0].model.trf_blocks[1].att.W_value.weight
    torch.testing.assert_close(theirs.transformer.h[1].attn.c_attn.weight[:, 64:].T, weight, rtol=1e-4, atol=1e-5)
    resumed = trainer(tmp_path / "False", from_hf(theirs), max_steps=14)
    resumed.resume()
    assert not configure_optimizers(resumed.model, 0.1, 6e-4, (0.9, 0.95), "cpu").defaults["fused"]


@pytest.mark.parametrize(("most", "first"), [(0.3, 0.0), (1e3, 0.0), (1.0, math.inf), (1.0, math.nan)])
def test_gradients_are_clipped_as_torch_does_it(tmp_path, most, first):
    run = trainer(tmp_path, tiny_model())
    plain = [nn.Parameter(torch.zeros_like(p)) for p in run.updater.parameters]
    for p, other in zip(run.updater.parameters, plain, strict=True):
        p.grad = torch.randn_like(p)
        p.grad.view(-1)[0] += first
        other.grad = p.grad.clone()
    torch.testing.assert_close(
        run.updater.clip(most), nn.utils.clip_grad_norm_(plain, most), rtol=0, atol=0, equal_nan=True
    )
    for p, other in zip(run.updater.parameters, plain, strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=0, atol=0, equal_nan=True)


def test_adapters_train_alone_and_are_merged_where_the_model_is_saved(tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    model = tiny_model(tie_weights=True)
    before = values(model)
    lora.add_lora(model, 4, 8.0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4 * 2  # layers, projections, A and B
    run = trainer(tmp_path, model, lr=1e-2)
    run.run()
    idx = torch.arange(16)[None]
    loaded = GPTModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(idx), run.model.eval()(idx), rtol=1e-4, atol=1e-4)
    after = values(loaded)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"trf_blocks.{i}.att.{part}.weight" for i in (0, 1) for part in lora.TARGETS}
    again = tiny_model(1, tie_weights=True)
    lora.add_lora(again, 4, 8.0)
    resumed = trainer(tmp_path, again, lr=1e-2)
    resumed.resume()
    assert torch.equal(resumed.model.eval()(idx), run.model(idx))


def test_the_trainer_runs_the_kernels(tmp_path, device):
    """The Triton path, in the interpreter where there is no GPU: the same losses as the reference path's."""
    pytest.importorskip("triton", reason="needs triton")
    runs = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            model = tiny_model(n_layers=1).to(device)
            run = trainer(tmp_path / backend, model, max_steps=3, validation_batches=1, tf32=False)
            run.run()
        runs.append([loss for *_, loss in losses(run)])
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
    assert runs[1] != runs[0]


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"dtype": "pure-bfloat16", "accumulate": 3}], ids=str)
def test_training_on_a_gpu_follows_the_reference_on_a_cpu(tmp_path, changes):
    expected = trainer(tmp_path / "cpu", tiny_model())
    run = trainer(tmp_path / "gpu", tiny_model().cuda(), tf32=False, recompute=True, **changes)
    for each in (expected, run):
        each.run()
    rel = 2e-2 if changes else 1e-4
    assert [loss for *_, loss in losses(run)] == pytest.approx([loss for *_, loss in losses(expected)], rel=rel)


# The command.

SMALL = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch-size", "2", "--max-steps", "4"]


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 60, encoding="utf-8")
    return str(tmp_path / "text.txt")


def logged(out: Path, key: str) -> list[float]:
    lines = map(json.loads, (out / LOG).read_text().splitlines())
    return [entry[key] for entry in lines if key in entry]


def test_the_command_fine_tunes_what_it_made(text, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", text, "--out", str(first), "--tokenizer", "char", *SMALL]) == 0
    tuning = ["train", text, "--out", str(second), "--init", str(first), "--batch-size", "2", "--context", "8"]
    assert main([*tuning, "--max-steps", "3", "--lr", "1e-9", "--vocab-multiple", "128", "--weight-decay", "0"]) == 0
    models = [GPTModel.from_pretrained(path) for path in (first, second)]
    assert models[1].config == models[0].config.replace(vocab_multiple=128)
    for a, b in zip(values(models[0]).values(), values(models[1]).values(), strict=True):
        torch.testing.assert_close(b[: len(a)], a, rtol=0, atol=1e-6)  # it began where the first ended
    assert load_tokenizer(second).decode(range(28)) == load_tokenizer(first).decode(range(28))
    capsys.readouterr()
    assert main(["train", text, "--out", str(tmp_path / "x"), "--init", str(first), "--context", "17"]) == 2
    assert "--context 17 is more than the 16 positions of" in capsys.readouterr().err


def test_the_command_trains_adapters(text, tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", text, "--out", str(first), "--tokenizer", "char", *SMALL]) == 0
    tuning = ["train", text, "--out", str(second), "--init", str(first), "--max-steps", "3", "--lora-rank", "2"]
    assert main([*tuning, "--lr", "0.1", "--warmup-steps", "0"]) == 0
    before, after = (values(GPTModel.from_pretrained(path)) for path in (first, second))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"trf_blocks.0.att.{part}.weight" for part in lora.TARGETS
    }


def test_a_run_killed_before_its_first_checkpoint_begins_again(text, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", text, "--out", str(out), "--tokenizer", "char", *SMALL]
    assert main(command) == 0
    straight = logged(out, "loss")
    for name in ("config.json", "model.safetensors"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoints")
    assert main(["train", text, "--out", str(out), "--resume"]) == 0
    assert logged(out, "loss") == straight
    assert main(["train", text, "--out", str(tmp_path / "never"), "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_settings_are_saved_and_make_the_run_again(text, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", text, "--out", str(first), "--tokenizer", "char", "--seed", "5", *SMALL]) == 0
    assert main(["train", text, "--out", str(second), "--config", str(first / "settings.toml")]) == 0
    assert logged(second, "loss") == logged(first, "loss")
    manifest = checkpoint.read_manifest(first)
    assert manifest["settings"]["seed"] == 5
    report = json.loads((first / "report.json").read_text())
    assert report["steps"] == 4
    assert report["validation_loss"] == logged(first, "validation_loss")[-1]


def test_the_command_reads_nanogpts_files(text, tmp_path, capsys):
    tokenizer = load_tokenizer(BUNDLED)
    ids = np.array(tokenizer.encode(Path(text).read_text() * 4), dtype=np.uint16)
    data = tmp_path / "data"
    data.mkdir()
    ids[:-200].tofile(data / "train.bin")
    ids[-200:].tofile(data / "val.bin")
    command = ["train", str(data), "--tokenizer", "bundled", *SMALL]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert f"{len(ids) - 200:,} training tokens, 200 held out" in capsys.readouterr().out
    one = [str(data / "train.bin"), "--validation", str(data / "val.bin")]
    assert main(["train", *one, "--tokenizer", "bundled", *SMALL, "--out", str(tmp_path / "one")]) == 0
    assert logged(tmp_path / "one", "loss") == logged(tmp_path / "run", "loss")
    assert logged(tmp_path / "one", "validation_loss") == logged(tmp_path / "run", "validation_loss")
    assert main(["train", str(data), "--tokenizer", "char", *SMALL, "--out", str(tmp_path / "x")]) == 2
    assert "--tokenizer char is learned from text" in capsys.readouterr().err
