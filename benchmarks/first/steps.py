"""What the first minutes on a card are spent on, by worth. What one call has no time for, the next one begins with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.record import ROOT

# Tests of the gpu lane, the most telling first: what most of a model's time runs through, then whole models, then the rest.
LANE = (
    "tests/kernels/test_attention*.py",
    "tests/kernels/test_linear*.py",
    "tests/kernels/test_decode*.py",
    "tests/kernels/test_cross_entropy*.py",
    "tests/kernels/test_layer_norm*.py",
    "tests/kernels/test_gpt*.py",
    "tests/inference",
    "tests/kernels",
    "tests",
)
# Launch constants with the largest predicted gain.
SWEPT = ("attention-backward", "cross-entropy-chunk", "attention-forward", "gemm-gelu", "token-rows")


class Step(NamedTuple):
    """`command(out, dry, seconds)` is what `python` is given, with `seconds` to work in; it is killed after `limit`."""

    name: str
    what: str
    limit: int
    command: Callable[[Path, bool, int], list[str]]
    least: int = 15  # seconds under which it isn't worth beginning
    beside: str | None = None  # a step that runs at the same time, on processors alone


def bench(match: str, dry: str, *only: str, quick: bool = False) -> Callable[[Path, bool, int], list[str]]:
    """Benchmarks `only`, the rows whose id matches: `match` at a GPU's sizes, `dry` in a dry run."""

    def command(out: Path, dry_run: bool, seconds: int) -> list[str]:
        words = [
            "-m",
            "pytest",
            "benchmarks",
            f"--match={dry if dry_run else match}",
            f"--out={out}",
            "--no-report",
            "--quiet",
        ]
        words += [
            "--benchmark-quiet",
            "-p",
            "no:cacheprovider",
            "--tb=line",
            f"--minutes={max(seconds - 20, 5) / 60:.2f}",
        ]
        words += (
            [f"--only={name}" for name in only] + (["--quick"] if quick else []) + (["--dry-run"] if dry_run else [])
        )
        return words

    return command


def lane(out: Path, dry: bool, seconds: int) -> list[str]:
    files = (
        ["tests/kernels/test_gelu.py"]
        if dry
        else [str(path) for pattern in LANE for path in sorted(ROOT.glob(pattern))]
    )
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") and not dry else []
    words = [
        "-m",
        "pytest",
        "-p",
        "benchmarks.harness.resumed",
        f"--passed={out / 'passed.txt'}",
        f"--until={max(seconds - 20, 5)}",
    ]
    words += ["--quiet", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors", *workers]
    return [
        *words,
        "-m",
        "not gpu" if dry else "gpu",
        *(["-k", "interpreter or empty"] if dry else []),
        *dict.fromkeys(files),
    ]


def module(name: str, *words: str) -> Callable[[Path, bool, int], list[str]]:
    return lambda out, dry, seconds: ["-m", name, f"--out={out}", *words, *(["--dry-run"] if dry else [])]


def sweep(out: Path, dry: bool, seconds: int) -> list[str]:
    names, minutes = SWEPT[:1] if dry else SWEPT, f"--minutes={max(seconds - 30, 5) / 60:.2f}"
    return ["-m", "benchmarks.sweep", *names, f"--out={out}", minutes, *(["--dry-run"] if dry else [])]


OURS = "fastgpt[^-]*$"
CONTEXTS = r"gpt2,context=(0|256|960),"
STEPS = (
    Step(
        "floors",
        "versions, clocks; copy, read, products, launches, graph nodes",
        60,
        module("benchmarks.harness.floors"),
        beside="compile",
    ),
    Step(
        "compile",
        "every kernel that the steps below launch, on all processors, into Triton's cache",
        90,
        module("benchmarks.first.compile"),
    ),
    Step(
        "smoke",
        "each op forward and backward against float64, and once more in a CUDA graph",
        100,
        bench("-fastgpt$", "gelu.*-fastgpt$", "kernels", quick=True),
    ),
    Step(
        "engine",
        "an engine's 64 tokens beside the module path, in each of its designs",
        60,
        bench(rf"token-model=gpt2,context=0,.*-{OURS}", "token.*-fastgpt$", "token"),
    ),
    Step(
        "questions",
        "what only a card can tell: TF32's rounding, what a call costs the host",
        30,
        module("benchmarks.first.questions"),
    ),
    Step("lane", "the gpu lane, the most telling tests first", 110, lane),
    Step(
        "decode",
        "a token of 124M behind 0, 256 and 960, beside cuBLAS and SDPA in a CUDA graph, and transformers",
        80,
        bench(
            rf"(token-model={CONTEXTS}|(generate|prefill)-model=gpt2,batch=1,prompt=256.*-(fastgpt|transformers)$)",
            "prefill.*-(fastgpt|transformers)$",
            "token",
            "generate",
            "prefill",
        ),
    ),
    Step(
        "train",
        "a training step of 124M at 32 x 1024, beside nanoGPT, plain and compiled",
        130,
        bench("batch=32,.*-(fastgpt|nanoGPT|nanoGPT, compiled)$", "-fastgpt$", "train_step"),
    ),
    Step("parts", "that step by part", 60, module("benchmarks.profiling", "--worst=0")),
    Step(
        "memory",
        "its peak memory, beside peers",
        60,
        bench("batch=32,.*-(fastgpt|nanoGPT|reference|transformers)$", "-fastgpt$", "memory"),
    ),
    Step(
        "peers",
        "attention, LayerNorm, cross-entropy, feed-forward beside cuDNN, torch.compile, Liger",
        120,
        bench(
            "", "layer_norm.*forward-(fastgpt|torch)$", "attention", "layer_norm", "cross_entropy", "mlp", quick=True
        ),
    ),
    Step("sweep", "five launch constants", 120, sweep),
    # Behind this a second call begins, or whatever time is left.
    Step("ops", "every op at every size, beside peers", 400, bench("", "softmax.*-fastgpt$", "kernels")),
    Step("generation", "every size of generation", 400, bench("", "generate.*-fastgpt$", "decode")),
    Step("training", "every size of training", 400, bench("", "memory.*-fastgpt$", "train")),
)
