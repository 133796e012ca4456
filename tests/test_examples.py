"""Every example runs from the command line and does what it says."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str, cwd: Path) -> str:
    """Its output. Python finds modules in `cwd` too."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", cwd)))}
    command = [sys.executable, str(ROOT / "examples" / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_attention_map(tmp_path):
    image_file = pytest.importorskip("PIL.Image", reason="needs Pillow")
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    run("attention_map.py", "def add(a, b):\n", "--layer", "1", "--head", "2", "--out", "map.png", cwd=tmp_path)
    with image_file.open(tmp_path / "map.png") as image:
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 50


def test_generate_text(tmp_path):
    text = run("generate_text.py", "import os\n", cwd=tmp_path)
    assert text.startswith("import os\n")
    assert len(text) > 60


def test_train_bundled_model(tmp_path):
    few = ("--max-steps", "1", "--files", "8", "--batch-size", "1", "--validation-batches", "1", "--dtype", "float32")
    text = run("train_bundled_model.py", "out", *few, cwd=tmp_path)
    for source in ("held-out: stdlib", "held-out: torch", "unseen: jinja2"):
        assert re.search(rf"{source}, [\d,]+ bytes: [\d.]+ bits per byte, xz -9 [\d.]+", text)
    assert re.search(r"of \d+ continuations of function heads \d+ parse", text)
    assert re.search(r"^[\d,]{9} bytes in out/model$", text, flags=re.M)
    log = (tmp_path / "out" / "bundled_model_grown" / "log.jsonl").read_text()
    assert json.loads(log.splitlines()[-1])["step"] == 1


def test_nanogpt_swap(tmp_path):
    sizes = ("--layers", "2", "--heads", "2", "--width", "32", "--context", "32", "--batch", "2")
    text = run("nanogpt_swap.py", *sizes, "--new-tokens", "40", "--rounds", "1", cwd=tmp_path)
    assert "same seed, same tokens: True" in text
    table = [line.split() for line in text.splitlines() if line.endswith("x")]
    assert [row[0] for row in table] == ["training", "generation"]


def test_llms_from_scratch_swap(tmp_path, monkeypatch, capsys):
    pytest.importorskip("llms_from_scratch.ch05", reason="needs llms_from_scratch and matplotlib, which it imports")
    text = run("llms_from_scratch_swap.py", "--new-tokens", "30", "--steps", "1", cwd=tmp_path)
    rows = [line.split() for line in text.splitlines() if line.startswith(("llms_from", "fastgpt.compat"))]
    assert [row[0] for row in rows] == ["llms_from_scratch", "fastgpt.compat.llms_from_scratch"]
    assert float(rows[0][3]) == pytest.approx(float(rows[1][3]), rel=1e-3)
    assert "same tokens: yes" in text

    for name in ("llms_from_scratch", "llms_from_scratch.ch04"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["swap", "--new-tokens", "2", "--steps", "1"])
    runpy.run_path(str(ROOT / "examples" / "llms_from_scratch_swap.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert text.startswith("llms_from_scratch is left out: import of llms_from_scratch")
    assert [line for line in text.splitlines() if line.startswith("fastgpt.compat.llms_from_scratch ")]
    assert "times as fast" not in text


def test_huggingface_swap(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    small = ("--batch", "2", "--context", "24", "--new-tokens", "4", "--rounds", "1")
    text = run("huggingface_swap.py", *small, cwd=tmp_path)
    assert "same greedy tokens: True" in text
    rows = [line.split() for line in text.splitlines() if line.startswith(("training step", "generation"))]
    assert [len([word for word in row if word.endswith("x")]) for row in rows] == [2, 2]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog.\n" * 200, encoding="utf-8")
    return str(path)


def test_pretrain_text(text, tmp_path):
    printed = run("pretrain_text.py", text, "run", "--max-steps", "40", "--context", "16", cwd=tmp_path)
    assert "'validation_loss'" in printed
    assert len(printed.splitlines()[-1]) > 10
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, log) if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("rank", ["0", "4"])
def test_finetune(text, tmp_path, rank):
    if rank != "0":
        pytest.importorskip("peft", reason="needs peft")
    options = ["--max-steps", "12", "--context", "64", "--lora-rank", rank]
    printed = run("finetune.py", text, "run", *options, cwd=tmp_path)
    before, after = map(float, re.findall(r"(\d\.\d{4}) ", printed))
    assert after < before
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_resume(tmp_path):
    printed = run("resume.py", "out", cwd=tmp_path)
    assert "stopped after step 35, resumed at step 35" in printed
    assert "bit for bit the same: yes" in printed


def test_train_two_processes(text, tmp_path):
    # A rank that goes through Python's own end aborts there now and then: its gloo threads outlive the process group.
    end = 'import atexit, os\n"RANK" in os.environ and atexit.register(lambda: print("Python ended"))\n'
    (tmp_path / "sitecustomize.py").write_text(end)
    options = ["--max-steps", "4", "--width", "32", "--parallel", "fsdp"]
    printed = run("train_two_processes.py", text, "run", *options, cwd=tmp_path)
    assert "on 2 x cpu" in printed
    assert "Python ended" not in printed
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["processes"], report["steps"]) == (2, 4)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_classify_text(tmp_path):
    printed = run("classify_text.py", "--max-steps", "25", cwd=tmp_path)
    before, after = map(float, re.findall(r": (\d\.\d{3})", printed))
    assert after > max(0.75, before + 0.1)  # the lines differ from one Python to the next


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_every_example_has_a_main_and_a_test(path):
    assert "def main() -> None:" in path.read_text(encoding="utf-8")
    assert f"def test_{path.stem}(" in Path(__file__).read_text(encoding="utf-8")
