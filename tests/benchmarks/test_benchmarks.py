"""The benchmarks are honest, their formulas are the published ones, every stage runs, and README says what was recorded."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.machinery
import importlib.util
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import profiling, suite, sweep
from benchmarks.harness import floors, growth, measure, op, record, resumed
from benchmarks.harness.measure import Absent, Candidate, Case, Work, Wrong
from benchmarks.models import context, generate, host, memory, providers, train_step
from benchmarks.ops import attention, cross_entropy, decode, gelu, layer_norm, linear
from benchmarks.report import plots, readme, report
from fastgpt import PRESETS
from fastgpt.cli import main

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def op_case(entry: op.Op, mode: str = "forward") -> Case:
    return next(case for case in entry.benchmark.cases("dry") if case.mode == mode)


def measured(entry: op.Op, function, mode: str = "forward") -> measure.Result:
    case = op_case(entry, mode)
    return measure.measure(entry.candidate("peer", function, case), None, 2)


# --- providers that cheat


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_an_honest_provider_is_measured(mode):
    result = measured(layer_norm.LAYER_NORM, lambda x, w, b: F.layer_norm(x, w.shape, w, b), mode)
    assert len(result.samples) == 2
    assert min(result.samples) > 0


def nearly(x, w, b):
    return F.layer_norm(x, w.shape, w, b) * 1.001


def half(x, w, b):
    y = F.layer_norm(x, w.shape, w, b)
    return torch.cat((y[:1], torch.zeros_like(y[1:])))


GARBAGE = {
    "noise": lambda x, w, b: torch.randn_like(x),
    "one part in a thousand": nearly,
    "most rows left out": half,
    "no bias": lambda x, w, b: F.layer_norm(x, w.shape, w),
    "NaN": lambda x, w, b: torch.full_like(x, float("nan")),
    "computed in bfloat16": lambda x, w, b: F.layer_norm(x.bfloat16(), w.shape, w.bfloat16(), b.bfloat16()).float(),
    "another shape": lambda x, w, b: F.layer_norm(x, w.shape, w, b)[:1],
    "two outputs": lambda x, w, b: (F.layer_norm(x, w.shape, w, b), x),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_provider_that_returns_garbage_is_refused(name):
    with pytest.raises(Wrong):
        measured(layer_norm.LAYER_NORM, GARBAGE[name])


def test_a_wrong_gradient_is_refused():
    with pytest.raises(Wrong):
        measured(layer_norm.LAYER_NORM, lambda x, w, b: F.layer_norm(x.detach() + 0 * x, w.shape, w, b), "backward")


def test_a_provider_that_remembers_its_results_is_caught():
    known = {}

    def remember(x, w, b):
        return known.setdefault(x.data_ptr(), F.layer_norm(x, w.shape, w, b))

    with pytest.raises(Wrong):
        measured(layer_norm.LAYER_NORM, remember)


def remembering(known, x, w, b):
    """Computes again only when its input was written to: what a memo under (address, version) would do."""
    key = x.data_ptr(), x._version
    if key not in known:
        known[key] = F.layer_norm(x, w.shape, w, b)
    return known[key]


def test_a_provider_that_recognizes_its_input_is_caught():
    with pytest.raises(Wrong):
        measured(layer_norm.LAYER_NORM, functools.partial(remembering, {}))


def test_outputs_are_overwritten_but_not_incoming_gradients():
    """A peer may hand the incoming gradient on as its own output; NaN written there would spoil the next run."""
    case = op_case(layer_norm.ADD_LAYER_NORM, "backward")
    problem = op.Problem(layer_norm.ADD_LAYER_NORM, case)
    own, shared = torch.ones(3), problem.incoming[0][1]
    problem.poison([(own, shared, torch.ones(1).expand(3))])
    assert own.isnan().all()
    assert not shared.isnan().any()


def test_a_product_in_eight_bits_is_refused_where_sixteen_are_measured():
    def eight(x, weight, bias):
        x, weight = (t.to(torch.float8_e4m3fn).to(t.dtype) for t in (x, weight))
        return F.linear(x, weight, bias)

    case = dataclasses.replace(op_case(linear.PLAIN), size={"M": 64, "K": 256, "N": 64}, dtype="bfloat16")
    measure.prove(linear.PLAIN.candidate("peer", F.linear, case))
    with pytest.raises(Wrong):
        measure.prove(linear.PLAIN.candidate("peer", eight, case))


def test_a_peer_that_writes_over_its_input_gets_a_copy(monkeypatch):
    """As Liger's cross-entropy does, https://github.com/linkedin/Liger-Kernel: the logits are all providers' and must stay."""

    def in_place(logits, targets):
        with torch.no_grad():
            held = logits.detach().clone()
            logits.detach().fill_(math.nan)
        return F.cross_entropy(held.requires_grad_(), targets) + 0 * logits.nan_to_num().sum()

    functional = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_cross_entropy = in_place
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    inputs = cross_entropy.CROSS_ENTROPY.inputs({"N": 3, "V": 65}, op.Draw(torch.float32))
    before = inputs[0].clone()
    peer = cross_entropy.CROSS_ENTROPY.peers["Liger, on a copy of the logits"](None)
    assert peer(*inputs).isfinite()
    assert torch.equal(inputs[0], before)


def test_a_provider_that_stops_working_while_timed_is_caught():
    calls = itertools.count()
    last = []

    def tire(x, w, b):
        if next(calls) > 60:
            return last[0]
        last[:] = [F.layer_norm(x, w.shape, w, b)]
        return last[0]

    case = op_case(layer_norm.LAYER_NORM)
    candidate = layer_norm.LAYER_NORM.candidate("peer", tire, case)
    with pytest.raises(Wrong):
        measure.measure(candidate, None, 40)


def tiny_generation(generate_ids) -> Candidate:
    case = generate.BENCHMARKS[0].cases("dry")[0]
    model = providers.spread_model("dry", torch.float32)
    return generate.candidate(generate_ids(model), model, case)


def test_generation_counts_ids_and_calls_generate_once_a_sample():
    calls = []

    def counted(model):
        def generate_ids(idx, n):
            calls.append(idx)
            return model.generate(idx, n)

        return generate_ids

    candidate = tiny_generation(counted)
    measure.prove(candidate)
    before = len(calls)
    result = measure.measure(candidate, None, 3)
    assert len(calls) - before == 2 + 3 + 1  # proof, samples, proof
    assert len(result.samples) == 3
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(calls))  # a new prompt each
    assert candidate.notes["units"] == 2 * 3


CHEATS = {
    "one token too few": lambda model: lambda idx, n: model.generate(idx, n - 1),
    "the last token again and again": lambda model: lambda idx, n: torch.cat((idx, *[idx[:, -1:]] * n), dim=1),
    "sampled, not greedy": lambda model: lambda idx, n: model.generate(idx, n, temperature=3.0),
    "another prompt": lambda model: lambda idx, n: model.generate(idx.flip(0), n),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_generation_that_skips_work_is_caught(name):
    with pytest.raises(Wrong):
        measure.measure(tiny_generation(CHEATS[name]), None, 1)


def training_case() -> Case:
    return train_step.BENCHMARKS[0].cases("dry")[0]


def test_a_training_step_without_an_update_is_caught():
    case = training_case()
    model = train_step.fresh(case)
    inputs, targets = train_step.data(case)
    with pytest.raises(Wrong, match="step 2 differs"):
        measure.measure(train_step.candidate(lambda: model.loss(inputs, targets).detach(), case), None, 1)


def test_a_training_step_of_part_of_the_batch_is_caught():
    case = training_case()
    model = train_step.fresh(case)
    step = train_step.step_of(model, lambda idx, targets: model.loss(idx[:, :2], targets[:, :2]), case)
    with pytest.raises(Wrong, match="step 1 differs"):
        measure.measure(train_step.candidate(step, case), None, 1)


@pytest.mark.parametrize("name", ["nanoGPT", "transformers", "llms_from_scratch GPTModelFast"])
def test_peers_train_like_the_reference(name):
    case = training_case()
    measure.measure(train_step.BENCHMARKS[0].providers[name](case), None, 1)


# --- the clock


def test_a_sleep_of_known_length_is_measured_within_5_percent():
    """The shortest of several: a loaded machine wakes a sleeper late. And every sample is what the sleeper itself saw."""
    slept = []

    def sleep():
        started = time.perf_counter()
        time.sleep(0.2)
        slept.append(time.perf_counter() - started)

    samples = measure.measure(Candidate(sleep, lambda out: None), None, 5).samples
    assert min(samples) == pytest.approx(0.2, rel=0.05)
    assert statistics.median(samples) == pytest.approx(statistics.median(slept[2:7]), rel=0.05)  # behind two proofs


def test_percentiles_lie_between_samples():
    assert measure.timing([50.0, 10.0, 20.0, 40.0, 30.0], calls=10) == pytest.approx((3.0, 1.8, 4.2, 5))
    assert measure.timing([2.0]) == (2.0, 2.0, 2.0, 1)


def test_a_ratio_is_of_equal_work():
    case = Case("x", {}, "", "")
    slow, ours = (Candidate(lambda: None, lambda out: None, calls=c, notes={"units": u}) for c, u in ((2, 4), (1, 16)))
    row = measure.measured_row(case, "peer", slow, ours, measure.Result([8.0, 8.0, 8.0], [4.0, 4.0, 4.0]))
    assert row["ms"] == 4000.0
    assert row["fastgpt_is"] == pytest.approx((8 / 8) / (4 / 16))
    assert row["samples_ms"] == [4000.0] * 3
    assert row["fastgpt_ms"] == [4000.0] * 3


def test_a_graph_is_replayed_and_counted(monkeypatch):
    """What a GPU would do, with stand-ins for capture and replay."""
    replays, captured = [], []

    def capture(run, device, *, warmups, stream):
        assert (device, warmups, stream) == ("its device", 0, place)
        captured.append(0)

        def replay():
            replays.append(1)
            time.sleep(1e-3)

        return replay, run()

    def call():
        captured[-1] += 1
        return captured[-1]

    place = types.SimpleNamespace(device="its device")
    monkeypatch.setattr(measure, "capture", capture)
    run, calls = measure.looped([call, call], place)
    assert captured[0] == 2
    assert calls == captured[-1] == 2 * -(-measure.SAMPLE_SECONDS // 1e-3) or calls == captured[-1]
    before = len(replays)
    assert run() == [calls - 1, calls]
    assert len(replays) == before + 1


# --- formulas, beside published figures


def test_training_flops_are_llm_c_s():
    assert train_step.flops_per_token(PRESETS["gpt2"], 1024) == 6 * 124_439_808 + 6 * 12 * 768 * 1024
    untied = PRESETS["gpt2"].replace(tie_weights=False, vocab_multiple=64)
    assert train_step.flops_per_token(untied, 1024) == train_step.flops_per_token(PRESETS["gpt2"], 1024)


@pytest.mark.parametrize(
    ("work", "gflop", "megabytes"),
    [  # GPT-2 124M at 16 x 1024 tokens in 16 bits
        (attention.ATTENTION.work["forward"]({"B": 16, "H": 12, "T": 1024, "D": 64}, 2), 25.8, 101),
        (attention.ATTENTION.work["backward"]({"B": 16, "H": 12, "T": 1024, "D": 64}, 2), 64.4, 201),
        (linear.PLAIN.work["forward"]({"M": 16384, "K": 768, "N": 2304}, 2), 58.0, 104),
        (layer_norm.LAYER_NORM.work["forward"]({"rows": 16384, "width": 768}, 2), 0.1, 50),
        (layer_norm.ADD_LAYER_NORM.work["backward"]({"rows": 16384, "width": 768}, 2), 0.1, 101),
        (gelu.GELU.work["backward"]({"rows": 16384, "width": 3072}, 2), 0.75, 302),
        (cross_entropy.CROSS_ENTROPY.work["both"]({"N": 16384, "V": 50304}, 2), 8.2, 3297),
        (decode.DECODE.work["forward"]({"B": 1, "H": 12, "S": 1024, "D": 64}, 2), 0.0031, 3.15),
    ],
)
def test_work_of_an_op(work, gflop, megabytes):
    assert work.flops / 1e9 == pytest.approx(gflop, rel=0.03)
    assert (work.read + work.written) / 1e6 == pytest.approx(megabytes, rel=0.02)


def test_bytes_of_a_token():
    assert generate.weight_bytes(PRESETS["gpt2"], 2) / 1e6 == pytest.approx(247.3, abs=0.1)
    assert generate.weight_bytes(PRESETS["gpt2"].replace(tie_weights=False), 2) / 1e6 == pytest.approx(247.3, abs=0.1)
    one = generate.generation_work(PRESETS["gpt2"], 1, 1000, 2, 2)
    none = generate.generation_work(PRESETS["gpt2"], 1, 1000, 1, 2)
    assert one.read - none.read == pytest.approx(247.3e6 + 1001 * 36_864, rel=1e-3)


def test_flops_of_a_generation():
    """Beside torch's counter of a forward, which counts attention whole and the head at each position."""
    from torch.utils.flop_counter import FlopCounterMode

    shape, T = PRESETS["gpt2"].replace(n_layers=2), 64
    with torch.device("meta"):
        model = providers.GPTModel(shape)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, T, dtype=torch.int64, device="meta"))
    head, whole = 2 * shape.padded_vocab_size * 768, 4 * 2 * 768 * T * T
    counted = counter.get_total_flops() - head * (T - 1)
    causal = counted - whole + whole * (T + 1) / (2 * T)
    assert generate.generation_work(shape, 1, T, 1, 2).flops == pytest.approx(causal, rel=1e-6)
    assert generate.generation_work(shape, 3, T - 4, 5, 2).flops == pytest.approx(3 * (causal + 4 * head), rel=1e-6)


def test_merges_rebuild_the_tokenizer():
    candidates = {name: host.TOKENIZERS[name]()[0] for name in host.TOKENIZERS}
    text = host.text(3000) + "naïve 🙂\n"
    ids = {name: list(encode(text)) for name, encode in candidates.items()}
    assert ids["tokenizers"] == ids["tiktoken"] == ids["fastgpt"]


# --- records and reports


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


def test_a_report_from_records_alone(tmp_path, capsys):
    sample_results(tmp_path)
    assert main(["bench", "--report", "--out", str(tmp_path)]) == 0
    folder = tmp_path / "report"
    text = (folder / "report.md").read_text()
    # 2 GB at 1000 GB/s are 2 ms: half of fastgpt's time over all of its samples, all of torch's
    assert "| fastgpt | 4 | 4 to 5.2 | 500 GB/s | 50% (memory) |  |  |  |" in text
    assert "| torch | 2 | 1.94 to 2.06 | 1,000 GB/s | 100% (memory) | 500 GB/s | 0.50x (0.48 to 0.52) |  |" in text
    assert "- absent, not installed: Liger; quack" in text
    assert "width^1.50 ± 0.00" in text
    ahead = text.split("## Where a peer is ahead")[1].split("##")[0].strip()
    assert ahead == "- layer_norm rows=4 width=8 float32 forward: torch, fastgpt is 0.50x (0.48 to 0.52)"
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["percent_of_floor"] for row in rows[:2]] == ["50.0", "100.0"]
    assert [float(row["fastgpt_rate"]) for row in rows[1:3]] == [500.0, 500.0]
    assert len(json.loads((folder / "results.json").read_text())["rows"]) == len(rows) == 8


@pytest.mark.skipif(not plots.possible(), reason="matplotlib isn't installed")
def test_a_report_shows_its_plots(tmp_path):
    sample_results(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "stale.png").touch()
    report.write(tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    names = {"peers-kernels.png", "growth-kernels.png", "roofline.png"}
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == names
    for name in names:
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text


def test_a_report_without_matplotlib_says_so(tmp_path, monkeypatch):
    sample_results(tmp_path)
    report.write(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    assert report.write(tmp_path)[0] == "no plots: matplotlib isn't installed"
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.md", "results.csv", "results.json"]
    assert ".png" not in (tmp_path / "report" / "report.md").read_text()


def test_a_summary_is_a_line_a_case(tmp_path):
    sample_results(tmp_path)
    first, second = report.summary(tmp_path, "kernels").splitlines()
    assert first.split(maxsplit=5)[5] == "4  500 GB/s  50% (memory)  torch: fastgpt is 0.50x (0.48 to 0.52)"
    assert second.endswith("forward: 4 ms at 8 to 90.5 ms at 64, width^1.50 ± 0.00")


def test_samples_of_another_run_are_not_pooled(tmp_path):
    sample_results(tmp_path)
    store = record.Store(tmp_path, "kernels")
    store.start({**store.runs[0], "command": "another"})
    store.add(sample_rows()[0])
    rows = report.load(tmp_path)[2]
    assert [row["ms"] for row in rows if row["provider"] == "fastgpt" and not row["grows"]] == [6.0]


def test_a_range_that_contradicts_its_pairs_is_not_shown():
    """Medians of pairs without percentiles: fastgpt was slower when it was alone."""
    mine = {"rate": 2.0, "ms": 500.0, "p20": 490.0, "p80": 510.0}
    for pairs, shown in ((1.0, "1.00x (0.96 to 1.04)"), (0.9, "0.90x")):
        row = {"rate": 2.0, "ms": 500.0, "p20": 490.0, "p80": 510.0, "fastgpt_is": pairs}
        report.compare(row, mine)
        assert report.ratio(row) == shown
        assert not report.behind([row])


def test_an_exponent_has_its_error():
    points = [growth.Point(x, y, y, y) for x, y in ((1.0, 1.0), (10.0, 20.0), (100.0, 100.0))]
    exponent, error = growth.fit(points)
    xs, ys = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 20.0, 100.0]).double().log10()
    design = torch.stack((torch.ones(3).double(), xs), dim=1)
    found = torch.linalg.lstsq(design, ys[:, None])
    left = (ys[:, None] - design @ found.solution).square().sum()
    assert exponent == pytest.approx(found.solution[1].item())
    assert error == pytest.approx((left * torch.linalg.inv(design.T @ design)[1, 1]).sqrt().item())


@pytest.mark.skipif(not plots.possible(), reason="matplotlib isn't installed")
def test_plots_hold_many_peers_of_very_different_speed(tmp_path):
    """A GPU's panels: fourteen providers, ratios from 0.2 to 40, ranges that leave the axes."""
    case = Case("attention", {"B": 1, "T": 8}, "forward", "bfloat16", Work(1e9, 1e6, 1e6))
    rows = [timed_row(case, "fastgpt", [1.0])]
    rows += [
        timed_row(case, f"peer {i}", [0.2 * 1.5**i, 0.3 * 1.5**i, 9.0 * 1.5**i], [1.0, 1.0, 1.0]) for i in range(13)
    ]
    assert plots.bars([{**row, "group": "kernels"} for row in rows], tmp_path / "bars.png") is not None
    assert plots._apart([4, 8, 1000, 1024, 1100]) == [4, 8, 1000]


def test_records_survive_and_are_gone_on_with(tmp_path):
    sample_results(tmp_path)
    store = record.Store(tmp_path, "kernels")
    run = {"command": "another"}
    store.start(run)
    case = "rows=4 width=8 float32 forward"
    assert store.has("layer_norm", case, "torch")
    assert not store.has("layer_norm", case, "another")
    store.add({**sample_rows()[0], "status": "FAILED", "reason": "died"})
    again = record.Store(tmp_path, "kernels")
    assert not again.has("layer_norm", case, "fastgpt")  # a failure is tried again
    assert [again.runs[row["run"]]["command"] for row in again.rows if row["provider"] == "fastgpt"][-1] == "another"
    assert len(again.rows) == len(sample_rows())
    assert len(again.runs) == 2


def test_a_record_says_what_it_was_measured_on():
    run = record.run_record("a command", "2026-01-01T00:00:00+00:00")
    assert run["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert run["timestamp"] == "2026-01-01T00:00:00+00:00"
    assert run["cpu"]
    assert len(run["sources"]) == 12
    if not torch.cuda.is_available():
        assert record.state()["load_average"] >= 0
        assert all(clock > 0 for clock in record.state()["cpu_MHz"])


def test_readme_says_what_was_recorded():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.filled(text, RESULTS) == text, "python -m benchmarks.report --readme fills the tables"


def test_readme_s_gpu_section(tmp_path):
    """Whatever a GPU's records hold: kernels and training with the best peer that isn't fastgpt, a failure as one."""
    sample_results(tmp_path / "a-gpu")
    store = record.Store(tmp_path / "a-gpu", "train")
    store.start(record.run_record("a command", "2026-01-01T00:00:00+00:00"))
    for batch, rival in ((1, 5.0), (2, 3.0)):
        size = {"model": "gpt2", "batch": batch, "context": 8}
        case = Case("train_step", size, "", "float32", Work(1e9, 1e6, 1e6), 8 * batch, "tokens")
        store.add(timed_row(case, "fastgpt", [4.0]))
        store.add(timed_row(case, "fastgpt, compiled", [1.0], [4.0]))
        store.add(timed_row(case, "nanoGPT", [rival], [4.0]))
    store.add(
        measure.row(dataclasses.replace(case, size={"model": "gpt2-xl"}), "fastgpt", "FAILED", reason="out of memory")
    )
    text = readme.gpu(tmp_path)
    assert "| layer_norm | rows=4 width=8 float32 forward | 4 | 50% (memory) | torch, 0.50x (0.48 to 0.52) |" in text
    assert "| model=gpt2 batch=1 context=8 float32 | 2,000 | 5% |  | nanoGPT, 1.25x (1.25 to 1.25) |" in text
    assert "| model=gpt2 batch=2 context=8 float32 | 4,000 | 5% |  | nanoGPT, 0.75x (0.75 to 0.75) |" in text
    assert "| model=gpt2-xl float32 | FAILED |" in text
    assert "- train_step model=gpt2 batch=2 context=8 float32: nanoGPT, fastgpt is 0.75x" in text


def test_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="README must have <!-- results: headline --> once"):
        readme.filled("nothing", RESULTS)


def test_recorded_rows_were_right():
    """Whatever is committed was measured: right, not faster than its floor, on a machine that is named."""
    for directory in RESULTS.iterdir():
        runs, _, rows = report.load(directory)
        assert all(run["device"] and run["timestamp"] and run["command"] for run in runs)
        assert all(row["status"] in ("ok", "absent") for row in rows if row["provider"] == measure.OURS)
        fast = [r for r in rows if r.get("percent_of_floor", 0) > 130 and "buffers" in r and r["read"] > 1e8]
        assert not fast, f"{fast[:1]} is faster than reading its own bytes: not believed"


def test_constants_are_near_the_best_recorded():
    """For each recorded sweep; there is none until a GPU was measured."""
    for path in RESULTS.glob("*/sweep.json"):
        held = json.loads(path.read_text(encoding="utf-8"))
        known = sweep.constants()
        for title, rows in itertools.groupby(held["rows"], key=lambda row: row["case"]):
            timed = {row["provider"]: row["ms"] for row in rows if row["status"] == "ok"}
            run = held["runs"][held["rows"][0]["run"]]
            constant = known[title.split(":")[0]]
            case = next(case for case in constant.cases("gpu") if case.label == title.split(": ")[1])
            now = sweep.label(constant.current(case, run["capability"], run["multiprocessors"]))
            assert timed[now] <= sweep.TOLERANCE * min(timed.values()), f"{path}: {title} has {now}"


# --- sweeps


def test_a_replaced_constant_reaches_the_kernel_and_goes_back():
    constant = sweep.constants()["decode-split"]
    module, name = constant._place()
    before = getattr(module, name)
    with constant.replaced(128):
        assert getattr(module, name) == 128
        case = op_case(decode.DECODE)
        measure.prove(decode.DECODE.candidate("fastgpt", op.kernel("decode_attention"), case))
    assert getattr(module, name) == before


def test_every_constant_exists_and_is_a_candidate_somewhere():
    for constant in sweep.constants().values():
        for case in constant.cases("gpu"):
            assert constant.candidates
            assert sweep.label(constant.current(case, 90, 132))


def test_the_table_proposes_what_is_faster():
    rows = [
        {"provider": str(n), "status": "ok", "ms": ms, "current": n == 64}
        for n, ms in ((32, 3.0), (64, 2.0), (128, 1.0))
    ]
    rows.append({"provider": "256", "status": "refused", "reason": "spills 8 bytes a thread", "current": False})
    text = sweep.table("decode-split", rows)
    assert text.splitlines()[-1] == "  propose 128: 2.00x faster than now"
    assert "refused" in text
    assert sweep.table("decode-split", [rows[2] | {"current": True}]).endswith("keep what is there")


def subprocess_environment(**more: str) -> dict[str, str]:
    # Where pytest-benchmark sees a worker of pytest-xdist, it times nothing.
    dropped = ("TRITON_INTERPRET", "OUT", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), "OMP_NUM_THREADS": "1", **more}


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.harness import floor_kernels as k
from benchmarks import sweep

target = GPUTarget("cuda", 90, 32)
pointers = {"counter_ptr": "*i32", "programs": "i32", "turns": "i32", "ASSEMBLY": "constexpr"}
for assembly in (False, True):
    options = {"num_warps": 8, "launch_cooperative_grid": True}
    triton.compile(ASTSource(k._barriers_kernel, pointers, {"ASSEMBLY": assembly}), target=target, options=options)
    ring = {"x_ptr": "*i32", "y_ptr": "*i32", **pointers, "BLOCK": "constexpr"}
    triton.compile(ASTSource(k._ring_kernel, ring, {"ASSEMBLY": assembly, "BLOCK": 256}), target=target, options=options)
    tiny = {"x_ptr": "*fp32", "DEPENDENT": "constexpr", "BLOCK": "constexpr"}
    done = triton.compile(
        ASTSource(k._tiny_kernel, tiny, {"DEPENDENT": assembly, "BLOCK": 256}), target=target, options={"launch_pdl": assembly}
    )
    assert ("griddepcontrol.wait" in done.asm["ptx"]) == assembly
read = {"x_ptr": "*bf16", "out_ptr": "*fp32", "N": "i32", "programs": "i32", "BLOCK": "constexpr"}
done = triton.compile(ASTSource(k._read_kernel, read, {"BLOCK": 8192}), target=target, options={"num_warps": 8})
constant = sweep.constants()["softmax-wide-unroll"]
print(sweep.limits(constant, constant.cases("gpu")[0], 90))
"""


def test_what_only_a_gpu_runs_compiles_for_one():
    command = [sys.executable, "-c", textwrap.dedent(COMPILE)]
    done = subprocess.run(command, capture_output=True, text=True, env=subprocess_environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = re.sub(r"\d+", "N", done.stdout.splitlines()[-1])  # how many is the compiler's affair
    assert found == "[[], [], ['_softmax_wide_fwd_kernel spills N bytes a thread']]"


# --- stages and the command


STAGES = ("floors", "tests", "kernels", "sweep", "train", "decode", "profile")


@pytest.fixture(scope="module")
def stage_results(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("out")


def run_stage(stage: str, results: Path) -> str:
    """With pytest and pytest-benchmark alone, as on a bare machine, and the records' folder given from where one is."""
    command = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), stage, "--dry-run"]
    bare = "-p no:timeout -p no:xdist -p no:hypothesispytest"
    environment = subprocess_environment(OUT=results.name, PYTHON=sys.executable, PYTEST_ADDOPTS=bare)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=550, cwd=results.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_dry(stage, stage_results):
    assert run_stage(stage, stage_results).strip()
    held = stage_results / f"{stage}.json"
    if stage != "tests":
        rows = json.loads(held.read_text())["rows"]
        assert {row["status"] for row in rows} <= {"ok", "absent"}, [row for row in rows if row["status"] != "ok"][:3]
        assert any(row["status"] == "ok" for row in rows)
    if stage == "kernels":
        ours = {row["benchmark"] for row in rows if row["provider"] == "fastgpt" and row["status"] == "ok"}
        assert ours == {b.name for b in suite.BENCHMARKS if b.group == "kernels"}


def test_tests_go_on_where_they_stopped(tmp_path, monkeypatch):
    """What passed is left out by a later call with the same sources; what failed, or wasn't begun, is not."""

    def left(names):
        items, dropped = [types.SimpleNamespace(nodeid=name) for name in names], []
        hook = types.SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items))
        plugin = resumed.Resumed(tmp_path / "passed.txt", until=100)
        plugin.pytest_collection_modifyitems(types.SimpleNamespace(hook=hook), items)
        assert len(items) + len(dropped) == len(names)
        return plugin, [item.nodeid for item in items]

    monkeypatch.setattr(resumed, "source_digest", lambda: "these")
    plugin, names = left(["a", "b", "c"])
    assert names == ["a", "b", "c"]
    for name, when, passed in (("a", "setup", True), ("b", "call", True), ("c", "call", False)):
        plugin.pytest_runtest_logreport(types.SimpleNamespace(nodeid=name, when=when, passed=passed))
    assert left(["a", "b", "c"])[1] == ["a", "c"]
    monkeypatch.setattr(resumed, "source_digest", lambda: "others")
    assert left(["a", "b", "c"])[1] == ["a", "b", "c"]
    late = resumed.Resumed(tmp_path / "passed.txt", until=-1)
    with pytest.raises(pytest.skip.Exception, match="out of time"):
        late.pytest_runtest_setup(None)


def test_an_unknown_stage_or_option_is_refused():
    for arguments, message in ((["fly"], "unknown stage fly"), (["floors", "--fast"], "unknown option --fast")):
        command = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, env=subprocess_environment(PYTHON=sys.executable)
        )
        assert done.returncode == 2
        assert message in done.stderr


def test_ncu_is_told_to_leave_the_clocks_alone(tmp_path, monkeypatch):
    fake = tmp_path / "ncu"
    fake.write_text('#!/bin/sh\necho "ncu $*"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    text = profiling.look("gelu", op_case(gelu.GELU).label, dry_run=True)
    assert "--clock-control none" in text
    assert "--one gelu rows=5 width=48 float32 forward --dry-run" in text


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("_attention_bwd_kernel", "attention, backward"),
        ("flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention, forward"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_NNT", "products"),
        ("_gemm_kernel", "products"),
        ("void at::native::vectorized_layer_norm_kernel", "norms"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("triton_poi_fused_gelu_3", "activation"),
        ("_cross_entropy_kernel", "cross-entropy"),
        ("Memcpy DtoD", "copies and casts"),
    ],
)
def test_kernels_belong_to_parts(name, part):
    assert profiling.part_of(name) == part


def test_the_command_names_what_there_is(capfd):
    assert main(["bench", "attentoin"]) != 0
    printed = capfd.readouterr()
    assert "no benchmark is called 'attentoin'" in printed.out + printed.err
    assert main(["bench", "gelu", "--report"]) == 2
    assert "--report measures nothing" in capfd.readouterr().err


def test_absent_peers_are_listed_never_dropped():
    for benchmark in suite.BENCHMARKS:
        assert next(iter(benchmark.providers)) == measure.OURS
    case = op_case(layer_norm.LAYER_NORM)
    with pytest.raises(Absent, match="not installed"):
        layer_norm.LAYER_NORM.benchmark.providers["Liger"](case)
    expected = {
        "Liger",
        "quack",
        "FlexAttention",
        "flash-attn 2",
        "SDPA flash",
        "SDPA cuDNN",
        "SDPA math",
        "torch.compile",
    }
    expected |= {
        "F.linear_cross_entropy",
        "cut-cross-entropy",
        "torch.compile, max-autotune",
        "transformers",
        "nanoGPT",
    }
    assert expected <= {name for benchmark in suite.BENCHMARKS for name in benchmark.providers}


def test_the_largest_batch_is_the_first_that_fits():
    (case,) = memory.largest_cases("dry")
    model, tried = train_step.fresh(case), []

    def loss(idx, targets):
        tried.append(len(idx))
        if len(idx) > 1:
            raise torch.cuda.OutOfMemoryError("no room for two")
        return model.loss(idx, targets)

    found = memory.steps_at_largest(model, loss, case)
    assert (found["largest_batch"], found["units"], tried[:3]) == (1, 8, [2, 1, 1])
    at = dataclasses.replace(case, size={**case.size, "batch": 1})
    assert found["losses"][0] == train_step.reference_losses(at)[0]
    assert found["losses"][1] == pytest.approx(train_step.reference_losses(at)[2], rel=1e-6)  # the second isn't timed
    assert found["flops"] == 8 * train_step.flops_per_token(model.config, 8)

    def no_room(idx, targets):
        raise torch.cuda.OutOfMemoryError("no room for one")

    with pytest.raises(Absent, match="not even a batch of 1 fits"):
        memory.steps_at_largest(model, no_room, case)


def test_one_more_token_is_checked():
    case = context.BENCHMARKS[0].cases("dry")[0]
    wrong = context.prepare(lambda model, ids: lambda last: (last + 1) % model.config.vocab_size, case)
    with pytest.raises(Wrong):
        measure.measure(wrong, None, 1)
