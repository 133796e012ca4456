"""Compile what the steps will launch into Triton's cache, on all processors and without touching the GPU.

    python -m benchmarks.first.compile --out DIR [--arch sm90] [--jobs N] [--dry-run]

Every op at a GPU's sizes is called on meta tensors with its launches recorded; each distinct source is handed to triton.compile
with the very arguments that Triton's JIT would hand it, so that the JIT finds it in the cache (a test shows that it does).
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import Case
from benchmarks.harness.op import Op, call_on_meta
from benchmarks.harness.record import smi
from benchmarks.suite import OP_FILES


def cases(dry: bool) -> Iterator[tuple[Op, Case]]:
    for op in (op for file in OP_FILES for op in file.OPS):
        found = list(op.benchmark.cases("gpu"))
        yield from ((op, case) for case in found[: 1 if dry else None] if not dry or op.name == "gelu")


_jobs: list[Any] = []


def _compile(index: int) -> str | None:
    import triton

    job = _jobs[index]
    try:
        triton.compile(job.source, target=job.target.gpu, options=job.options)
    except Exception as error:
        return f"{job.launch.kernel.__name__}: {type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def compile_ahead(arch: str, processes: int, dry: bool) -> dict[str, Any]:
    """How many kernels, how long it took, and what didn't compile."""
    from fastgpt_kernels import aot

    global _jobs
    target, started = aot.parse_target(arch), time.monotonic()
    chosen = [aot.Case(op.name, case.label, functools.partial(call_on_meta, op, case)) for op, case in cases(dry)]
    _jobs = list(aot.collect(chosen, target).values())
    collected = time.monotonic()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        failed = [found for found in pool.map(_compile, range(len(_jobs))) if found]
    seconds = {"recording": round(collected - started, 1), "compiling": round(time.monotonic() - collected, 1)}
    return {"arch": arch, "kernels": len(_jobs), "processes": processes, "seconds": seconds, "failed": failed}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of compile.json")
    parser.add_argument("--arch", default="", help="of the GPU that is here, else sm90")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16), metavar="N")
    parser.add_argument("--dry-run", action="store_true", help="one kernel")
    arguments = parser.parse_args(argv)
    if os.environ.pop("TRITON_INTERPRET", None):  # read where kernels are decorated: in a new process
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.first.compile", *(argv or sys.argv[1:])])
    arch = arguments.arch or capability()
    found = compile_ahead(arch, arguments.jobs, arguments.dry_run)
    (arguments.out / "compile.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return int(bool(found["failed"]))


def capability() -> str:
    """Asked of nvidia-smi, since a process that asks CUDA can't fork workers."""
    found = smi("compute_cap")
    return "sm" + found.replace(".", "") if found else "sm90"


if __name__ == "__main__":
    sys.exit(main())
