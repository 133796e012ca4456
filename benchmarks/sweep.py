"""Launch constants, tried one after another on this GPU: the table behind each choice, and what it proposes.

    python -m benchmarks.sweep [NAME …] [--out DIR] [--again] [--dry-run] [--minutes M]
    python -m benchmarks.sweep --limits NAME --arch 90       which candidates keep the ahead-of-time limits; needs no GPU

A constant is a name in fastgpt_kernels, a number or a function that picks a tile; for the time of a measurement it is replaced
from outside (unittest.mock), so that production code has no switch for it. Candidates that spill, or take more shared memory
than there is, are left out before any is run; each one left is proven right like any provider, then timed.

results/<gpu>/sweep.json is data: a test holds the constants in the code to within TOLERANCE of the best that is recorded.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.harness.measure import OURS, Case, Wrong, device, measure, measured_row, row, scale_of
from benchmarks.harness.op import Op, call_on_meta
from benchmarks.harness.record import ROOT, Store, machine_name, run_record, state
from benchmarks.ops import (
    attention,
    cross_entropy,
    decode,
    decode_token,
    embedding,
    gelu,
    layer_norm,
    linear,
    sampling,
    softmax,
)

GROUP = "sweep"
# What a recorded best may be ahead of the code's choice: less than this is the noise between two leases.
TOLERANCE = 1.05
ROUNDS = 15

Chosen = Callable[[Case, int, int], Any]  # (case, capability, multiprocessors) -> what the code uses there


@dataclass(frozen=True)
class Constant:
    """`target` is the name in fastgpt_kernels that is replaced by each candidate; a function, by one that returns it."""

    name: str
    target: str
    op: Op
    mode: str
    candidates: tuple[Any, ...]
    chosen: Chosen | None = None  # None: the value of the name itself

    def _place(self) -> tuple[Any, str]:
        module, _, name = self.target.rpartition(".")
        return importlib.import_module(f"fastgpt_kernels.{module}"), name

    def replaced(self, candidate: Any) -> AbstractContextManager[Any]:
        value = candidate if self.chosen is None else lambda *arguments: candidate
        return mock.patch.object(*self._place(), value)

    def current(self, case: Case, capability: int, multiprocessors: int) -> Any:
        return getattr(*self._place()) if self.chosen is None else self.chosen(case, capability, multiprocessors)

    def cases(self, scale: str) -> list[Case]:
        found = [case for case in self.op.benchmark.cases(scale) if case.mode == self.mode and not case.grows]
        return found[:1] if scale == "dry" else found


def _grid(**values: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values()))


def _attention(place: str) -> Chosen:
    module, _, name = place.partition(".")
    kernels = importlib.import_module(f"fastgpt_kernels.{module}")
    return lambda case, capability, _: getattr(kernels, name)(
        capability, case.size["D"], case.torch_dtype, False, False
    )


def _gemm(case: Case, capability: int, multiprocessors: int) -> Any:
    from fastgpt_kernels.gemm import gemm_blocks

    epilogue = case.size.get("activation")
    return gemm_blocks(case.size["M"], case.size["N"], case.torch_dtype, capability, multiprocessors, True, epilogue)


def _blocks(parts: Sequence[int]) -> tuple[Any, ...]:
    from fastgpt_kernels.gemm import Blocks

    two = [Blocks(128, 128, 64, 8, stages, p, 2, 128) for stages in (2, 3) for p in parts]
    one = [Blocks(128, 256, 64, 8, stages, p) for stages in (3, 4) for p in parts]
    tall = [Blocks(256, 128, 64, 8, stages, p) for stages in (3, 4) for p in parts]
    return (
        *two,
        *one,
        *tall,
        Blocks(64, 128, 64, 4, 4, 1, 3),
        Blocks(128, 64, 64, 4, 4, 1, 3),
        Blocks(64, 64, 64, 4, 4, 1, 3),
    )


def constants() -> dict[str, Constant]:
    """By name. Imports Triton."""
    forward = _grid(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), num_stages=(2, 3, 4), num_warps=(4, 8))
    backward = _grid(BLOCK_INNER=(32, 64, 128), BLOCK_OWN=(64, 128), num_stages=(2, 3), num_warps=(4, 8))
    ln, add_ln, ce, linear_ce = *layer_norm.OPS, *cross_entropy.OPS
    causal, wide = softmax.OPS
    found = (
        Constant(
            "attention-forward",
            "attention._fwd_blocks",
            attention.ATTENTION,
            "forward",
            forward,
            _attention("attention._fwd_blocks"),
        ),
        Constant(
            "attention-backward",
            "_attention_backward._bwd_blocks",
            attention.ATTENTION,
            "backward",
            backward,
            _attention("_attention_backward._bwd_blocks"),
        ),
        Constant("gemm-gelu", "gemm.gemm_blocks", linear.GELU, "forward", _blocks((1, 2, 4)), _gemm),
        Constant("gemm-group", "gemm.GROUP_M", linear.GELU, "forward", (4, 8, 16)),
        Constant("decode-split", "decode.SPLIT_KEYS", decode.DECODE, "forward", (32, 64, 128, 256)),
        Constant("layer-norm-lanes", "layer_norm._FWD_LANE_COLUMNS", ln, "forward", (16, 24, 32, 56)),
        Constant("layer-norm-backward-lanes", "layer_norm._BWD_LANE_COLUMNS", ln, "backward", (8, 16, 24, 32)),
        Constant("layer-norm-rows", "layer_norm._MIN_ROWS", add_ln, "backward", (4, 8, 16, 32)),
        Constant("softmax-lanes", "softmax._LANE_COLUMNS", causal, "forward", (8, 16, 32, 64)),
        Constant("softmax-wide-warps", "softmax._WIDE_WARPS", wide, "forward", (8, 16, 32)),
        Constant("softmax-wide-unroll", "softmax._WIDE_UNROLL", wide, "forward", (2, 4, 8)),
        Constant("gelu-loads", "gelu._LOADS", gelu.GELU, "forward", (1, 2, 4, 8)),
        Constant("gelu-tiles", "gelu._TILES", gelu.BIAS_GELU, "backward", (2, 4, 8, 16)),
        Constant("embedding-loads", "embedding._FWD_LOADS", embedding.EMBEDDING, "forward", (1, 2, 4, 8)),
        Constant("activation-programs", "linear.PROGRAMS_PER_SM", linear.GELU, "backward", (2, 4, 6, 8)),
        Constant("cross-entropy-lanes", "_cross_entropy_rows.MAX_LANES", ce, "both", (256, 512, 1024, 2048)),
        Constant(
            "cross-entropy-chunk",
            "cross_entropy.CHUNK_BYTES",
            linear_ce,
            "both",
            tuple(n << 20 for n in (128, 256, 512, 1024, 2048)),
        ),
        Constant("token-rows", "decode_token.ROWS", decode_token.TOKEN, "forward", (2, 4, 8)),
        Constant("token-project-rows", "decode_token.PROJECT_ROWS", decode_token.TOKEN, "forward", (4, 8, 16)),
        Constant("token-head-rows", "decode_token.HEAD_ROWS", decode_token.TOKEN, "forward", (8, 16, 32)),
        Constant("token-split", "decode_token.SPLIT_KEYS", decode_token.TOKEN, "forward", (64, 128, 256)),
        Constant(
            "token-ahead",
            "decode_token.AHEAD_BYTES",
            decode_token.AHEAD,
            "forward",
            tuple(n << 20 for n in (0, 2, 4, 8, 16, 24)),
        ),
        Constant("sample-split", "sampling._SPLIT", sampling.DRAW, "forward", (1024, 2048, 4096, 8192)),
        Constant("sample-list", "_filters._LIST", sampling.FILTERED, "forward", (512, 1024, 2048, 4096)),
    )
    return {constant.name: constant for constant in found}


def limits(constant: Constant, case: Case, capability: int) -> list[list[str]]:
    """What each candidate breaks of the ahead-of-time rules, empty where nothing. Compiles; needs a process of its own."""
    from fastgpt_kernels import aot

    target, jobs, owners = aot.parse_target(f"sm{capability}"), [], []

    for i, candidate in enumerate(constant.candidates):
        with constant.replaced(candidate):
            collected = aot.collect(
                [aot.Case(constant.op.name, case.label, lambda: call_on_meta(constant.op, case))], target
            )
        jobs += collected.values()
        owners += [i] * len(collected)
    rows = aot.compile_all(jobs, aot.KINDS, min(os.cpu_count() or 1, 8))
    problems: list[list[str]] = [[] for _ in constant.candidates]
    for owner, compiled in zip(owners, rows, strict=True):
        problems[owner] += [f"{compiled.kernel} {problem}" for problem in compiled.problems]
    return problems


def limits_in_a_process(constant: Constant, capability: int) -> list[list[list[str]]]:
    """limits() of each case at GPU sizes, by a process that doesn't touch the GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.sweep", "--limits", constant.name, "--arch", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def label(candidate: Any) -> str:
    """A candidate as text."""
    if hasattr(candidate, "_asdict"):
        candidate = candidate._asdict()
    if isinstance(candidate, Mapping):
        return " ".join(f"{name}={value}" for name, value in candidate.items() if value is not None)
    return str(candidate)


def sweep(constant: Constant, scale: str, store: Store, again: bool = False) -> Iterator[str]:
    """Measure a constant's candidates at each of its cases; yields the table of each."""
    capability, multiprocessors = 90, 132
    if scale == "gpu":
        properties = torch.cuda.get_device_properties(0)
        capability, multiprocessors = properties.major * 10 + properties.minor, properties.multi_processor_count
    cases = constant.cases(scale)
    refused = (
        limits_in_a_process(constant, capability)
        if scale == "gpu"
        else [[[] for _ in constant.candidates]] * len(cases)
    )
    for case, problems in zip(cases, refused, strict=True):
        title = f"{constant.name}: {case.label}"
        swept = Case("sweep", case.size, case.mode, case.dtype, case.work)
        current = label(constant.current(case, capability, multiprocessors))
        candidates = list(zip(constant.candidates, problems, strict=True))[: 1 if scale == "dry" else None]
        if current not in map(label, constant.candidates) and scale != "dry":
            candidates.append((constant.current(case, capability, multiprocessors), []))
        for candidate, broken in candidates:
            name = label(candidate)
            if store.has("sweep", title, name) and not again:
                continue
            found = _measured(constant, case, swept, candidate, scale, name) if not broken else None
            found = found or row(swept, name, "refused", reason="; ".join(broken))
            store.add({**found, "case": title, "constant": constant.name, "current": name == current})
        yield table(title, [r for r in store.rows if r["case"] == title])


def _measured(constant: Constant, case: Case, swept: Case, candidate: Any, scale: str, name: str) -> dict[str, Any]:
    with constant.replaced(candidate):
        try:
            prepared = constant.op.candidate(constant.op.function(OURS, case), case)
            result = measure(prepared, None, 1 if scale == "dry" else ROUNDS)
            return {**measured_row(swept, name, prepared, None, result), "state": state()}
        except Wrong as wrong:
            return row(swept, name, "WRONG", reason=str(wrong))
        except Exception as failure:  # out of resources, say: a finding about the candidate, not about the sweep
            return row(swept, name, "FAILED", reason=f"{type(failure).__name__}: {failure}".splitlines()[0][:300])


def table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Fastest first; what the code has now is marked, and the proposal is the last line."""
    timed = sorted((r for r in rows if r["status"] == "ok"), key=lambda r: r["ms"])
    lines = [title, *(f"  {'now ' if r['current'] else '    '}{r['ms']:>9.4f} ms  {r['provider']}" for r in timed)]
    lines += [f"      {r['status']:<9}    {r['provider']}: {r['reason']}" for r in rows if r["status"] != "ok"]
    now = next((r for r in timed if r["current"]), None)
    if timed and now is None:
        lines.append(f"  propose {timed[0]['provider']}; what the code has now was not measured")
    elif timed and now["ms"] > TOLERANCE * timed[0]["ms"]:
        lines.append(f"  propose {timed[0]['provider']}: {now['ms'] / timed[0]['ms']:.2f}x faster than now")
    elif timed:
        lines.append("  keep what is there")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="constants; all by default")
    parser.add_argument("--out", type=Path, default=Path("out/bench") / machine_name(), help="folder of the records")
    parser.add_argument("--again", action="store_true", help="measure what is recorded already, too")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no other constant after so many minutes")
    parser.add_argument("--dry-run", action="store_true", help="one candidate each, in Triton's interpreter")
    parser.add_argument("--limits", metavar="NAME", help="print what each candidate breaks, as JSON; measure nothing")
    parser.add_argument("--arch", type=int, default=90, help="with --limits: compute capability, 90 for sm90")
    arguments = parser.parse_args(argv)
    known = constants()
    for name in [*arguments.names, *([arguments.limits] if arguments.limits else [])]:
        if name not in known:
            parser.error(f"no constant is called {name!r}; there are {', '.join(known)}")
    if arguments.limits:
        constant = known[arguments.limits]
        print(json.dumps([limits(constant, case, arguments.arch) for case in constant.cases("gpu")]))
        return 0
    if device().type != "cuda" and not arguments.dry_run:
        parser.error("launch constants are measured on a GPU; without one there is --dry-run, and --limits")
    started, store = time.monotonic(), Store(arguments.out, GROUP)
    command = " ".join(["python -m benchmarks.sweep", *(argv if argv is not None else sys.argv[1:])])
    store.start(run_record(command, datetime.now().astimezone().isoformat(timespec="seconds")))
    for name in arguments.names or known:
        if time.monotonic() - started > 60 * arguments.minutes:
            print("out of time; the same command goes on where this one stopped")
            break
        for text in sweep(known[name], scale_of(arguments.dry_run), store, arguments.again):
            print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
