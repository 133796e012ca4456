"""Where the time goes: a training step and a generation by part, and the kernels furthest from their floors.

    python -m benchmarks.profiling [--out DIR] [--worst N] [--dry-run]
    python -m benchmarks.profiling --one BENCHMARK CASE      what ncu looks at: that op, three times

Parts are by torch.profiler, kernels sorted by name. The N fastgpt rows of kernels.json with the most time over their floor are
looked at by ncu where it is installed (clocks as they are), else by torch.profiler. Texts go to profile.txt beside the records.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.measure import OURS, Absent, Benchmark, Case, clock, device, row, scale_of
from benchmarks.harness.record import ROOT, Store, machine_name, run_record, state
from benchmarks.models import generate, train_step
from benchmarks.models.providers import free
from benchmarks.report import report
from benchmarks.suite import selected

GROUP = "profile"
# The first pattern that a kernel's name (on a CPU, an operator's) matches says which part it is of.
PARTS = (
    ("attention, backward", r"attention_bwd|attention_statistics|flash_bwd|fmha.*bwd|bprop|attention.*backward"),
    ("attention, forward", r"attention|flash|fmha|fprop|sdpa"),
    ("cross-entropy", r"cross_entropy|log_?softmax|nll|_scale_kernel"),
    ("norms", r"layer_?norm|LayerNorm|column_sums"),
    ("embedding", r"embedding|index_select|indexSelect"),
    ("optimizer", r"adam|Adam|multi_tensor|foreach|lerp|addcdiv|addcmul"),
    ("products", r"gemm|_mm|::mm|cutlass|nvjet|xmma|addmm|matmul"),
    ("activation", r"[Gg]elu|activation|relu"),
    ("compiled by Inductor", r"^triton_"),
    ("copies and casts", r"copy|[Mm]emcpy|[Cc]at|_to_|fill|zero|[Mm]emset"),
    ("elementwise and reductions", r"elementwise|reduce|norm|add|mul|sum|clamp"),
)
STEPS = 3
# Sections of ncu's report that fit on a page.
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")


def part_of(name: str) -> str:
    return next((part for part, pattern in PARTS if re.search(pattern, name)), "other")


def profiled(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds of one run by kernel name (by operator on a CPU)."""
    run()
    clock()
    on_gpu = device().type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            run()
        clock()
    times: dict[str, float] = {}
    for event in profile.key_averages():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if is_kernel or not on_gpu:
            spent = event.self_device_time_total if is_kernel else event.self_cpu_time_total
            times[event.key] = times.get(event.key, 0.0) + spent / 1e3 / repeats
    return times


def parts(times: dict[str, float]) -> dict[str, float]:
    """Summed by part, the largest first."""
    summed: dict[str, float] = {}
    for name, ms in times.items():
        summed[part_of(name)] = summed.get(part_of(name), 0.0) + ms
    return dict(sorted(summed.items(), key=lambda item: -item[1]))


def by_part(store: Store, scale: str, again: bool) -> None:
    """One training step and one generation of fastgpt and of its rivals."""
    wanted = ((train_step.BENCHMARKS[0], (OURS, "nanoGPT, compiled", "nanoGPT")), (generate.BENCHMARKS[0], (OURS,)))
    for benchmark, providers in wanted:
        case = benchmark.cases(scale)[0]
        shown = Case(f"{benchmark.name} by part", case.size, case.mode, case.dtype)
        for provider in providers:
            if store.has(shown.benchmark, shown.label, provider) and not again:
                continue
            try:
                candidate = benchmark.providers[provider](case)
            except Absent as reason:
                store.add(row(shown, provider, "absent", reason=str(reason)))
                continue
            times = profiled(candidate.run, 1 if scale == "dry" else STEPS)
            top = dict(sorted(times.items(), key=lambda item: -item[1])[:12])
            store.add(row(shown, provider, "ok", parts=parts(times), kernels=top, state=state()))
            del candidate
            free()


def worst(directory: Path, count: int) -> list[tuple[str, str]]:
    """(benchmark, case) of fastgpt's kernels with the most time over their floor at their base sizes."""
    _, _, rows = report.load(directory)
    ours = [r for r in rows if r["provider"] == OURS and "floor_ms" in r and r["mode"] and not r["grows"]]
    over = sorted(ours, key=lambda r: r["floor_ms"] - r["ms"])
    return list(dict.fromkeys((r["benchmark"], r["case"]) for r in over))[:count]


def find(benchmark: str, case: str, scale: str) -> tuple[Benchmark, Case]:
    for found, candidate, _ in selected([benchmark], scale, quick=False):
        if candidate.label == case:
            return found, candidate
    raise ValueError(f"{benchmark} has no case {case!r} at scale {scale!r}")


def look(benchmark: str, case: str, dry_run: bool) -> str:
    """ncu's page on one op, or torch.profiler's where ncu isn't."""
    title = f"=== {benchmark} {case}\n"
    command = [
        sys.executable,
        "-m",
        "benchmarks.profiling",
        "--one",
        benchmark,
        case,
        *(["--dry-run"] if dry_run else []),
    ]
    ncu = shutil.which("ncu")
    if ncu is not None:
        sections = [argument for section in SECTIONS for argument in ("--section", section)]
        options = [
            "--clock-control",
            "none",
            "--kernel-name",
            "regex:^_.*_kernel$",  # torch's own, which draw the inputs, don't begin with an underscore
            "--launch-skip",
            "8",
            "--launch-count",
            "4",
        ]
        done = subprocess.run([ncu, *options, *sections, *command], capture_output=True, text=True, cwd=ROOT)
        return title + done.stdout + done.stderr
    found, chosen = find(benchmark, case, scale_of(dry_run))
    times = profiled(found.providers[OURS](chosen).run, 1)
    lines = [f"{ms:>12.4f} ms  {name}" for name, ms in sorted(times.items(), key=lambda item: -item[1])[:12]]
    return title + "\n".join(lines) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        if r["status"] != "ok":
            lines.append(f"{r['benchmark']} {r['case']} {r['provider']}: {r['status']}, {r['reason']}")
            continue
        total = sum(r["parts"].values())
        lines.append(f"{r['benchmark']} {r['case']} {r['provider']}: {total:.3f} ms")
        lines += [f"  {part:<28}{ms:>12.3f} ms{100 * ms / total:>6.1f}%" for part, ms in r["parts"].items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiling", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench") / machine_name(), help="folder of the records")
    parser.add_argument("--worst", type=int, default=4, help="how many ops to look at closely")
    parser.add_argument("--again", action="store_true", help="profile what is recorded already, too")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, kernels in Triton's interpreter")
    parser.add_argument("--one", nargs=2, metavar=("BENCHMARK", "CASE"), help="run this op three times and stop")
    arguments = parser.parse_args(argv)
    scale = scale_of(arguments.dry_run)
    if arguments.one:
        benchmark, case = find(*arguments.one, scale)
        run = benchmark.providers[OURS](case).run
        for _ in range(3):
            run()
        clock()
        return 0
    store = Store(arguments.out, GROUP)
    command = " ".join(["python -m benchmarks.profiling", *(argv if argv is not None else sys.argv[1:])])
    store.start(run_record(command, datetime.now().astimezone().isoformat(timespec="seconds")))
    by_part(store, scale, arguments.again)
    with open(arguments.out / "profile.txt", "w", encoding="utf-8") as file:
        for benchmark, case in worst(arguments.out, arguments.worst):
            file.write(look(benchmark, case, arguments.dry_run) + "\n")
            file.flush()
    print(table(store.rows))
    print(f"closer: {arguments.out / 'profile.txt'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
