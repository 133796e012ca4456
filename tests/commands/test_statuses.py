"""How commands answer what can't be, and how they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgpt import cli
from fastgpt.checkpoints.names import DTYPES as STORED
from fastgpt.checkpoints.weights import FORMATS
from fastgpt.cli import main
from fastgpt.commands import convert, options, progress
from fastgpt.config import PRESETS

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))), "OMP_NUM_THREADS": "1"}


def refused(capsys, *arguments: str) -> str:
    """The one line that a refused command leaves."""
    assert main([*arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_a_command_line_is_parsed_without_torch():
    code = """
import sys
from fastgpt.cli import main
for words in (["--help"], ["train", "--help"], ["generate", "--max-new-tokens", "x"], ["nope"]):
    try: main(words)
    except SystemExit: pass
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_says_what_it_does_and_gives_an_example(capsys):
    for module in cli.COMMANDS:
        name = module.__name__.rpartition(".")[2]
        with pytest.raises(SystemExit):
            main([name, "--help"])
        said = re.sub(r"\s+", " ", capsys.readouterr().out)
        assert f"example: fastgpt {name}" in said
        assert "default: None" not in said
        assert "default: False" not in said
        cli._parser().parse_args(module.EXAMPLE.replace('"def main():"', "x").split()[1:])


def test_what_help_lists_is_what_there_is():
    assert list(convert.TO) == list(FORMATS)
    assert {str(dtype).removeprefix("torch.") for dtype in STORED.values()} == set(options.DTYPES)


@pytest.mark.parametrize("command", [["generate", "x"], ["info"], ["eval", __file__]])
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("mps", "device 'mps' was asked for, but torch .* sees no MPS devices here"),
        ("cuda:99", r"device 'cuda:99' was asked for, but torch .* sees \w+ CUDA devices? here"),
        ("tpu", "device must be cpu, cuda, cuda:N or mps, got 'tpu'"),
    ],
)
def test_a_device_that_is_not_here(capsys, command, device, message):
    assert re.search(message, refused(capsys, *command, "--device", device))


@pytest.mark.parametrize("command", [["train", "absent.txt"], ["prepare", "absent.txt"]])
def test_a_directory_that_cannot_be_made_is_said_before_anything_is_read(capsys, tmp_path, command):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert f"--out {out} can't be made: {tmp_path / 'file'} is a file" in refused(capsys, *command, "--out", str(out))


def test_a_fault_of_ours_is_a_line_and_with_debug_a_traceback(capsys, monkeypatch):
    def fault(*arguments: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("fastgpt.info.config_of", fault)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "fastgpt info: RuntimeError: a fault (--debug shows where)\n"
    with pytest.raises(RuntimeError, match="a fault"):
        main(["info", "--debug"])


def test_pickles_are_opened_where_they_are_allowed(capsys, tmp_path):
    assert main(["convert", "bundled", str(tmp_path / "own"), "--to", "hf", "--pickle"]) == 0
    capsys.readouterr()
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 30)
    where = str(tmp_path / "own")
    for command in (
        ["generate", "x", "--model", where, "--max-new-tokens", "1"],
        ["eval", str(tmp_path / "text.txt"), "--model", where],
        ["info", where],
        ["train", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--init", where, "--max-steps", "1"],
    ):
        command += [] if command[0] == "info" else ["--device", "cpu"]
        if command[0] == "train":
            command += ["--context", "32", "--batch-size", "1"]
        assert "--allow-pickle" in refused(capsys, *command)
        assert main([*command, "--allow-pickle"]) == 0
        capsys.readouterr()


def test_info_as_json(capsys):
    assert main(["info", "gpt2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 124_439_808
    assert facts["kv_cache_bytes_fp32"] == 2 * 12 * 1024 * 768 * 4
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert all(name in said for name in PRESETS)


def test_a_console_without_the_characters_gets_the_text_all_the_same(tmp_path):
    (tmp_path / "text.txt").write_text("naïve 🙂 " * 300, encoding="utf-8")
    command = [sys.executable, "-m", "fastgpt", "train", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    command += ["--tokenizer", "char", "--layers", "1", "--heads", "1", "--width", "16", "--context", "16"]
    command += ["--max-steps", "2", "--sample-every", "1", "--sample-prompt", "🙂", "--device", "cpu"]
    done = subprocess.run(command, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert r"\U0001f642" in done.stderr


def test_off_a_terminal_progress_is_plain_lines_on_stderr(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    with progress.Progress("reading", 30, "tokens") as bar:
        for done in (10, 20, 30):
            bar.update(done, "loss 1")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "".join(f"reading: {n} of 30 tokens, loss 1\n" for n in (10, 20, 30))
    monkeypatch.setattr(progress, "SECONDS", 1000.0)
    with progress.Progress("reading", 30, "tokens") as bar:
        for done in (10, 20, 30):
            bar.update(done)
    assert capsys.readouterr().err == "reading: 30 of 30 tokens\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_a_signal_ends_keeps_its_steps_and_says_which(tmp_path, number, status):
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 200)
    command = [sys.executable, "-m", "fastgpt", "train", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    command += ["--tokenizer", "char", "--layers", "1", "--heads", "1", "--width", "16", "--context", "16"]
    # --resume begins a run that isn't there: a scheduler has one command line.
    command += ["--max-steps", "1000000", "--device", "cpu", "--resume"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 200
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=100)
    assert process.returncode == status
    assert "continue with --resume" in error
    assert "Traceback" not in error
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_two_saves_are_the_same_bytes(tmp_path):
    """In two processes, where a hash table's order differs."""
    code = """
import sys, torch
from fastgpt import GPTModel
torch.manual_seed(0)
cfg = dict(vocab_size=50, context_length=8, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0, qkv_bias=True)
GPTModel(cfg).save_pretrained(sys.argv[1])
GPTModel(cfg).save_pretrained(sys.argv[1] + "-shards", max_shard_bytes=2000)
"""
    for name in ("a", "b", "c"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], env=ENVIRONMENT, check=True)
    for kind in ("", "-shards"):
        first = {path.name: path.read_bytes() for path in (tmp_path / f"a{kind}").iterdir()}
        assert len(first) > (2 if kind else 1)
        for other in ("b", "c"):
            assert {path.name: path.read_bytes() for path in (tmp_path / f"{other}{kind}").iterdir()} == first
