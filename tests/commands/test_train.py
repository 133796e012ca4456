"""`fastgpt train`: fine-tuning, adapters, beginning again, saved settings, nanoGPT's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import logged, values

from fastgpt import GPTModel
from fastgpt.cli import main
from fastgpt.files import BUNDLED
from fastgpt.text.tokenizer import load_tokenizer
from fastgpt.training import checkpoint, lora

SMALL = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch-size", "2", "--max-steps", "4"]


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 60, encoding="utf-8")
    return str(tmp_path / "text.txt")


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


def test_a_run_killed_before_its_first_checkpoint_begins_again(text, tmp_path):
    out = tmp_path / "run"
    command = ["train", text, "--out", str(out), "--tokenizer", "char", *SMALL]
    assert main(command) == 0
    straight = logged(out, "loss")
    for name in ("config.json", "model.safetensors"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoints")
    assert main(["train", text, "--out", str(out), "--resume"]) == 0
    assert logged(out, "loss") == straight
    fresh = ["train", text, "--out", str(tmp_path / "never"), "--tokenizer", "char", *SMALL, "--resume"]
    assert main(fresh) == 0  # one command line for a scheduler, first start included
    assert logged(tmp_path / "never", "loss") == straight


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
