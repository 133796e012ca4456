"""What this very machine can do, measured before anything is compared with it.

    python -m benchmarks.harness.floors [--out DIR] [--dry-run]

copy and read       GB/s of a copy (read + written) and of a read alone, over buffers far larger than the caches
weights             GB/s of reading the weights of GPT-2 124M once, one program a multiprocessor: what a token costs
matmul              TFLOP/s of the library's square product on random data, a dtype a row
launch              us of host time a launch of a small Triton kernel and of a small torch op take
graph node          us of one more small kernel in a CUDA graph, with and without dependent launch
barrier             us of one barrier among one program a multiprocessor, in Triton's own atomics and in inline assembly

On a CPU: copy, read, weights, matmul, and the call of a small torch op.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.measure import NOTHING, Case, Work, device, row, seconds, timing
from benchmarks.harness.op import interpreting
from benchmarks.harness.record import Store, machine_name, run_record, state
from fastgpt import ops
from fastgpt.graphs import capture

GROUP = "floors"
ROUNDS = 15
# Parameters that a token of GPT-2 124M reads: all but the position table, the head tied to the embedding.
WEIGHTS = 123_653_376
NODES = 200


class Floor:
    """One measured rate: `value` in `unit`; better is larger or, for a time, smaller."""

    def __init__(self, name: str, unit: str, sizes: dict[str, Any], dtype: str = "", work: Work = NOTHING) -> None:
        self.case = Case("floors", {"what": name, **sizes}, "", dtype, work, unit=unit)

    def row(self, samples: Sequence[float], value: Callable[[float], float], best: bool = False) -> dict[str, Any]:
        """`value` of the median or, for what the machine can do at most, of the best sample."""
        t = timing(samples)
        columns = {"ms": 1e3 * t.median, "p20": 1e3 * t.p20, "p80": 1e3 * t.p80, "rounds": t.rounds}
        return row(
            self.case, "machine", "ok", **columns, value=value(min(samples) if best else t.median), state=state()
        )


def sampled(run: Callable[[], Any], rounds: int, warmups: int = 2) -> list[float]:
    for _ in range(warmups):
        run()
    return [seconds(run) for _ in range(rounds)]


def bandwidth(scale: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Copy and read; the CPU's read is torch's own sum, which all of its threads share."""
    elements = {"gpu": 1 << 30, "cpu": 1 << 27, "dry": 1 << 12}[scale]
    dtype = torch.bfloat16 if scale == "gpu" else torch.float32
    name = str(dtype).removeprefix("torch.")
    yield copy_floor(torch.randn(elements, device=device(), dtype=dtype), name, rounds)
    yield read_floor("read", torch.randn(elements, device=device(), dtype=dtype), 4, name, rounds)
    weights = torch.randn(WEIGHTS if scale != "dry" else 8192, device=device(), dtype=dtype)
    for programs in (1, 2, 4) if scale == "gpu" else (1,):
        yield read_floor("weights", weights, programs, name, rounds)


def copy_floor(source: torch.Tensor, dtype: str, rounds: int) -> dict[str, Any]:
    target = torch.empty_like(source)
    floor = Floor("copy", "GB/s", {"MB": source.nbytes // 2**20}, dtype, Work(0, source.nbytes, source.nbytes))
    samples = sampled(lambda: target.copy_(source), rounds)
    if not torch.equal(target, source):
        raise AssertionError("the copy isn't one")
    return floor.row(samples, lambda t: 2 * source.nbytes / t / 1e9, best=True)


def read_floor(what: str, x: torch.Tensor, programs: int, dtype: str, rounds: int) -> dict[str, Any]:
    floor = Floor(what, "GB/s", {"MB": x.nbytes // 2**20, "programs": programs}, dtype, Work(0, x.nbytes))
    return floor.row(sampled(lambda: stream(x, programs), rounds), lambda t: x.nbytes / t / 1e9, best=True)


def stream(x: torch.Tensor, per_multiprocessor: int) -> Any:
    """Read all of x: on a GPU, `per_multiprocessor` programs each walk over it."""
    if x.is_cuda or interpreting():
        from benchmarks.harness.floor_kernels import read_all

        return read_all(x, per_multiprocessor)
    return x.sum()


def products(scale: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Square products on random data: zeros would run faster. Of two sizes, since either may be the faster one."""
    sizes = {"gpu": (4096, 8192), "cpu": (1024, 2048), "dry": (64,)}[scale]
    kinds = {"bfloat16": (torch.bfloat16, "highest"), "float16": (torch.float16, "highest")}
    kinds |= {"tf32": (torch.float32, "high")}
    if scale != "gpu":
        kinds = {"bfloat16": kinds["bfloat16"]} if scale == "cpu" else {}
    kinds["float32"] = (torch.float32, "highest")
    for (name, (dtype, precision)), n in itertools.product(kinds.items(), sizes):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            a, b = (torch.randn(n, n, device=device(), dtype=dtype) for _ in range(2))
            floor = Floor("matmul", "TFLOP/s", {"N": n}, name, Work(2.0 * n**3))
            # On a CPU by the library that fastgpt takes, where that isn't torch's choice.
            multiply = ops.linear if scale == "cpu" else torch.matmul
            samples = sampled(lambda a=a, b=b, multiply=multiply: multiply(a, b), rounds)
            yield floor.row(samples, lambda t, n=n: 2.0 * n**3 / t / 1e12, best=True)
        finally:
            torch.set_float32_matmul_precision(before)


def overheads(scale: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Host time of one torch call, submitted back to back."""
    x = torch.randn(16, device=device())
    calls = 20 if scale == "dry" else 1000

    def many() -> None:
        for _ in range(calls):
            x.add_(1.0)

    yield Floor("torch call", "us", {}).row(sampled(many, rounds), lambda t: t / calls * 1e6)


def launches(scale: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Launches, graph nodes and grid barriers of Triton kernels; in a dry run, the kernels alone in the interpreter."""
    from benchmarks.harness import floor_kernels as kernels

    on_gpu = scale == "gpu"
    calls = 1000 if on_gpu else 2
    programs = torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else 1
    x = torch.zeros(programs * kernels.BLOCK, device=device())

    def many(dependent: bool, grid: int, count: int) -> None:
        for _ in range(count):
            kernels.tiny(x, grid, dependent)

    floor = Floor("triton launch", "us", {"programs": 1})
    yield floor.row(sampled(lambda: many(False, 1, calls), rounds), lambda t: t / calls * 1e6)
    hopper = on_gpu and torch.cuda.get_device_capability()[0] >= 9
    for grid in sorted({1, programs}):
        for dependent in (False, True) if hopper else (False,):
            nodes = NODES if on_gpu else 2
            run = functools.partial(many, dependent, grid, nodes)
            if on_gpu:
                run, _ = capture(run, device())
            floor = Floor("graph node", "us", {"programs": grid, "dependent launch": dependent})
            yield floor.row(sampled(run, rounds), lambda t, n=nodes: t / n * 1e6)
    for kind in kernels.BARRIERS if on_gpu else kernels.BARRIERS[:1]:
        turns = 500 if on_gpu else 3
        if not kernels.barrier_orders_memory(kind, programs, turns):
            raise AssertionError(f"barrier {kind!r} let a program see old data")
        few, many_turns = turns // 5 or 1, 2 * turns
        times = [sampled(lambda k=kind, n=n: kernels.barriers(k, programs, n), rounds) for n in (few, many_turns)]
        samples = [(long - short) for short, long in zip(*times, strict=True)]
        floor = Floor("barrier", "us", {"programs": programs, "kind": kind})
        yield floor.row(samples, lambda t, n=many_turns - few: t / n * 1e6)


def measure_floors(store: Store, scale: str, again: bool = False) -> None:
    """Whatever floors `store` doesn't have yet."""
    parts = [bandwidth, products, overheads, *([launches] if scale != "cpu" else [])]
    names = {bandwidth: "copy", products: "matmul", overheads: "torch call", launches: "triton launch"}
    held = {r["size"]["what"] for r in store.rows}
    for part in parts:
        if again or names[part] not in held:
            for measured in part(scale, 1 if scale == "dry" else ROUNDS):
                store.add(measured)


def rate(rows: Sequence[dict[str, Any]], what: str, dtype: str = "") -> float | None:
    """The recorded value of a floor, the best where there are several."""
    values = [r["value"] for r in rows if r["size"]["what"] == what and dtype in ("", r["dtype"])]
    return max(values, default=None)


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        sizes = " ".join(f"{k}={v}" for k, v in r["size"].items() if k != "what")
        lines.append(f"{r['size']['what']:<15}{sizes:<40}{r['dtype']:<10}{r['value']:>10.3f} {r['unit']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness.floors", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench") / machine_name(), help="folder of the records")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, kernels in Triton's interpreter")
    parser.add_argument("--again", action="store_true", help="measure what is recorded already, too")
    arguments = parser.parse_args(argv)
    store = Store(arguments.out, GROUP)
    command = " ".join(["python -m benchmarks.harness.floors", *(argv if argv is not None else sys.argv[1:])])
    store.start(run_record(command, datetime.now().astimezone().isoformat(timespec="seconds")))
    scale = "dry" if arguments.dry_run else "gpu" if torch.cuda.is_available() else "cpu"
    measure_floors(store, scale, arguments.again)
    print(table(store.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
