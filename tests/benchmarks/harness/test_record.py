"""Records survive, and say what they were measured on."""

from __future__ import annotations

import pytest
import torch
from benchmark_cases import RESULTS, sample_results, sample_rows

from benchmarks.harness import growth, measure, record
from benchmarks.report import report


def test_samples_of_another_run_are_not_pooled(tmp_path):
    sample_results(tmp_path)
    store = record.Store(tmp_path, "kernels")
    store.start({**store.runs[0], "command": "another"})
    store.add(sample_rows()[0])
    rows = report.load(tmp_path)[2]
    assert [row["ms"] for row in rows if row["provider"] == "fastgpt" and not row["grows"]] == [6.0]


def test_floors_are_of_the_same_machine(tmp_path):
    sample_results(tmp_path)
    before = [row for row in report.load(tmp_path)[2] if "floor_ms" in row]
    store = record.Store(tmp_path, "kernels")
    store.start({**store.runs[0], "device": "another"})
    store.add(sample_rows()[0])
    after = [row for row in report.load(tmp_path)[2] if "floor_ms" in row]
    assert len(after) == len(before) - 1


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("AMD EPYC 9B14 96-Core Processor", "cpu-amd-epyc"),
        ("Intel(R) Xeon(R) Processor @ 2.80GHz", "cpu-intel-xeon"),
        ("x86_64", "cpu"),
    ],
)
def test_processors_have_folders_of_their_own(name, folder, monkeypatch):
    monkeypatch.setattr(record, "cpu_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert record.machine_name() == folder
    assert report.is_cpu(RESULTS / folder)


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
    run = record.run_record(f"pytest {RESULTS.parent}", "2026-01-01T00:00:00+00:00")
    assert run["command"] == "pytest benchmarks"
    assert run["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert run["timestamp"] == "2026-01-01T00:00:00+00:00"
    assert run["cpu"]
    assert len(run["sources"]) == 12
    if not torch.cuda.is_available():
        assert record.state()["load_average"] >= 0
        assert all(clock > 0 for clock in record.state()["cpu_MHz"])


def test_recorded_rows_were_right():
    """Whatever is committed was measured: right, not faster than its floor, on a machine that is named."""
    for directory in RESULTS.iterdir():
        runs, _, rows = report.load(directory)
        assert all(run["device"] and run["timestamp"] and run["command"] for run in runs)
        assert all(row["status"] in ("ok", "absent") for row in rows if row["provider"] == measure.OURS)
        fast = [r for r in rows if r.get("percent_of_floor", 0) > 130 and "buffers" in r and r["read"] > 1e8]
        assert not fast, f"{fast[:1]} is faster than reading its own bytes: not believed"
