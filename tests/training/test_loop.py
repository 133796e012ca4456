"""A run beside a loop written out in plain PyTorch: losses, seeds, validation, and losses that are no number."""

from __future__ import annotations

import argparse
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import tiny_config, tiny_model
from plain_gpt import Plain
from torch import nn
from training_runs import FAST, TOKENIZER, TOKENS, at_step, equal, files, logged, losses, trainer, values

from fastgpt import GPTModel
from fastgpt.cli import main
from fastgpt.config import GPTConfig, TokenIdError
from fastgpt.files import BUNDLED
from fastgpt.text.data import TokenStream
from fastgpt.text.shards import Tokens, read_shard, write_shard
from fastgpt.text.tokenizer import load_tokenizer
from fastgpt.training import NonFiniteLoss, Trainer, checkpoint, loop, new_model
from fastgpt.training.progress import LOG
from fastgpt.training.settings import TrainSettings

ROOT = Path(__file__).parent.parent.parent


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


def test_every_step_and_rank_has_its_own_seed(tmp_path):
    seeds: list[int] = []
    run = trainer(tmp_path)
    run.run(lambda entry: seeds.append(torch.initial_seed()) if "loss" in entry else None)
    for rank in (0, 1):
        loop._seed(11, 5, rank)
        seeds.append(torch.initial_seed())
    assert seeds[-2] == seeds[5]  # step 6 of seed 11 on the first rank
    assert len(set(seeds)) == 13


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
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fastgpt_tokenizer.json",
        LOG,
        "settings.toml",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


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
