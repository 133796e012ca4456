"""What was predicted before any card ran this code, as data: a row each, with how a run fills in what it measured.

Times are models of an H100 (3.0 TB/s, 798 TFLOP/s bf16, 2 us a kernel) for GPT-2 124M. A step is one of training at 32 x 1024
tokens, a token one of batch 1 in bf16. What a step launches is counted (tests/fake_gpu/lane/test_counted.py). Gains are against
commit a9cb315, whose reading they come from: a row of a gain that one run can't show stays empty until two are compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Records(NamedTuple):
    """What a run left: benchmarks' rows with what is derived of them, floors, sweeps, parts of a step, answers to questions."""

    rows: Sequence[Row]
    floors: Sequence[Row]
    sweeps: Sequence[Row]
    parts: Mapping[str, float]
    questions: Mapping[str, float]

    def find(self, benchmark: str, provider: str, case: str, column: str) -> float | None:
        """`column` of the provider's row whose case `case` finds."""
        found = (
            r
            for r in self.rows
            if (r["benchmark"], r["provider"]) == (benchmark, provider) and re.search(case, r["case"])
        )
        return next((row[column] for row in found if row["status"] == "ok" and column in row), None)


Measured = Callable[[Records], "float | None"]


class Prediction(NamedTuple):
    """low to high in `unit`; `measured` finds it among the records, None where no single run shows it."""

    what: str
    low: float
    high: float
    unit: str
    measured: Measured | None = None
    then: str = ""  # what to do where the measurement says otherwise


OURS = "fastgpt"
TRAIN = "batch=32 context=1024"


def token(context: int, design: str = "plain") -> Measured:
    """us a token of the engine in that design; the one in use has fastgpt's own name."""

    def measured(records: Records) -> float | None:
        case, named = rf"model=gpt2 context={context} ", f"fastgpt, design {design}"
        absent = any(
            r["provider"] == named and r["status"] == "absent" and re.search(case, r["case"]) for r in records.rows
        )
        ms, tokens = (records.find("token", OURS if absent else named, case, name) for name in ("ms", "units"))
        return None if ms is None or not tokens else 1e3 * ms / tokens

    return measured


def fewer(slow: Measured, fast: Measured) -> Measured:
    """What the fast one saves."""

    def measured(records: Records) -> float | None:
        a, b = slow(records), fast(records)
        return None if a is None or b is None else a - b

    return measured


def share(us: Measured) -> Measured:
    """Of the 82 us that reading the weights once takes."""

    def measured(records: Records) -> float | None:
        found = us(records)
        return None if found is None else 8200 / found

    return measured


def column(benchmark: str, name: str, case: str = TRAIN, provider: str = OURS, scale: float = 1.0) -> Measured:
    def measured(records: Records) -> float | None:
        value = records.find(benchmark, provider, case, name)
        return None if value is None else scale * value

    return measured


def teraflops(benchmark: str, case: str) -> Measured:
    def measured(records: Records) -> float | None:
        flops, ms = (records.find(benchmark, OURS, case, name) for name in ("flops", "ms"))
        return None if not flops or not ms else flops / ms / 1e9

    return measured


def part(*names: str) -> Measured:
    return lambda records: sum(records.parts[n] for n in names if n in records.parts) if records.parts else None


def question(name: str) -> Measured:
    return lambda records: records.questions.get(name)


def swept(constant: str) -> Measured:
    """How many times as fast the best candidate is as what the code has, at the first case."""

    def measured(records: Records) -> float | None:
        timed = [r for r in records.sweeps if r["constant"] == constant and r["status"] == "ok"]
        first = [r for r in timed if r["case"] == timed[0]["case"]]
        now = next((r["ms"] for r in first if r["current"]), None)
        return None if now is None else now / min(r["ms"] for r in first)

    return measured


def floor(what: str, shown: Callable[[float], float] = lambda value: value, dtype: str = "") -> Measured:
    def measured(records: Records) -> float | None:
        values = [r["value"] for r in records.floors if r["size"]["what"] == what and dtype in ("", r["dtype"])]
        return shown(max(values)) if values else None

    return measured


WEIGHTS_MB = 247.3  # that a token reads
PREDICTIONS = (
    # The machine
    Prediction("copy", 2900, 3100, "GB/s", floor("copy")),
    Prediction("product of 8192, bf16", 770, 800, "TFLOP/s", floor("matmul", dtype="bfloat16")),
    Prediction(
        "a token's floor: reading the weights once",
        82,
        82,
        "us",
        floor("weights", lambda rate: 1e3 * WEIGHTS_MB / rate),
    ),
    # A token
    Prediction(
        "a token behind 0, as a graph of plain launches",
        200,
        270,
        "us",
        token(0),
        "compare its kernels with their floors",
    ),
    Prediction("a token behind 960, as a graph of plain launches", 200, 270, "us", token(960)),
    Prediction(
        "a token behind 960 with dependent launches",
        177,
        177,
        "us",
        token(960, "dependent"),
        "make the faster one the default",
    ),
    Prediction("dependent launches: saved a token", 15, 25, "us", fewer(token(960), token(960, "dependent"))),
    Prediction("all loads before the first wait: saved a token", 50, 65, "us"),
    Prediction("norms' scale and shift, and the residual, loaded ahead: saved a token", 10, 15, "us"),
    Prediction("a pointer instead of three branches around QKV's loads: saved a token", 5, 5, "us"),
    Prediction(
        "one kernel of a token with a graph and dependent launches, over its floor",
        1.55,
        1.55,
        "us",
        lambda records: (found := token(0, "dependent")(records)) and (found - 82) / 61,
    ),
    Prediction(
        "the sampler's filter, top_k=50, share of a token",
        15,
        35,
        "%",
        lambda records: (
            (ms := records.find("sample_tokens", OURS, "^B=1 .*top_k", "ms"))
            and (us := token(0)(records))
            and 1e5 * ms / us
        ),
        "split it over the vocabulary",
    ),
    Prediction("a token behind 0 with dependent launches, of its floor", 45, 60, "%", share(token(0, "dependent"))),
    Prediction("a token behind 0 with weights that stream ahead, of its floor", 60, 85, "%"),
    # A training step
    Prediction("a training step", 49.6, 49.6, "ms", column("train_step", "ms"), "its parts, below, say where"),
    Prediction("a training step, floor of what is launched", 42.9, 42.9, "ms"),
    Prediction("tokens a second at that floor", 764_000, 765_000, "tokens/s", column("train_step", "rate")),
    Prediction(
        "nanoGPT, eager, floor of what is launched", 72.4, 72.4, "ms", column("train_step", "ms", provider="nanoGPT")
    ),
    Prediction("head and loss", 11.7, 11.7, "ms", part("cross-entropy")),
    Prediction("products", 21.0, 21.0, "ms", part("products")),
    Prediction(
        "copies and casts",
        0.6,
        0.6,
        "ms",
        part("copies and casts"),
        "emit autocast's dtype where a plain Linear reads it",
    ),
    Prediction("norms", 5.0, 5.0, "ms", part("norms")),
    Prediction("additions and sums", 1.1, 1.1, "ms", part("elementwise and reductions")),
    Prediction("attention", 2.7, 2.7, "ms", part("attention, forward", "attention, backward")),
    Prediction("cuBLAS for the feed-forward's plain products: saved a step", 2.5, 4.0, "ms"),
    Prediction(
        "residuals added in the feed-forward's last product, beside cuBLAS and a sum: saved a step", 0, 0.7, "ms"
    ),
    Prediction("dq, dk and dv without a copy: saved a step", 2.4, 2.4, "ms"),
    Prediction("norms that emit autocast's dtype: saved a step", 3.3, 3.3, "ms"),
    Prediction("dropout of 0.1, a step", 12, 12, "ms"),
    Prediction("second stage of the norm's gradient by more programs: saved a step", 0.1, 0.1, "ms"),
    Prediction("add_layer_norm's stores in one wave: saved of that op", 5, 10, "%"),
    Prediction(
        "attention backward",
        220,
        275,
        "TFLOP/s",
        teraflops("attention", "T=1024 .*backward"),
        "sweep attention-backward",
    ),
    Prediction(
        "attention forward", 290, 290, "TFLOP/s", teraflops("attention", "T=1024 .*forward"), "sweep attention-forward"
    ),
    Prediction(
        "chunks of 2 GiB in the loss, beside 512 MiB: times as fast",
        1.09,
        1.09,
        "x",
        swept("cross-entropy-chunk"),
        "set it",
    ),
    Prediction(
        "attention backward, best tile beside what the code has", 1.0, 1.25, "x", swept("attention-backward"), "set it"
    ),
    # Memory at the same step, forward and backward
    Prediction("peak memory", 12.1, 12.6, "GB", column("memory", "peak_MB", scale=1e-3)),
    Prediction("peak memory, nanoGPT", 28.3, 28.3, "GB", column("memory", "peak_MB", provider="nanoGPT", scale=1e-3)),
    Prediction(
        "peak memory, the reference path",
        31.6,
        31.6,
        "GB",
        column("memory", "peak_MB", provider="reference", scale=1e-3),
    ),
    Prediction(
        "peak memory, transformers", 46.1, 46.1, "GB", column("memory", "peak_MB", provider="transformers", scale=1e-3)
    ),
    # The host
    Prediction(
        "host time of mlp, forward and backward", 192, 192, "us", question("host us, mlp"), "profile its launches"
    ),
    Prediction("host time of layer_norm, forward and backward", 67, 67, "us", question("host us, layer_norm")),
    # Numbers
    Prediction(
        "error of torch's TF32 product, beside operands rounded to nearest",
        1.0,
        1.0,
        "x",
        question("tf32 error, torch"),
        "about 1: it rounds; then round ours as well, by (bits + 0x1000) & -8192 with NaN kept",
    ),
    Prediction(
        "error of our TF32 product, beside operands rounded to nearest", 1.2, 3.3, "x", question("tf32 error, ours")
    ),
)
