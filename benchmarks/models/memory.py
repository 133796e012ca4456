"""Peak memory of one training step, and steps at the largest batch that fits; each provider in a process of its own.

    python -m benchmarks.models.memory PROVIDER MODEL BATCH CONTEXT DTYPE

On a GPU the peak is the allocator's; on a CPU the process's resident memory at its largest, less what it was before the model.
Both include parameters, gradients and AdamW's moments.

BATCH may be "largest": batches of LADDER are tried from the largest on until one fits, and that one is timed. Compiled models
are compiled once, for any batch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.measure import (
    OURS,
    Absent,
    Benchmark,
    Candidate,
    Case,
    Work,
    Wrong,
    device,
    needs_cuda,
    seconds,
    timing,
)
from benchmarks.harness.op import interpreting
from benchmarks.harness.record import ROOT
from benchmarks.models.providers import free
from benchmarks.models.train_step import MODELS, Loss, dtype_at, step_of, work
from benchmarks.models.train_step import cases as train_cases

# Batches to try at a model, largest first; what doesn't fit fails within a second or two.
LADDER = {
    "gpt2-medium": (96, 64, 48, 32, 24, 16, 8, 4),
    "gpt2-large": (48, 32, 24, 16, 12, 8, 4, 2),
    "gpt2-xl": (24, 16, 12, 8, 6, 4, 2, 1),
    "dry": (2, 1),
}
LARGEST_SAMPLES = 5
MOST_SECONDS = 400  # of a process; a stage on a GPU has no more
TAKES_PART = ("fastgpt", "reference", "reference, compiled", "nanoGPT, compiled", "nanoGPT", "transformers")


def cases(scale: str) -> Iterator[Case]:
    for case in train_cases(scale):
        yield Case("memory", case.size, "", case.dtype, Work(), case.units, "tokens")


def largest_cases(scale: str) -> Iterator[Case]:
    models = {"gpu": ("gpt2-medium", "gpt2-large", "gpt2-xl"), "dry": ("dry",)}.get(scale, ())
    for model in models:
        size = {"model": model, "batch": "largest", "context": 8 if scale == "dry" else 1024}
        yield Case("train_step", size, "", dtype_at(scale), unit="tokens", alone=True)


def prepare(name: str, case: Case) -> Candidate:
    """The result are the notes, `peak_MB` among them; one process is enough to read them."""
    if name.endswith("compiled"):
        needs_cuda("torch.compile of a model")
    if interpreting() and name != OURS:
        raise Absent("one process shows in a dry run that all of them start")
    arguments = [name, case.size["model"], str(case.size["batch"]), str(case.size["context"]), case.dtype]
    command = [sys.executable, "-m", "benchmarks.models.memory", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    notes: dict[str, Any] = {}

    @functools.cache
    def run() -> dict:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=MOST_SECONDS)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the process died")
        return json.loads(done.stdout.splitlines()[-1])

    def check(found: dict) -> None:
        if "absent" in found:
            raise Absent(found["absent"])
        if not found["peak_MB"] > 0 or not all(math.isfinite(loss) for loss in found["losses"]):
            raise Wrong(f"the step gave {found}")
        if len(found["losses"]) > 1 and not found["losses"][-1] < found["losses"][0]:  # of one batch, again and again
            raise Wrong(f"the steps don't train: losses {found['losses']}")
        notes.update({key: value for key, value in found.items() if key != "losses"})

    check(run())
    return Candidate(run, check, notes=notes)


def resident_bytes() -> float:
    """The process's largest resident memory so far; getrusage would count what the parent had before this program began."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024.0 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="utf-8"))[1])
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # macOS, in bytes


def fitting(module: nn.Module, loss: Loss, case: Case) -> tuple[int, Callable[[], Tensor], float]:
    """(the first batch of the model's LADDER whose step fits, that step, the loss before it)"""
    for batch in LADDER[case.size["model"]]:
        at = dataclasses.replace(case, size={**case.size, "batch": batch})
        try:
            step = step_of(module, lambda idx, targets: loss(any_batch(idx), any_batch(targets)), at)
            return batch, step, step().item()
        except torch.cuda.OutOfMemoryError:
            pass
        # Behind the handler, whose exception holds the tensors of the step.
        step = None
        module.zero_grad(set_to_none=True)
        free()
    raise Absent(f"not even a batch of {batch} fits")


def any_batch(idx: Tensor) -> Tensor:
    """idx with a first dimension that torch.compile must not take as a constant."""
    torch._dynamo.maybe_mark_dynamic(idx, 0)
    return idx


def steps_at_largest(module: nn.Module, loss: Loss, case: Case) -> dict[str, Any]:
    batch, step, first = fitting(module, loss, case)
    step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    losses = [first]
    samples = [seconds(lambda: losses.append(step())) for _ in range(LARGEST_SAMPLES)]
    t, context = timing(samples), case.size["context"]
    return {
        "largest_batch": batch,
        "losses": [float(loss) for loss in losses],
        "ms": 1e3 * t.median,
        "p20": 1e3 * t.p20,
        "p80": 1e3 * t.p80,
        "rounds": t.rounds,
        "units": batch * context,
        **work(case.size["model"], batch, context)._asdict(),
    }


def main() -> int:
    name, model, batch, context, dtype = sys.argv[1:]
    size = {"model": model, "batch": batch if batch == "largest" else int(batch), "context": int(context)}
    case = Case("memory", size, "", dtype)
    on_gpu = device().type == "cuda"
    before = 0.0 if on_gpu else resident_bytes()
    try:
        module, loss = MODELS[name](case)
        if batch == "largest":
            found = steps_at_largest(module, loss, case)
        else:
            step = step_of(module, loss, case)
            value = step()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()  # building the model and compiling are not the step's
                value = step()
            found = {"losses": [value.item()]}
    except Absent as reason:
        print(json.dumps({"absent": str(reason)}))
        return 0
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes() - before
    print(json.dumps({"peak_MB": peak / 1e6, **found}))
    return 0


PROVIDERS = {name: functools.partial(prepare, name) for name in TAKES_PART}
BENCHMARKS = (
    Benchmark("train_step", "train", lambda scale: list(largest_cases(scale)), PROVIDERS, rounds=0),
    Benchmark("memory", "train", lambda scale: list(cases(scale)), PROVIDERS, rounds=0),
)

if __name__ == "__main__":
    sys.exit(main())
