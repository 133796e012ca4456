"""All benchmarks by name, and which are part of which stage."""

from __future__ import annotations

from benchmarks.harness.measure import Benchmark, Case
from benchmarks.models import context, generate, host, memory, token, train_step
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

OP_FILES = (layer_norm, embedding, softmax, gelu, linear, attention, decode, decode_token, sampling, cross_entropy)
MODEL_FILES = (token, generate, context, train_step, memory, host)

# Several entries of an op (other inputs, other options) are one benchmark to the outside.
BENCHMARKS: tuple[Benchmark, ...] = (
    *(op.benchmark for file in OP_FILES for op in file.OPS),
    *(benchmark for file in MODEL_FILES for benchmark in file.BENCHMARKS),
)
NAMES = tuple(dict.fromkeys(benchmark.name for benchmark in BENCHMARKS))
GROUPS = tuple(dict.fromkeys(benchmark.group for benchmark in BENCHMARKS))


def selected(names: list[str], scale: str, quick: bool) -> list[tuple[Benchmark, Case, str]]:
    """(benchmark, case, provider) of benchmarks or groups by name, all of them for none, case by case, fastgpt first.

    quick: the first size of each, and no growth.
    """
    unknown = [name for name in names if name not in (*NAMES, *GROUPS)]
    if unknown:
        known = ", ".join(NAMES)
        raise ValueError(
            f"no benchmark is called {unknown[0]!r}; there are {known}, and the groups {', '.join(GROUPS)}"
        )
    found = []
    for benchmark in BENCHMARKS:
        if names and not {benchmark.name, benchmark.group} & set(names):
            continue
        cases = benchmark.cases(scale)
        if quick:
            cases = [case for case in cases if case.size == cases[0].size and not case.grows]
        found += [(benchmark, case, provider) for case in cases for provider in benchmark.providers]
    return found


def name_of(benchmark: Benchmark, case: Case, provider: str) -> str:
    """What `pytest benchmarks` calls it, and --match searches."""
    return "-".join((benchmark.name, case.label.replace(" ", ","), provider))
