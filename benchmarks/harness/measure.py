"""How a thing is timed, and how it is shown to be right first.

A Benchmark is data: cases (sizes, FLOPs and bytes by formula) and providers by name. A provider prepares a Candidate for a
case, or raises Absent with the reason. A candidate's outputs are checked before any timing, again on new inputs through the
very callable that will be timed, and once more after the timing; an op's outputs are overwritten before it has to give them
again. A provider that returns garbage, hands out an old result or leaves work out is refused, and listed as such.

The clock synchronizes. On a GPU the calls of an op are captured into one CUDA graph that goes round over buffers larger than
the L2 cache, as in https://github.com/Dao-AILab/quack (bench_utils.py), so that ops bound by memory are measured cold and the
cost of a launch from Python isn't.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.record import version
from fastgpt.graphs import capture

# A sample shorter than this is repeated inside itself: synchronizing costs 10 us, which is then 0.3% of it.
SAMPLE_SECONDS = 3e-3
MAX_GRAPH_NODES = 4000

OURS = "fastgpt"
INT8 = f"{OURS}, int8"  # of other weights: those rounded to 8 bits


class Absent(Exception):
    """Why a provider can't take part here."""


class Wrong(AssertionError):
    """A provider's output isn't the right one."""


class Work(NamedTuple):
    """What a call must do at least: FLOPs, and bytes of each operand once."""

    flops: float = 0.0
    read: float = 0.0
    written: float = 0.0


NOTHING = Work()


@dataclass(frozen=True)
class Case:
    """One size of a benchmark. `grows` names the size that a series of cases varies, all else being equal."""

    benchmark: str
    size: Mapping[str, Any]
    mode: str
    dtype: str
    work: Work = NOTHING
    units: float = 0.0  # of `unit` that one call gets through: tokens, rows
    unit: str = ""
    grows: str | None = None
    alone: bool = False  # too large to be in memory beside fastgpt: not timed in turn with it

    @property
    def label(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.size.items())
        return " ".join(part for part in (sizes, self.dtype, self.mode) if part)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass
class Candidate:
    """A provider ready to be timed.

    run: makes `calls` calls and returns what there is to check. check: raises Wrong. refresh: puts new data into the inputs
    that `run` reads. poison: overwrites what `run` returned. notes: further columns of the row.
    """

    run: Callable[[], Any]
    check: Callable[[Any], None]
    refresh: Callable[[], None] = lambda: None
    poison: Callable[[Any], None] | None = None
    calls: int = 1
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """cases(scale) at a scale of SCALES; providers: name -> prepare(case) -> Candidate, "fastgpt" among them and first.

    rounds: samples of each provider; 0 where the notes are the result. group: the file of results/<machine>/ that holds the rows.
    """

    name: str
    group: str
    cases: Callable[[str], Sequence[Case]]
    providers: Mapping[str, Callable[[Case], Candidate]]
    rounds: int = 5


# gpu: GPT-2's own sizes. cpu: what two cores do in minutes. dry: every code path in seconds, kernels in Triton's interpreter.
SCALES = ("gpu", "cpu", "dry")


def scale_of(dry_run: bool) -> str:
    return "dry" if dry_run else device().type.replace("cuda", "gpu")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def needs(module: str, distribution: str = "") -> None:
    """Raise Absent unless `module` is installed, and as part of `distribution` where others have the name too."""
    if importlib.util.find_spec(module) is None or (distribution and version(distribution) is None):
        raise Absent("not installed")


def needs_cuda(what: str) -> None:
    if device().type != "cuda":
        raise Absent(f"{what} is compared on a GPU only")


def clock() -> float:
    """Seconds on the host's clock, once the device has finished what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run: Callable[[], Any]) -> float:
    started = clock()
    run()
    return clock() - started


class Timing(NamedTuple):
    """Of `rounds` samples a call; p20 and p80 between samples by their distance."""

    median: float
    p20: float
    p80: float
    rounds: int


def timing(samples: Sequence[float], calls: int = 1) -> Timing:
    ordered = sorted(sample / calls for sample in samples)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place % 1)

    return Timing(statistics.median(ordered), at(0.2), at(0.8), len(ordered))


def host_loop(calls: Sequence[Callable[[], Any]], repeats: int) -> Callable[[], list[Any]]:
    """All calls `repeats` times over; gives the last outputs of each."""

    def run() -> list[Any]:
        for _ in range(repeats - 1):
            for call in calls:
                call()
        return [call() for call in calls]

    return run


def graph_loop(calls: Sequence[Callable[[], Any]], repeats: int, stream: torch.cuda.Stream) -> Callable[[], list[Any]]:
    """host_loop as one CUDA graph; the outputs are the graph's own memory, written anew by every run."""
    replay, outputs = capture(host_loop(calls, repeats), stream.device, warmups=0, stream=stream)

    def run() -> list[Any]:
        replay()
        return outputs

    return run


def looped(calls: Sequence[Callable[[], Any]], stream: torch.cuda.Stream | None) -> tuple[Callable[[], list[Any]], int]:
    """A run long enough to time, and how many calls it makes. With a stream it is a CUDA graph captured there.

    The calls have been made before, on that stream.
    """
    make = host_loop if stream is None else lambda c, n: graph_loop(c, n, stream)
    run = make(calls, 1)
    run()
    once = min(seconds(run) for _ in range(2))
    most = MAX_GRAPH_NODES // len(calls)
    repeats = max(1, min(math.ceil(SAMPLE_SECONDS / max(once, 1e-7)), most))
    return (run if repeats == 1 else make(calls, repeats)), repeats * len(calls)


def prove(candidate: Candidate, rounds: int = 2) -> None:
    """Check the outputs, each time but the first on new inputs. Raises Wrong.

    Where outputs can be overwritten, those of a run on the first inputs are, before one that is checked: who hands them out
    again, or left work to a stream that the timed run doesn't hold, has nothing right to show.
    """
    for i in range(rounds):
        if i:
            candidate.refresh()
        elif candidate.poison is not None:
            candidate.poison(candidate.run())
        outputs = candidate.run()
        clock()
        candidate.check(outputs)


class Result(NamedTuple):
    """ours: the samples of fastgpt that alternated with the provider's; empty where the provider is fastgpt."""

    samples: list[float]
    ours: list[float]


# (run, setup before every sample and not timed, samples) -> seconds of each sample; pytest-benchmark's pedantic mode, or `timed`
TimeRounds = Callable[[Callable[[], Any], Callable[[], None], int], list[float]]


def timed(run: Callable[[], Any], setup: Callable[[], None], rounds: int) -> list[float]:
    samples = []
    for _ in range(rounds):
        setup()
        samples.append(seconds(run))
    return samples


def measure(candidate: Candidate, ours: Candidate | None, rounds: int, time_rounds: TimeRounds = timed) -> Result:
    """Prove, time in turn with `ours`, prove again. Raises Wrong. With rounds=0 there is nothing to time."""
    prove(candidate)
    if rounds == 0:
        return Result([], [])
    paired: list[float] = []

    def before_each() -> None:
        if ours is not None:
            paired.append(seconds(ours.run))

    samples = time_rounds(candidate.run, before_each, rounds)
    candidate.refresh()
    prove(candidate, 1)
    return Result(samples, paired)


def error(out: Tensor, exact: Tensor) -> tuple[float, float]:
    """(maximum, root mean square) of the error against float64 `exact`, each relative to exact's own."""
    if out.shape != exact.shape:
        return math.inf, math.inf
    difference, exact = out.detach().double() - exact, exact.detach()
    rms = lambda x: x.square().mean().sqrt().item()  # noqa: E731
    return difference.abs().max().item() / exact.abs().max().item(), rms(difference) / rms(exact)


def check_close(outputs: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], eps: float) -> float:
    """At most four times the error of plain PyTorch in the same dtype plus one rounding; returns the largest RMS error.

    Wider than the factor of two that tests hold this project's kernels to, since peers round at other places.
    """
    if len(outputs) != len(exact):
        raise Wrong(f"{len(outputs)} outputs, expected {len(exact)}")
    worst = 0.0
    for i, (out, same, right) in enumerate(zip(outputs, plain, exact, strict=True)):
        for kind, ours, theirs in zip(("maximum", "RMS"), error(out, right), error(same, right), strict=True):
            if not ours <= 4 * theirs + eps:  # NaN is Wrong too
                raise Wrong(f"output {i}: {kind} error {ours:.2e}, plain PyTorch {theirs:.2e}, rounding {eps:.0e}")
        worst = max(worst, error(out, right)[1])
    return worst


def row(case: Case, provider: str, status: str, **columns: Any) -> dict[str, Any]:
    """What is recorded of a provider at a case."""
    return {
        "benchmark": case.benchmark,
        "case": case.label,
        "provider": provider,
        "status": status,
        "size": dict(case.size),
        "mode": case.mode,
        "dtype": case.dtype,
        "grows": case.grows,
        "flops": case.work.flops,
        "read": case.work.read,
        "written": case.work.written,
        "units": case.units,
        "unit": case.unit,
        **columns,
    }


def measured_row(case: Case, provider: str, candidate: Candidate, ours: Candidate | None, result: Result) -> dict:
    """The row of a provider that was right: milliseconds a call, and how many times as fast fastgpt is, sample by sample.

    samples_ms are the samples themselves, fastgpt_ms those of fastgpt that each was timed in turn with.
    """
    if not result.samples:
        return row(case, provider, "ok", **candidate.notes)
    t = timing(result.samples, candidate.calls)
    columns: dict[str, Any] = {
        "ms": 1e3 * t.median,
        "p20": 1e3 * t.p20,
        "p80": 1e3 * t.p80,
        "rounds": t.rounds,
        "calls": candidate.calls,
        "samples_ms": _milliseconds(result.samples, candidate.calls),
    }
    if result.ours and ours is not None:
        unit, our_unit = (c.calls * c.notes.get("units", 1.0) for c in (candidate, ours))  # a slow one does less
        pairs = zip(result.samples, result.ours, strict=True)
        ratio = timing([(theirs / unit) / (mine / our_unit) for theirs, mine in pairs])
        columns["fastgpt_ms"] = _milliseconds(result.ours, ours.calls)
        columns |= {"fastgpt_is": ratio.median, "fastgpt_is_p20": ratio.p20, "fastgpt_is_p80": ratio.p80}
    return row(case, provider, "ok", **columns, **candidate.notes)


def _milliseconds(samples: Sequence[float], calls: int) -> list[float]:
    return [float(f"{1e3 * sample / calls:.5g}") for sample in samples]
