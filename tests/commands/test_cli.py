"""The command as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastgpt import PRESETS, GPTModel, cpu_products, generate, quantize, use_backend
from fastgpt.cli import main
from fastgpt.evaluation import evaluate
from fastgpt.files import BUNDLED
from fastgpt.ops import triton_unavailable
from fastgpt.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog.\n" * 60, encoding="utf-8")
    return path


SMALL = [
    "--tokenizer",
    "char",
    "--layers",
    "1",
    "--heads",
    "2",
    "--width",
    "32",
    "--context",
    "16",
    "--batch-size",
    "4",
]


def test_generate_continues_the_prompt_with_the_models_own_tokens(capsys):
    options = ["--max-new-tokens", "12", "--temperature", "0", "--device", "cpu"]
    assert main(["generate", "def add(a, b):", *options]) == 0
    printed = capsys.readouterr().out
    model, tokenizer = GPTModel.from_pretrained("bundled"), load_tokenizer(BUNDLED)
    ids = tokenizer.encode("def add(a, b):")
    assert printed == tokenizer.decode(model.generate(torch.tensor([ids]), 12)[0].tolist()) + "\n"


@pytest.mark.parametrize(
    ("weights", "dtype", "lookup"), [("int8", "float32", 4), ("int8", "bfloat16", 0), ("int4", "float32", 0)]
)
def test_generate_from_rounded_weights_and_by_lookup(weights, dtype, lookup, capsys):
    """Beside the tokens of the quantized model, and the number of forwards that lookup saves."""
    prompt = "for i in range(10):\n    print(i)\n" * 4
    calls: list[int] = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(1) if isinstance(module, GPTModel) else None
    )
    options = ["--max-new-tokens", "12", "--temperature", "0", "--json", "--device", "cpu"]
    try:
        assert main(["generate", prompt, *options, f"--{weights}", "--dtype", dtype, "--lookup", str(lookup)]) == 0
    finally:
        hook.remove()
    record = json.loads(capsys.readouterr().out)
    model = quantize(GPTModel.from_pretrained("bundled", dtype=getattr(torch, dtype)), weights)
    ids = load_tokenizer(BUNDLED).encode(prompt)
    assert record["tokens"] == model.generate(torch.tensor([ids]), 12)[0, len(ids) :].tolist()
    assert len(calls) < 12 if lookup else len(calls) == 12


def test_generate_draws_in_triton(text, tmp_path, capsys):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if why := triton_unavailable(device, torch.float32):
        pytest.skip(f"the fused sampler needs Triton: {why}")
    out = str(tmp_path / "run")
    assert main(["train", str(text), "--out", out, *SMALL, "--max-steps", "1"]) == 0
    capsys.readouterr()
    with use_backend("triton"):
        options = ["--max-new-tokens", "4", "--seed", "3", "--top-k", "5", "--json", "--sampler", "fused"]
        assert main(["generate", "the quick", "--model", out, *options]) == 0
        tokens = json.loads(capsys.readouterr().out)["tokens"]
        model = GPTModel.from_pretrained(out, dtype=torch.bfloat16 if device.type == "cuda" else None).to(device)
        ids, generator = load_tokenizer(out).encode("the quick"), torch.Generator(device=device).manual_seed(3)
        settings = {"temperature": 0.8, "top_k": 5, "generator": generator}
        assert tokens == generate(model, [ids], 4, sampler="fused", **settings)[0].tokens
    assert tokens != generate(model, [ids], 4, **settings)[0].tokens


def test_same_seed_same_text(capsys):
    arguments = [
        "generate",
        "import ",
        "--max-new-tokens",
        "20",
        "--temperature",
        "1",
        "--top-k",
        "50",
        "--top-p",
        "0.95",
    ]
    outputs = []
    for seed in ("1", "1", "2"):
        assert main([*arguments, "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_json_has_tokens_text_and_logprobs(capsys, tmp_path):
    prompt = tmp_path / "prompt.py"
    prompt.write_text("class A:\n", encoding="utf-8")
    assert main(["generate", "--prompt-file", str(prompt), "--max-new-tokens", "7", "--json", "--seed", "0"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["prompt"] == "class A:\n"
    assert record["finish_reason"] == "length"
    assert len(record["tokens"]) == len(record["logprobs"]) == 7
    assert record["text"] == load_tokenizer(BUNDLED).decode(record["tokens"])
    assert all(logprob <= 0 for logprob in record["logprobs"])


def test_stop_text_is_cut_off_even_across_tokens(capsys):
    arguments = ["generate", "def f(x):", "--max-new-tokens", "30", "--temperature", "0", "--json"]
    assert main(arguments) == 0
    whole = json.loads(capsys.readouterr().out)["text"]
    stop = whole[7:12]
    assert main([*arguments, "--stop", stop, "--stop", "never there"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == whole[: whole.index(stop)]
    assert record["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["aa", "b", "c"], ["ab"], "a"),
        (["x", "y", "z"], ["zz"], "xyz"),
        (["one two", " three"], ["two t", "o t"], "one "),
        (["ab", "ab", "abc"], ["abc"], "abab"),
    ],
)
def test_stop_text_finds_the_earliest_and_loses_nothing(pieces, stops, expected):
    from fastgpt.commands.generate import StopText

    passing = StopText(stops)
    assert "".join([*map(passing.add, pieces), passing.finish("")]) == expected


def run(*arguments: str, **options) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "fastgpt", *arguments], capture_output=True, check=False, env=environment(), **options
    )


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        "PYTHONIOENCODING": "utf-8",
    }


def test_prompt_comes_from_standard_input():
    done = run("generate", "--max-new-tokens", "3", "--temperature", "0", input=b"import ")
    assert done.returncode == 0
    assert done.stdout.startswith(b"import ")
    done = run("generate", input=b"caf\xe9")
    assert (done.returncode, done.stderr) == (2, b"fastgpt generate: standard input is not UTF-8 at byte 3\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--temperature", "-1"], "temperature must be a number of at least 0, got -1.0"),
        (["generate", "x", "--model", "/nowhere/model"], "no model at '/nowhere/model'"),
        (["generate", "x", "--device", "tpu9"], "device must be cpu, cuda, cuda:N or mps, got 'tpu9'"),
        (["generate", "x", "--prompt-file", "y"], "give the prompt as an argument or as --prompt-file, not both"),
        (["generate", "x", "--stop", ""], "--stop must not be empty"),
        (
            ["generate", "x", "--lookup", "-1", "--temperature", "0"],
            "lookup must be a whole number of at least 0, got -1",
        ),
        (["generate", "x", "--lookup", "4"], "lookup=4 is for greedy decoding, temperature=0; got temperature 0.8"),
        (
            ["generate", "x", "--device", "cpu", "--sampler", "fused"],
            "sampler 'fused' runs on the Triton backend alone, and here that is not in use",
        ),
        (["train", "/nowhere.txt", "--out", "/tmp/never"], "no file or directory at '/nowhere.txt'"),
        (["eval", "/nowhere.txt"], "no file or directory at '/nowhere.txt'"),
        (["info", "gpt5"], "no model at 'gpt5'"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith(f"fastgpt {arguments[0]}: ")


@pytest.mark.parametrize("command", [[], ["demo"], ["generate"], ["train"], ["eval"], ["info"]])
def test_help_everywhere(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage: fastgpt" in capsys.readouterr().out


def test_train_learns_and_what_it_saves_generates(text, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [
        "train",
        str(text),
        "--out",
        str(out),
        *SMALL,
        "--max-steps",
        "60",
        "--validate-every",
        "30",
        "--lr",
        "1e-2",
    ]
    assert main(arguments) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 60
    assert losses[-1] < 0.6 * losses[0]
    assert [entry["step"] for entry in log if "validation_loss" in entry] == [30, 60]
    if find_spec("matplotlib"):
        assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert not (out / "loss.png").exists()
    capsys.readouterr()
    assert main(["generate", "the quick", "--model", str(out), "--max-new-tokens", "10", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("the quick")
    assert main(["eval", str(text), "--model", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == len(text.read_bytes())
    costs = {}
    for weights in ("int8", "int4"):
        assert main(["eval", str(text), "--model", str(out), "--json", f"--{weights}"]) == 0
        costs[weights] = json.loads(capsys.readouterr().out)["bits_per_byte"]
        rounded = evaluate(quantize(GPTModel.from_pretrained(out), weights), load_tokenizer(out), [text.read_text()])
        assert costs[weights] == pytest.approx(rounded.bits_per_byte, rel=1e-6)
    assert costs["int8"] != costs["int4"]
    assert main(arguments) == 2
    assert "already holds a run; pass --resume" in capsys.readouterr().err
    assert main([*arguments[:-2], "--lr", "2e-2", "--resume"]) == 2
    assert "lr: 0.01 in the checkpoint, 0.02 now" in capsys.readouterr().err
    resumed = [*arguments, "--resume"]
    resumed[resumed.index("60")] = "65"
    assert main(resumed) == 0
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == 65


def test_train_options_from_toml_give_way_to_flags(text, tmp_path, capsys):
    config = tmp_path / "small.toml"
    config.write_text('tokenizer = "char"\nlayers = 1\nheads = 2\nwidth = 32\ncontext = 16\nmax-steps = 5\nlr = 1\n')
    out = tmp_path / "run"
    assert (
        main(["train", str(text), "--out", str(out), "--config", str(config), "--max-steps", "2", "--lr", "0.01"]) == 0
    )
    assert len((out / "log.jsonl").read_text().splitlines()) == 3
    config.write_text("layer = 1\n")
    assert main(["train", str(text), "--out", str(out), "--config", str(config)]) == 2
    assert "unknown option 'layer'" in capsys.readouterr().err
    config.write_text("layers = '1'\n")
    assert main(["train", str(text), "--out", str(out), "--config", str(config)]) == 2
    assert "layers must be int, got '1'" in capsys.readouterr().err


def test_ctrl_c_leaves_a_whole_checkpoint_and_no_traceback(text, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastgpt", "train", str(text), "--out", str(out), *SMALL, "--max-steps", "1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        (out / "log.jsonl").is_file() and (out / "log.jsonl").stat().st_size > 500
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in error
    assert b"continue with --resume" in error
    step = max(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir())
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == step > 0
    assert GPTModel.from_pretrained(out).generate(torch.tensor([[1]]), 2).shape == (1, 3)


def test_info_of_every_preset(capsys):
    for name, config in PRESETS.items():
        assert main(["info", name]) == 0
        printed = capsys.readouterr().out
        assert f"{config.num_parameters:,}" in printed
        assert ("GPU-years" in printed) == name.startswith("gpt3")
    # Brown et al. 2020, appendix D: 3.14e23 FLOPs for GPT-3 175B; 355 years of a V100 at 28 TFLOP/s
    assert "6 N D = 3.14e+23" in printed
    assert "355." in printed


def test_info_ops_says_what_runs_and_why(capsys):
    assert main(["info", "--ops", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("backend auto, cpu, float32: tensors are on cpu")
    assert printed.count("tensors are on cpu") == 1, "what all have in common is said once"
    assert ["attention", "reference"] in [line.split() for line in printed.splitlines()]
    assert main(["info", "--ops", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["attention"]["implementation"] == "reference"


@pytest.mark.parametrize(("vendor", "choice"), [("AuthenticAMD", "cpu_products"), ("GenuineIntel", "reference")])
def test_info_ops_says_which_products_a_cpu_makes(vendor, choice, monkeypatch, capsys):
    monkeypatch.setattr(cpu_products, "vendor", lambda: vendor)
    cpu_products.unavailable.cache_clear()
    if vendor == "AuthenticAMD" and (why := cpu_products.unavailable(torch.float32)):
        pytest.skip(why)
    try:
        assert main(["info", "--ops", "--device", "cpu"]) == 0
        (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  linear "))
        assert row[1] == choice
    finally:
        cpu_products.unavailable.cache_clear()


def test_flops_of_gpt2_are_the_published_convention():
    from fastgpt.info import training_flops_per_token

    # nanoGPT's 6 (N - positions) + 12 L C T for 124M at T = 1024
    assert training_flops_per_token(PRESETS["gpt2"]) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
