"""Compile every production kernel for GPUs that aren't here, and hold what comes out to the project's rules.

    python -m fastgpt_kernels.aot [--arch sm90 …] [--op NAME …] [--quick | --heads] [--json FILE] [--jobs N]

Each case calls a public function, forward and backward, on meta tensors inside `_launch.record(arch)`, so the launches are the
ones production would make on that architecture. Triton's own JIT then binds and specialises the arguments, with a driver that
only names the architecture, and what it would compile is compiled, each distinct thing once. Nothing runs and no GPU is needed,
but the real compiler is: not under TRITON_INTERPRET.

A row says what one compiled kernel costs: registers and spilled bytes (from the cubin), shared memory against what a program may
have, the tensor-core instruction, the widest global load and the share of the loaded bytes that come in 16-byte loads or wider
(as counted in the code, loops once, 64-bit indices aside), the occupancy that registers, shared memory and warps allow, and the
floor that the kernel is aiming at for the largest launch seen: bytes over the memory's rate or FLOPs over the tensor cores'.

The exit status is 1 if any kernel spills (attention at heads over 128 wide: more than 64 bytes a thread), takes more shared
memory than there is, multiplies 16-bit matrices without tensor cores, streams 16-bit data mostly by loads narrower than 16 bytes,
fits a multiprocessor fewer times than planned, touches what an asynchronous product may still read (see _aot_races.py), waits for
loads more often than planned (see _aot_waves.py), or, launched dependently, lets the next kernel start behind a load of its own
or waits for the kernel before it without having requested its weights. AMD targets (--arch gfx942) are reported and never fail.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget, Language

from . import _launch
from ._aot_cases import CASES, HEADS, KINDS, NARROW, QUICK, Case, Kind, Scope
from ._aot_rules import CHIPS, TMA, Row, bytes_of, floor_of, judge, read_amd, read_nvidia
from ._aot_sass import disassembled

ARCHITECTURES = tuple(f"sm{number}" for number in CHIPS)
OF_QUICK = ("sm80", "sm86", "sm90")  # what `--quick` compiles for, to stay under 90 seconds of two cores
OF_HEADS = ("attention", "decode_attention")  # what `--heads` compiles


class Target(NamedTuple):
    """What to compile for. AMD takes the launches of the arch in `number` as they are."""

    name: str
    number: int
    gpu: GPUTarget


def parse_target(name: str) -> Target:
    if re.fullmatch(r"(sm_?)?\d+", name):
        number = int(name.lstrip("sm_"))
        if number in CHIPS:
            return Target(f"sm{number}", number, GPUTarget("cuda", number, 32))
    if re.fullmatch(r"gfx9\w+", name):
        return Target(name, 80, GPUTarget("hip", name, 64))
    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(ARCHITECTURES)}, nor an AMD gfx9 target")


class _Driver:
    """As much of a driver as Triton's JIT asks before it compiles: the target, and a device that stands for it."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu

    def get_current_device(self) -> str:
        return self.target.name

    def get_current_stream(self, device: str) -> int:
        return 0


@dataclasses.dataclass
class Job:
    """One thing to compile, and the first case that needs it."""

    case: Case
    target: Target
    launch: _launch.Launch
    source: Any
    options: dict[str, Any]
    launches: int = 1
    twin: Job | None = None  # the same for sm86, whose PTX is sm80's

    def arguments(self) -> dict[str, Any]:
        return dict(zip(self.launch.kernel.arg_names, self.launch.args, strict=False)) | self.launch.kwargs


def collect(cases: Iterable[Case], target: Target) -> dict[str, Job]:
    """What the cases' launches would have Triton compile, by what Triton's own cache key is made of, less the target."""
    jobs: dict[str, Job] = {}
    triton.runtime.driver.set_active(_Driver(target))
    for case in cases:
        torch.set_float32_matmul_precision("high" if case.label.startswith("tf32") else "highest")
        with _launch.record(target.number) as launches:
            case.build()
        for launch in launches:
            key, source, options = _specialised(launch, target)
            if key not in jobs:
                jobs[key] = Job(case, target, launch, source, options)
            else:
                jobs[key].launches += 1
                if bytes_of(launch) > bytes_of(jobs[key].launch):
                    jobs[key].case, jobs[key].launch = case, launch
    return jobs


def _specialised(launch: _launch.Launch, target: Target) -> tuple[str, Any, dict[str, Any]]:
    """What the JIT hands to triton.compile for this launch: the source with its signature and attributes, and the options."""
    kernel, compiled, keywords = launch.kernel, [], launch.kwargs
    cache, _, _, backend, _ = kernel.device_caches[
        target.name
    ]  # made by the first access, which sets kernel.compile too
    if target.gpu.backend != "cuda":  # where `maxnreg`, say, is unknown
        known = {*kernel.arg_names, *vars(backend.parse_options({}))}
        keywords = {name: value for name, value in keywords.items() if name in known}
    compile_, kernel.compile = kernel.compile, lambda source, target, options: compiled.append((source, dict(options)))
    try:
        cache.clear()
        kernel.warmup(*launch.args, grid=launch.grid, **keywords)
    finally:
        kernel.compile = compile_
    source, options = compiled[0]
    key = "-".join([source.hash(), *(f"{k}={v}" for k, v in sorted(options.items()) if k != "arch")])
    return key, source, options


@dataclasses.dataclass
class _Made:
    """A row, and what the compiler made for it: nothing where it failed, and of AMD's nothing that is read later."""

    row: Row
    job: Job
    cubin: bytes = b""
    ptx: str = ""
    warps: int = 0


def compile_jobs(jobs: Sequence[Job], kinds: Mapping[str, Kind] = KINDS) -> list[list[Row]]:
    """Compile and judge each, and its twin; a compiler's error is a problem like any other."""
    made = []
    for job in jobs:
        first = _compile(job)
        made.append([first] if job.twin is None else [first, _twin_of(first, job.twin)])
    by_chip: dict[int, list[_Made]] = {}
    for one in itertools.chain.from_iterable(made):
        if one.cubin:
            by_chip.setdefault(one.job.target.number, []).append(one)
    for number, group in by_chip.items():
        for one, code in zip(group, disassembled([each.cubin for each in group], number), strict=True):
            read_nvidia(one.row, one.cubin, one.ptx, code, one.warps, CHIPS[number])
    for row, job in ((one.row, one.job) for group in made for one in group):
        if job.target.gpu.backend == "cuda":
            row.floor = floor_of(job.launch, job.arguments(), kinds, CHIPS[job.target.number])
            row.problems = judge(row, job.launch, job.arguments(), job.target.number, kinds)
    return [[one.row for one in group] for group in made]


def _compile(job: Job) -> _Made:
    arguments, options = job.arguments(), job.options
    constants = {p.name: arguments[p.name] for p in job.launch.kernel.params if p.is_constexpr and p.name in arguments}
    blocks = [
        f"{n}={v}" for n, v in constants.items() if isinstance(v, int) and not isinstance(v, bool) and n.isupper()
    ]
    config = " ".join([*blocks, f"warps={options['num_warps']}", f"stages={options['num_stages']}"])
    name = job.launch.kernel.__name__
    made = _Made(Row(job.case.op, job.case.label, name, job.target.name, config, job.launches), job)
    started = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints the whole PTX when ptxas fails
            compiled = triton.compile(job.source, target=job.target.gpu, options=options)
    except Exception as error:
        made.row.error = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    else:
        made.row.shared, made.warps = compiled.metadata.shared, compiled.metadata.num_warps
        if job.target.gpu.backend == "cuda":
            made.cubin, made.ptx = compiled.asm["cubin"], compiled.asm["ptx"]
        else:
            read_amd(made.row, compiled.asm["amdgcn"])
    made.row.seconds = time.perf_counter() - started
    return made


def _twin_of(first: _Made, twin: Job) -> _Made:
    """`twin` from the PTX of its twin on sm80."""
    if not first.cubin:
        return _compile(twin)
    backend = triton.compiler.make_backend(twin.target.gpu)
    stages: dict[str, Callable[[str, dict[str, Any]], bytes]] = {}
    backend.add_stages(stages, backend.parse_options(twin.options), Language.TRITON)
    started = time.perf_counter()
    ptx = first.ptx.replace(".target sm_80", ".target sm_86")
    row = dataclasses.replace(first.row, arch=twin.target.name, launches=twin.launches)
    made = _Made(row, twin, stages["cubin"](ptx, {}), ptx, first.warps)
    row.seconds = time.perf_counter() - started
    return made


_jobs: list[Job] = []
_kinds: Mapping[str, Kind] = {}
_AT_ONCE = 8  # jobs of a worker, whose machine code is read together


def _compile_group(indices: Sequence[int]) -> list[list[Row]]:
    return compile_jobs([_jobs[index] for index in indices], _kinds)


def _compile_some(indices: Sequence[int], processes: int) -> dict[int, list[Row]]:
    """Rows of _jobs[indices]; none for those whose worker died."""
    rows: dict[int, list[Row]] = {}
    size = max(min(_AT_ONCE, len(indices) // (2 * processes)), 1)
    groups = [indices[i : i + size] for i in range(0, len(indices), size)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        futures = [pool.submit(_compile_group, group) for group in groups]
        for group, future in zip(groups, futures, strict=True):
            with contextlib.suppress(BrokenProcessPool):
                rows |= zip(group, future.result(), strict=True)
    return rows


def compile_all(jobs: Sequence[Job], kinds: Mapping[str, Kind], processes: int) -> list[Row]:
    """The rows of all jobs. Forked workers inherit the jobs; whose compiler crashed is found by running each lost one alone."""
    global _jobs, _kinds
    _jobs, _kinds = list(jobs), kinds
    rows = _compile_some(range(len(jobs)), processes)
    for index in set(range(len(jobs))) - rows.keys():
        rows |= _compile_some([index], 1)
        if index not in rows:
            job, error = jobs[index], "the compiler crashed"
            problems = [error] if job.target.gpu.backend == "cuda" else []
            name = job.launch.kernel.__name__
            rows[index] = [
                Row(job.case.op, job.case.label, name, job.target.name, "", 1, error=error, problems=problems)
            ]
    return [row for _, group in sorted(rows.items()) for row in group]


COLUMNS = (
    "op",
    "case",
    "kernel",
    "arch",
    "config",
    "regs",
    "spill",
    "shared",
    "tensor core",
    "load",
    "waves",
    "occ.",
    "floor",
)


def _cells(row: Row) -> tuple[str, ...]:
    if row.error:
        return row.op, row.case, row.kernel, row.arch, row.config, "", "", "", "", "", "", "", row.error
    load = (
        "TMA" if row.widest_load == TMA else f"{row.widest_load} B {row.wide_share:.0%}" if row.widest_load >= 0 else ""
    )
    shared = f"{row.shared}/{row.shared_limit}"
    occupancy = f"{row.occupancy:.0%}" if row.occupancy >= 0 else ""
    waves = str(row.waves) if row.waves >= 0 else ""
    figures = str(row.registers), str(row.spilled), shared, row.tensor_core, load, waves, occupancy, row.floor
    return row.op, row.case, row.kernel, row.arch, row.config, *figures


def print_table(rows: Sequence[Row]) -> None:
    lines = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main(
    arguments: Sequence[str] | None = None,
    cases: Mapping[tuple[str, ...], Callable[[Scope], Iterable[Case]]] = CASES,
    kinds: Mapping[str, Kind] = KINDS,
) -> int:
    names = [op for ops in cases for op in ops]
    parser = argparse.ArgumentParser(prog="python -m fastgpt_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--arch", nargs="+", action="extend", type=parse_target, metavar="ARCH", help=f"of {', '.join(ARCHITECTURES)}"
    )
    parser.add_argument("--op", nargs="+", action="extend", choices=names, help="only these public functions")
    parser.add_argument(
        "--quick", action="store_true", help=f"one width and head size, bf16 alone; for {', '.join(OF_QUICK)}"
    )
    parser.add_argument("--heads", action="store_true", help="attention alone, at every head size and in fp64 too")
    parser.add_argument("--exhaustive", action="store_true", help="every variant at every size, not just at the first")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="compile in N processes")
    options = parser.parse_args(arguments)
    if _launch.INTERPRETING:
        print("TRITON_INTERPRET=1 replaces the compiler that this program is about: run it without.", file=sys.stderr)
        return 2

    started = time.perf_counter()
    wanted = set(options.op or (OF_HEADS if options.heads else names))
    makers = [make for ops, make in cases.items() if set(ops) & wanted]
    selected, collected = 0, {}
    targets = options.arch or [parse_target(name) for name in (OF_QUICK if options.quick else ARCHITECTURES)]
    for target in targets:
        scope = QUICK if options.quick else HEADS if options.heads else NARROW if target.number >= 100 else Scope()
        scope = dataclasses.replace(scope, exhaustive=options.exhaustive)
        chosen = [case for make in makers for case in make(scope) if case.op in wanted]
        collected[target.name] = collect(chosen, target)
        selected += len(chosen)
    if "sm80" in collected and "sm86" in collected:
        for key in collected["sm80"].keys() & collected["sm86"].keys():
            collected["sm80"][key].twin = collected["sm86"].pop(key)
    jobs = [job for group in collected.values() for job in group.values()]
    with tempfile.TemporaryDirectory(prefix="fastgpt-aot-") as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        rows = compile_all(jobs, kinds, options.jobs)
    print_table(rows)
    failures = [
        f"{r.kernel} on {r.arch} ({r.op}, {r.case}; {r.config}) {problem}" for r in rows for problem in r.problems
    ]
    counts = {
        "cases": selected,
        "launches": sum(row.launches for row in rows),
        "compiled": len(rows),
        "kernels": len({row.kernel for row in rows}),
        "failures": len(failures),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if options.json:
        report = {
            "triton": triton.__version__,
            "torch": torch.__version__,
            **counts,
            "rows": [vars(row) for row in rows],
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    print(
        f"\n{counts['cases']} cases over {len(targets)} architectures make {counts['launches']} launches of "
        f"{counts['kernels']} kernels; compiled each of the {counts['compiled']} distinct ones in {counts['seconds']} s"
    )
    for failure in failures:
        print(f"FAIL {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
