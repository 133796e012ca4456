"""README is short, and what it says to type works as it stands: names on the hub are local files here."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.report.__main__ import pages
from fastgpt import GPTConfig, GPTModel
from fastgpt.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
IN_TEXT = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"`((?:fastgpt|python|torchrun|bash|make) [^`…]*)`", IN_TEXT)
COMMANDS = [command for command in COMMANDS if "COMMAND" not in command]
# What takes minutes, GPUs or this very suite is parsed: `make …`, torchrun, bench, and what has a test of its own.
PARSED = ("make ", "torchrun ", "fastgpt bench", "bash benchmarks/on_gpu.sh", "python -m fastgpt_kernels.aot")

GPT2 = '''"""In place of tiktoken's own file of this name: "gpt2" of the bundled model's tokens, and bytes that no text has."""
from fastgpt.files import BUNDLED
from fastgpt.text.tokenizer import read_ranks


def gpt2():
    ranks = read_ranks(BUNDLED / "tokenizer.tiktoken")
    ranks |= {b"\\xff\\xfe%d" % i: i for i in range(len(ranks), 50256)}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\\p{L}++| ?\\p{N}++| ?[^\\s\\p{L}\\p{N}]++|\\s++$|\\s+(?!\\S)|\\s"""
    return {"name": "gpt2", "pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": {"<|endoftext|>": 50256}}


ENCODING_CONSTRUCTORS = {"gpt2": gpt2}
'''


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """This checkout by links, so that what README writes to out/ is written elsewhere; beside it a hub with a small gpt2."""
    base = tmp_path_factory.mktemp("readme")
    (base / "checkout").mkdir()
    for path in ROOT.iterdir():
        if path.name not in ("out", ".git"):
            (base / "checkout" / path.name).symlink_to(path)
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(50257, 1024, 32, 2, 2, qkv_bias=True, tie_weights=True, init="gpt2"))
    model.save_pretrained(base / "gpt2")
    revision = hashlib.sha1(b"gpt2").hexdigest()
    for name in ("gpt2", "openai-community--gpt2"):
        repository = base / "hub" / f"models--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(revision)
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / revision).symlink_to(base / "gpt2")
    (base / "site" / "tiktoken_ext").mkdir(parents=True)
    (base / "site" / "tiktoken_ext" / "openai_public.py").write_text(GPT2)
    (base / "bin").mkdir()
    for name, words in (("fastgpt", "-m fastgpt"), ("python", "")):
        (base / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (base / "bin" / name).chmod(0o755)
    return base / "checkout"


def run(checkout: Path, command: str | list[str]) -> str:
    base = checkout.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PATH": os.pathsep.join((str(base / "bin"), os.environ["PATH"])),
        "PYTHONPATH": os.pathsep.join(map(str, (base / "site", ROOT, ROOT / "kernels"))),
        "HF_HUB_CACHE": str(base / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, shell=isinstance(command, str), capture_output=True, text=True, env=environment, cwd=checkout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_readme_is_short():
    assert len(README.splitlines()) <= 170


def test_what_is_made_of_records_is_as_recorded():
    stale = [path for path, text in pages().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "python -m benchmarks.report --readme makes them"


def test_every_block_is_of_a_kind_that_is_tried():
    assert {language for language, _ in BLOCKS} == {"sh", "python", "diff"}


def test_python_runs(checkout):
    (code,) = [block for language, block in BLOCKS if language == "python"]
    printed = run(checkout, [sys.executable, "-W", "error", "-c", code]).splitlines()
    assert "The capital of France is" in printed[0]
    assert printed[-2].endswith("length")
    assert len(printed[-1]) > 40


def test_python_is_typed(tmp_path):
    api = pytest.importorskip("mypy.api", reason="needs mypy")
    (code,) = [block for language, block in BLOCKS if language == "python"]
    (tmp_path / "block.py").write_text(code)
    said, errors, status = api.run(["--config-file", str(ROOT / "pyproject.toml"), str(tmp_path / "block.py")])
    assert status == 0, said + errors


@pytest.mark.parametrize("diff", [block for language, block in BLOCKS if language == "diff"])
def test_one_line_is_enough(diff, checkout):
    """The code after the change runs; a changed import gives every name that it gave before."""
    lines = diff.splitlines()
    after = "\n".join(line[1:] for line in lines if line[0] in " +")
    run(checkout, [sys.executable, "-c", after])
    names = [[line.partition(" import ")[2] for line in lines if line[0] == sign] for sign in "-+"]
    assert not names[0] or names[0] == names[1]


TYPED = [
    line.partition("  #")[0].strip() for language, block in BLOCKS if language == "sh" for line in block.splitlines()
]
EXECUTED = [command for command in TYPED + COMMANDS if not command.startswith(PARSED)]
RUN = [command for command in EXECUTED if "out/run" in command]  # of one model, in the order of the page


def test_a_model_is_trained_and_used_as_the_page_says(checkout):
    printed = [run(checkout, command) for command in RUN]
    assert len(printed) >= 5
    assert any("bits per byte" in text for text in printed)
    assert (checkout / "out" / "hf" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", [command for command in EXECUTED if command not in RUN])
def test_a_command_runs_as_it_stands(command, checkout):
    assert run(checkout, command).strip()


@pytest.mark.parametrize("command", [command for command in TYPED + COMMANDS if command.startswith(PARSED)])
def test_a_command_that_takes_long_is_one(command, capsys):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif words[0] == "bash":
        assert re.search(rf"^#   {words[2]} ", (ROOT / words[1]).read_text(), flags=re.MULTILINE)
    elif words[0] in ("fastgpt", "torchrun"):
        arguments = words[words.index("fastgpt") + 1 :]
        assert words[0] == "fastgpt" or words[1:5:3] == ["--nproc-per-node", "fastgpt"], words
        assert all((ROOT / path).is_file() for path in arguments if path.endswith(".toml"))
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--help"])  # which parses what is before it
        assert stopped.value.code == 0
        capsys.readouterr()
    else:
        assert words[:2] == ["python", "-m"]
        assert importlib.util.find_spec(words[2]) is not None


def test_every_file_that_is_named_is_there():
    pages_of = [ROOT / "README.md", *ROOT.glob("*/README.md"), ROOT / "benchmarks" / "RESULTS.md"]
    for page in pages_of:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page}: {target}"
    for name in re.findall(r"`(\w+\.py)`", README):
        assert list(ROOT.glob(f"*/**/{name}")) or name in ("train.py", "sample.py", "bench.py"), name
