"""Training beside a loop written out in plain PyTorch; resuming, stopping, and runs that go wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import tiny_config, tiny_model
from torch import Tensor, nn

from fastgpt import GPTModel, checkpoint, lora, weights
from fastgpt.checkpoint import STATE, CheckpointError
from fastgpt.config import PRESETS, TokenIdError
from fastgpt.data import TokenStream
from fastgpt.distributed import World
from fastgpt.optimizer import Updater, configure_optimizers, optimizer_groups
from fastgpt.progress import CURVE, LOG, flops_per_token, peak_flops, summary
from fastgpt.settings import RunSettings, TrainSettings, read_toml, to_toml
from fastgpt.shards import read_shard, write_shard, Tokens
from fastgpt.tokenizer import SymbolTokenizer, load_tokenizer
from fastgpt.training import NonFiniteLoss, Trainer, new_model

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
        self.wte, self.wpe = nn.Embedding(101, 32), nn.Embedding(16, 32)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln1": nn.LayerNorm(32),
                    "attention": nn.MultiheadAttention(32, 4, batch_first=True),
                    "ln2": nn.LayerNorm(32),
                    "up": nn.Linear(32, 128),
                    "down": nn.Linear(128, 32),
                }
            )
            for _ in range(2)
        )
        self.ln = nn.LayerNorm(32)
        state = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
        places = {"wte.weight": "tok_emb.weight", "wpe.weight": "pos_emb.weight", "ln.weight": "final_norm.scale"}
        places["ln.bias"] = "final_norm.shift"
        mine = {name: state[theirs] for name, theirs in places.items()}
        for i in range(2):
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

    def forward(self, idx: Tensor) -> Tensor:
        T = idx.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        x = self.wte(idx) + self.wpe.weight[:T]
        for block in self.blocks:
            y = block["ln1"](x)
            x = x + block["attention"](y, y, y, attn_mask=mask, need_weights=False)[0]
            x = x + block["down"](F.gelu(block["up"](block["ln2"](x)), approximate="tanh"))
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
    (tmp_path / ".mine").write_bytes(b"not the run's")
    again = trainer(tmp_path, max_steps=2)
    again.resume()
    again.run()
    assert files(tmp_path) == {**before, ".mine": b"not the run's"}


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
    drawn = matplotlib.image.imread(tmp_path / CURVE)
    run.log.clear()
    run.draw_curve()
    empty = matplotlib.image.imread(tmp_path / CURVE)
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
