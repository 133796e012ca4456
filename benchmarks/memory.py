"""Peak memory of one training step, each provider in a process of its own.

    python -m benchmarks.memory PROVIDER MODEL BATCH CONTEXT DTYPE

On a GPU it is the allocator's peak; on a CPU the process's resident memory at its largest, less what it was before the model.
Both include parameters, gradients and AdamW's moments.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.harness import OURS, Absent, Benchmark, Candidate, Case, Work, Wrong, device, needs_cuda
from benchmarks.op import interpreting
from benchmarks.record import ROOT
from benchmarks.train_step import MODELS, step_of
from benchmarks.train_step import cases as train_cases

TAKES_PART = ("fastgpt", "reference", "reference, compiled", "nanoGPT, compiled", "nanoGPT", "transformers")


def cases(scale: str) -> Iterator[Case]:
    for case in train_cases(scale):
        if scale != "gpu" or case.size["model"] == "gpt2":  # the batches of 124M, not the larger models
            yield Case("memory", case.size, "", case.dtype, Work(), case.units, "tokens")


def prepare(name: str, case: Case) -> Candidate:
    """The result is the note `peak_MB`; one process is enough to read it."""
    if name.endswith("compiled"):
        needs_cuda("torch.compile of a model")
    if interpreting() and name != OURS:
        raise Absent("one process shows in a dry run that all of them start")
    arguments = [name, case.size["model"], str(case.size["batch"]), str(case.size["context"]), case.dtype]
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    notes: dict[str, float] = {}

    @functools.cache
    def run() -> dict:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the process died")
        return json.loads(done.stdout.splitlines()[-1])

    def check(found: dict) -> None:
        if "absent" in found:
            raise Absent(found["absent"])
        if not found["peak_MB"] > 0 or not found["loss"] == found["loss"]:
            raise Wrong(f"the step gave {found}")
        notes["peak_MB"] = found["peak_MB"]

    check(run())
    return Candidate(run, check, notes=notes)


def resident_bytes() -> float:
    """The process's largest resident memory so far; getrusage would count what the parent had before this program began."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024.0 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="utf-8"))[1])
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # macOS, in bytes


def main() -> int:
    name, model, batch, context, dtype = sys.argv[1:]
    case = Case("memory", {"model": model, "batch": int(batch), "context": int(context)}, "", dtype)
    on_gpu = device().type == "cuda"
    before = 0.0 if on_gpu else resident_bytes()
    try:
        module, loss = MODELS[name](case)
    except Absent as reason:
        print(json.dumps({"absent": str(reason)}))
        return 0
    step = step_of(module, loss, case)
    value = step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()  # building the model and compiling are not the step's
        value = step()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes() - before
    print(json.dumps({"peak_MB": peak / 1e6, "loss": value.item()}))
    return 0


PROVIDERS = {name: functools.partial(prepare, name) for name in TAKES_PART}
BENCHMARKS = (Benchmark("memory", "train", lambda scale: list(cases(scale)), PROVIDERS, rounds=0),)

if __name__ == "__main__":
    sys.exit(main())
