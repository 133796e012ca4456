"""What the first minutes on a card are spent on, by worth. What one call has no time for, the next one begins with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.record import ROOT

# Files of the gpu lane, the most telling first: what most of a model's time runs through. The others follow.
LANE = (
    "attention",
    "linear",
    "decode_token",
    "decode",
    "cross_entropy",
    "linear_cross_entropy",
    "layer_norm",
    "graphs",
    "steps",
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
            "--no-report",
            "--quiet",
            "--benchmark-quiet",
            "-p",
            "no:cacheprovider",
            "--tb=line",
        ]
        words += [f"--match={dry if dry_run else match}", f"--out={out}", f"--minutes={working(seconds) / 60:.2f}"]
        flags = {"--quick": quick, "--dry-run": dry_run}
        return [*words, *(f"--only={name}" for name in only), *(flag for flag, given in flags.items() if given)]

    return command


def working(seconds: int) -> int:
    """Of so many, those in which something is begun."""
    return max(seconds - 20, 5)


def lane(out: Path, dry: bool, seconds: int) -> list[str]:
    if dry:
        return tests(out, dry, seconds, "-m", "not gpu", "-k", "interpreter or empty", "tests/kernels/test_gelu.py")
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    place = {f"test_{name}": i for i, name in enumerate(LANE)}
    marked = [path for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]
    ordered = sorted(marked, key=lambda path: place.get(path.stem, len(LANE)))
    return tests(out, dry, seconds, "-m", "gpu", *map(str, ordered))


def engines(out: Path, dry: bool, seconds: int) -> list[str]:
    chosen = ("-k", "top_k", "tests/inference/test_sampling.py") if dry else ("tests/inference",)
    return tests(out, dry, seconds, *chosen)


def tests(out: Path, dry: bool, seconds: int, *chosen: str) -> list[str]:
    """pytest on `chosen`, by four processes where it can (one in a dry run), less what passed before."""
    words = ["-m", "pytest", "-p", "benchmarks.harness.resumed", "-p", "no:cacheprovider", "--quiet", "--tb=short"]
    words += ["--continue-on-collection-errors"]
    words += ["-n", "1" if dry else "4"] if importlib.util.find_spec("xdist") else []
    return [*words, f"--passed={out / 'passed.txt'}", f"--until={working(seconds)}", *chosen]


def module(name: str, *words: str) -> Callable[[Path, bool, int], list[str]]:
    return lambda out, dry, seconds: ["-m", name, f"--out={out}", *words, *(["--dry-run"] if dry else [])]


def sweep(out: Path, dry: bool, seconds: int) -> list[str]:
    names, minutes = SWEPT[:1] if dry else SWEPT, f"--minutes={working(seconds) / 60:.2f}"
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
    Step("engines", "generation's own tests on the card", 200, engines),
    Step("ops", "every op at every size, beside peers", 400, bench("", "softmax.*-fastgpt$", "kernels")),
    Step("generation", "every size of generation", 400, bench("", "generate.*-fastgpt$", "decode")),
    Step("training", "every size of training", 400, bench("", "memory.*-fastgpt$", "train")),
)
