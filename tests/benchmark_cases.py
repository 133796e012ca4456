"""What tests of benchmarks share: cases, rows that look recorded, and a process's environment."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from benchmarks.harness import floors, measure, op, record
from benchmarks.harness.measure import Candidate, Case, Work
from benchmarks.models import generate, providers, train_step

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def op_case(entry: op.Op, mode: str = "forward") -> Case:
    return next(case for case in entry.benchmark.cases("dry") if case.mode == mode)


def measured(entry: op.Op, function, mode: str = "forward") -> measure.Result:
    case = op_case(entry, mode)
    return measure.measure(entry.candidate(function, case), None, 2)


def tiny_generation(generate_ids) -> Candidate:
    case = generate.BENCHMARKS[0].cases("dry")[0]
    model = providers.spread_model("dry", torch.float32)
    return generate.candidate(generate_ids(model), model, case)


def training_case() -> Case:
    return train_step.BENCHMARKS[0].cases("dry")[0]


def timed_row(case: Case, provider: str, samples: list[float], turns: list[float] | None = None) -> dict:
    """What the harness records of `samples` in milliseconds, in turn with `turns`."""
    result = measure.Result([ms / 1e3 for ms in samples], [ms / 1e3 for ms in turns or []])
    peer, ours = (Candidate(lambda: None, lambda out: None, notes={"error": 1e-7}) for _ in range(2))
    return measure.measured_row(case, provider, peer, ours if turns else None, result)


def sample_rows() -> list[dict]:
    """fastgpt was slow while it was alone; in turn with its peers it took 4 ms."""
    case = Case("layer_norm", {"rows": 4, "width": 8}, "forward", "float32", Work(10.0, 1e9, 1e9))
    rows = [timed_row(case, "fastgpt", [6.0, 6.0])]
    rows += [timed_row(case, "torch", [2.0, 1.9, 2.1], [4.0, 4.0, 4.0])]
    rows += [timed_row(case, "in the noise", [3.8, 3.8, 4.4], [4.0, 4.0, 4.0])]
    rows += [measure.row(case, name, "absent", reason="not installed") for name in ("Liger", "quack")]
    for width in (16, 32, 64):
        size = {"rows": 4, "width": width}
        grown = Case("layer_norm", size, "forward", "float32", Work(1.0, 1e6, 1e6), grows="width")
        rows.append(timed_row(grown, "fastgpt", [4.0 * (width / 8) ** 1.5]))
    return rows


def sample_results(directory: Path) -> None:
    run = record.run_record("a command", "2026-01-01T00:00:00+00:00")
    store = record.Store(directory, "floors")
    store.start(run)
    for what, value, work in (("copy", 1000.0, "GB/s"), ("read", 1100.0, "GB/s"), ("matmul", 5.0, "TFLOP/s")):
        floor = floors.Floor(what, work, {}, "float32")
        store.add(floor.row([1.0], lambda t, v=value: v))
    store = record.Store(directory, "kernels")
    store.start(run)
    for row in sample_rows():
        store.add(row)


def subprocess_environment(**more: str) -> dict[str, str]:
    # Where pytest-benchmark sees a worker of pytest-xdist, it times nothing.
    dropped = ("TRITON_INTERPRET", "OUT", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), "OMP_NUM_THREADS": "1", **more}
