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

ARCHITECTURES = tuple(f"sm{number}" for number in CHIPS)
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


def compile_job(job: Job, kinds: Mapping[str, Kind] = KINDS) -> list[Row]:
    """Compile and judge, for the twin too; a compiler's error is a problem like any other."""
    row, compiled = _compile(job, kinds)
    if job.twin is None:
        return [row]
    if compiled is None:
        return [row, _compile(job.twin, kinds)[0]]
    backend = triton.compiler.make_backend(job.twin.target.gpu)
    stages: dict[str, Callable[[str, dict[str, Any]], bytes]] = {}
    backend.add_stages(stages, backend.parse_options(job.twin.options), Language.TRITON)
    started = time.perf_counter()
    ptx = compiled.asm["ptx"].replace(".target sm_80", ".target sm_86")
    twin = dataclasses.replace(row, arch=job.twin.target.name, launches=job.twin.launches)
    read_nvidia(twin, stages["cubin"](ptx, {}), ptx, compiled.metadata.num_warps, CHIPS[job.twin.target.number])
    twin.seconds = time.perf_counter() - started
    _hold(twin, job.twin, kinds)
    return [row, twin]


def _compile(job: Job, kinds: Mapping[str, Kind]) -> tuple[Row, Any]:
    arguments, options = job.arguments(), job.options
    constants = {p.name: arguments[p.name] for p in job.launch.kernel.params if p.is_constexpr and p.name in arguments}
    blocks = [
        f"{n}={v}" for n, v in constants.items() if isinstance(v, int) and not isinstance(v, bool) and n.isupper()
    ]
    config = " ".join([*blocks, f"warps={options['num_warps']}", f"stages={options['num_stages']}"])
    name = job.launch.kernel.__name__
    row, compiled = Row(job.case.op, job.case.label, name, job.target.name, config, job.launches), None
    started = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints the whole PTX when ptxas fails
            compiled = triton.compile(job.source, target=job.target.gpu, options=options)
    except Exception as error:
        row.error = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    else:
        row.shared = compiled.metadata.shared
        if job.target.gpu.backend == "cuda":
            asm = compiled.asm
            read_nvidia(row, asm["cubin"], asm["ptx"], compiled.metadata.num_warps, CHIPS[job.target.number])
        else:
            read_amd(row, compiled.asm["amdgcn"])
    row.seconds = time.perf_counter() - started
    if job.target.gpu.backend == "cuda":
        _hold(row, job, kinds)
    return row, compiled


def _hold(row: Row, job: Job, kinds: Mapping[str, Kind]) -> None:
    row.floor = floor_of(job.launch, job.arguments(), kinds, CHIPS[job.target.number])
    row.problems = judge(row, job.launch, job.arguments(), job.target.number, kinds)


_jobs: list[Job] = []
_kinds: Mapping[str, Kind] = {}


def _compile_one(index: int) -> list[Row]:
    return compile_job(_jobs[index], _kinds)


def _compile_some(indices: Iterable[int], processes: int) -> dict[int, list[Row]]:
    """Rows of _jobs[indices]; none for those whose worker died."""
    rows: dict[int, list[Row]] = {}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        futures = {index: pool.submit(_compile_one, index) for index in indices}
        for index, future in futures.items():
            with contextlib.suppress(BrokenProcessPool):
                rows[index] = future.result()
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
    parser.add_argument("--quick", action="store_true", help="one width and head size, bf16 alone")
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
    targets = options.arch or [parse_target(name) for name in ARCHITECTURES]
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
