"""Reports, plots and README out of records alone."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import itertools
import json
import re

import pytest
from benchmark_cases import RESULTS, sample_results, timed_row

from benchmarks.harness import measure, record
from benchmarks.harness.measure import Case, Work
from benchmarks.report import pictures, plots, readme, report
from fastgpt.cli import main


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
    said = {"what": "a training step", "low": 3, "high": 4, "unit": "ms", "then": "look at its parts"}
    first = {"predictions": [{**said, "measured": value} for value in (None, 3.5, 6.0)]}
    (tmp_path / "a-gpu" / "first.json").write_text(json.dumps(first))
    text = readme.gpu(tmp_path)
    assert "| a training step | 3 to 4 |  | ms |  |" in text
    assert "| a training step | 3 to 4 | 3.5 | ms |  |" in text
    assert "| a training step | 3 to 4 | 6 | ms | more: look at its parts |" in text
    assert "| layer_norm | rows=4 width=8 float32 forward | 4 | 50% (memory) | torch, 0.50x (0.48 to 0.52) |" in text
    assert "| model=gpt2 batch=1 context=8 float32 | 2,000 | 5% |  | nanoGPT, 1.25x (1.25 to 1.25) |" in text
    assert "| model=gpt2 batch=2 context=8 float32 | 4,000 | 5% |  | nanoGPT, 0.75x (0.75 to 0.75) |" in text
    assert "| model=gpt2-xl float32 | FAILED |" in text
    assert "- train_step model=gpt2 batch=2 context=8 float32: nanoGPT, fastgpt is 0.75x" in text


def test_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="README must have <!-- results: table --> once"):
        readme.filled("nothing", RESULTS)


def attributes(svg: str, element: str, kind: str, name: str) -> list[float]:
    return [float(found) for found in re.findall(rf'<{element} class="{kind}"[^>]* {name}="([\d.]+)"', svg)]


def test_bars_are_as_long_as_the_ratios_say():
    size = {"model": "gpt2", "batch": 1, "context": 8}
    case = Case("train_step", size, "", "float32", units=8, unit="tokens")
    rows = [timed_row(case, "fastgpt", [4.0]), timed_row(case, "nanoGPT", [8.0], [4.0])]
    rows += [timed_row(case, "transformers", [2.0], [4.0]), timed_row(case, "fastgpt, compiled", [1.0], [4.0])]
    svg = pictures.peers([{**report.derived(row, [], {"device": ""}), "group": "train"} for row in rows])
    ours, peers = (attributes(svg, "rect", kind, "width") for kind in ("ours", "peer"))
    assert [peer / ours[0] for peer in peers] == pytest.approx([0.5, 2.0])
    assert "fastgpt is 2.00x as fast" in svg
    assert "compiled" not in svg


def test_a_curve_goes_through_its_points():
    log = [{"step": step, "loss": 8.0 - step / 50} for step in range(1, 101)]
    svg = pictures.loss([*log, {"step": 100, "validation_loss": 7.0}])
    (line,) = re.findall(r'<polyline class="peer" points="([^"]*)"', svg)
    points = [tuple(map(float, pair.split(","))) for pair in line.split()]
    assert len(points) == 100
    slopes = {round((b[1] - a[1]) / (b[0] - a[0]), 1) for a, b in itertools.pairwise(points[::11])}
    assert len(slopes) == 1  # a straight line in, a straight line out
    assert points[0][1] < points[-1][1]  # down the page, as the loss falls


@pytest.mark.parametrize(("low", "high"), [(0, 1000), (2.6, 4.48), (0, 7), (0.31, 0.32)])
def test_ticks_hold_what_is_drawn(low, high):
    found = pictures.ticks(low, high)
    assert found[0] <= low < high <= found[-1] + 1e-9
    assert 4 <= len(found) <= 14
    assert len({round(b - a, 9) for a, b in itertools.pairwise(found)}) == 1
