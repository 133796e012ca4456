"""The first minutes on a card, dry: steps that fail, hang or lose the device don't keep the others from reporting."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import profiling, sweep
from benchmarks.first.__main__ import Run, main, packed, unpack
from benchmarks.first.predictions import PREDICTIONS, Records
from benchmarks.first.steps import STEPS, Step, lane
from benchmarks.report import first
from benchmarks.suite import name_of, selected

ROOT = Path(__file__).parent.parent.parent


def fake(name: str, code: str, limit: int = 60) -> Step:
    return Step(name, f"a step that {name}", limit, lambda out, dry, seconds: ["-c", code])


FAILS = fake("fails", "print('it began'); raise RuntimeError('no such thing')")
HANGS = fake("hangs", "import time; print('waiting', flush=True); time.sleep(600)", limit=2)
LOSES = fake("loses", "import sys; print('an illegal memory access'); sys.exit(77)")


def test_every_step_runs_dry_whatever_some_of_them_do(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # where pytest-benchmark sees a worker, it times nothing
    real = [step._replace(limit=1500) for step in STEPS]  # an interpreter on a busy machine isn't a GPU
    steps = [*real[:2], FAILS, HANGS, *real[2:4], LOSES, *real[4:]]
    run = Run(steps, tmp_path / "work", tmp_path / "out", minutes=60, dry=True)
    run.go()
    shown = {path.name for path in (tmp_path / "out").iterdir()}
    assert shown == {"first.json", "first.txt", "first.log", "records.json"}
    state = json.loads((tmp_path / "out" / "first.json").read_text())
    ended = {name: found["status"] for name, found in state["steps"].items()}
    assert {name: ended.pop(name) for name in ("fails", "hangs", "loses")} == {
        "fails": "failed",
        "hangs": "hung",
        "loses": "lost the device",
    }
    log = (tmp_path / "out" / "first.log").read_text()
    assert ended == {step.name: "ok" for step in STEPS}, log[-3000:]
    assert state["steps"]["fails"]["reason"] == "exit status 1: RuntimeError: no such thing"
    table = (tmp_path / "out" / "first.txt").read_text()
    assert len(table) < 12_000
    assert all(step.name in table for step in steps)
    assert [row["what"] for row in state["predictions"]] == [p.what for p in PREDICTIONS]
    answers = json.loads((tmp_path / "work" / "questions.json").read_text())
    assert set(answers) == {*QUESTIONS, "tf32 error, cut"}
    questions = {row["what"]: row["measured"] for row in state["predictions"]}
    assert questions["host time of mlp, forward and backward"] > 0
    assert set(json.loads((tmp_path / "out" / "records.json").read_text())) >= {
        "floors",
        "kernels",
        "passed.txt",
        "sweep",
    }

    again = Run(steps, tmp_path / "work", tmp_path / "again", minutes=60, dry=True)
    begun = []
    again.execute = lambda step, companion: begun.append(step.name) or {step.name: {"status": "ok", "seconds": 0.0}}
    again.go()
    assert begun == ["fails", "hangs", "loses"]


def steps_begun(run: Run) -> list[str]:
    begun: list[str] = []

    def execute(step, companion):
        begun.append(step.name)
        return {
            step.name: {"status": "lost the device" if step.name == "loses" else "ok", "reason": "", "seconds": 0.0}
        }

    run.execute = execute
    run.go()
    return begun


def test_what_failed_comes_behind_what_was_not_begun(tmp_path):
    one, two = fake("one", ""), fake("two", "")
    run = Run([FAILS, one], tmp_path, None, 5, dry=True)
    run.go()
    assert steps_begun(Run([FAILS, one, two], tmp_path, None, 5, dry=True)) == ["two", "fails"]


def test_a_step_that_ran_out_of_time_goes_on_in_the_next_call(tmp_path):
    half = fake("half", "print('out of time; the same command goes on where this one stopped')")
    Run([half], tmp_path, None, 5, dry=True).go()
    assert json.loads((tmp_path / "first.json").read_text())["steps"]["half"]["status"] == "out of time"
    whole = fake("half", "print('done')")
    Run([whole], tmp_path, None, 5, dry=True).go()
    assert json.loads((tmp_path / "first.json").read_text())["steps"]["half"]["status"] == "ok"


def test_the_lane_has_every_file_of_the_gpu_lane_the_most_telling_first():
    words = lane(ROOT, False, 60)
    files = [Path(word).stem for word in words if word.endswith(".py")]
    assert files[:2] == ["test_attention", "test_linear"]
    assert len(files) == len(set(files)) > 15
    assert {"test_gelu", "test_graphs"} < set(files)


def test_nothing_begins_without_time_or_device(tmp_path):
    late = Run([FAILS], tmp_path / "late", None, 0.3, dry=True)
    assert steps_begun(late) == []
    assert "not begun" in (tmp_path / "late" / "first.txt").read_text()
    gone = Run([LOSES, FAILS], tmp_path / "gone", None, 5, dry=True)
    gone.probe = lambda: False
    assert steps_begun(gone) == ["loses"]


def test_changed_sources_are_measured_anew(tmp_path, monkeypatch):
    one = fake("one", "")
    Run([one], tmp_path, None, 5, dry=True).go()
    (tmp_path / "kernels.json").write_text("{}")
    (tmp_path / "floors.json").write_text('{"runs": [], "rows": []}')
    assert steps_begun(Run([one], tmp_path, None, 5, dry=True)) == []
    monkeypatch.setattr("benchmarks.first.__main__.source_digest", lambda: "others")
    assert steps_begun(Run([one], tmp_path, None, 5, dry=True)) == ["one"]
    assert not (tmp_path / "kernels.json").exists()
    assert [path.name for path in (tmp_path / "earlier").glob("*/kernels.json")] == ["kernels.json"]
    assert (tmp_path / "floors.json").exists()  # the machine's, not ours


def test_more_minutes_than_a_machine_gives_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--minutes", "10"])
    assert "--minutes must be over 0 and at most 9, got 10" in capsys.readouterr().err


def test_records_come_back_as_they_were(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "kernels.json").write_text('{"runs": [], "rows": []}')
    (tmp_path / "work" / "passed.txt").write_text("digest\na\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "records.json").write_text(json.dumps(packed(tmp_path / "work")))
    unpack(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "kernels.json").read_text()) == {"runs": [], "rows": []}
    assert (tmp_path / "back" / "passed.txt").read_text() == "digest\na\n"


QUESTIONS = {f"host us, {op}": 1.0 for op in ("mlp", "layer_norm")} | {
    f"tf32 error, {who}": 1.0 for who in ("torch", "ours")
}


def row(benchmark: str, case: str, provider: str = "fastgpt", **columns) -> dict:
    return {"benchmark": benchmark, "case": case, "provider": provider, "status": "ok", **columns}


def test_predictions_find_what_they_are_about():
    """Of rows as a run on a card would leave them, by hand."""
    rows = [
        row("token", "model=gpt2 context=960 tokens=64 bfloat16", "fastgpt, design plain", ms=12.8, units=64),
        row("token", "model=gpt2 context=960 tokens=64 bfloat16", ms=11.52, units=64),
        row("token", "model=gpt2 context=960 tokens=64 bfloat16", "fastgpt, design dependent") | {"status": "absent"},
        row("token", "model=gpt2-xl context=960 tokens=64 bfloat16", ms=99.0, units=64),
        row("train_step", "model=gpt2 batch=32 context=1024 bfloat16", ms=60.0, rate=546_133.0),
        row("attention", "B=16 H=12 T=1024 D=64 causal=True bfloat16 backward", ms=0.28, flops=64.4e9),
        row("memory", "model=gpt2 batch=32 context=1024 bfloat16", "nanoGPT", peak_MB=28_000.0),
    ]
    sweeps = [
        {"constant": "cross-entropy-chunk", "status": "ok", "case": "a", "ms": ms, "current": ms == 12.0}
        for ms in (12.0, 11.0)
    ]
    records = Records(rows, [], sweeps, {"products": 20.0, "attention, forward": 1.0, "attention, backward": 2.0}, {})
    found = {p.what: p.measured(records) for p in PREDICTIONS if p.measured is not None}
    assert found["a token behind 960, as a graph of plain launches"] == pytest.approx(200)
    assert found["a token behind 960 with dependent launches"] == pytest.approx(180)
    assert found["dependent launches: saved a token"] == pytest.approx(20)
    assert found["a training step"] == 60.0
    assert found["attention backward"] == pytest.approx(230)
    assert found["peak memory, nanoGPT"] == pytest.approx(28.0)
    assert found["chunks of 2 GiB in the loss, beside 512 MiB: times as fast"] == pytest.approx(12 / 11)
    assert (found["products"], found["attention"]) == (20.0, 3.0)
    assert found["a token behind 0, as a graph of plain launches"] is None


def test_every_prediction_is_about_something_that_is_measured():
    """Where all benchmarks have run, no row stays empty but those of gains that one run can't show."""
    columns = {"ms": 1.0, "rate": 1.0, "flops": 1e9, "units": 64, "peak_MB": 1.0, "percent_of_floor": 50.0}
    rows = [row(b.name, case.label, provider, **columns) for b, case, provider in selected([], "gpu", quick=False)]
    sweeps = [
        {"constant": name, "case": case.label, "status": "ok", "ms": 1.0, "current": True}
        for name, constant in sweep.constants().items()
        for case in constant.cases("gpu")
    ]
    floors = [{"size": {"what": name}, "dtype": "bfloat16", "value": 1.0} for name in ("copy", "weights", "matmul")]
    parts = {name: 1.0 for name, _ in profiling.PARTS}
    records = Records(rows, floors, sweeps, parts, QUESTIONS)
    assert [p.what for p in PREDICTIONS if p.measured is not None and p.measured(records) is None] == []
    assert sum(p.measured is None for p in PREDICTIONS) <= 12
    for step in STEPS:
        match = next(
            (word.partition("=")[2] for word in step.command(ROOT, False, 60) if word.startswith("--match=")), None
        )
        found = [
            b.name
            for b, case, provider in selected([], "gpu", quick=False)
            if re.search(match or "", name_of(b, case, provider))
        ]
        assert found, step.name


def test_a_wrong_prediction_says_what_to_do():
    said = {"what": "attention backward", "low": 220, "high": 275, "unit": "TFLOP/s", "then": "sweep"}
    table = first.predictions_table([{**said, "measured": value} for value in (None, 250.0, 100.0)])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [line[2] for line in cells] == ["", "250", "100"]
    assert [line[4] for line in cells] == ["", "", "less: sweep"]


KEYS = """
import os, sys
from pathlib import Path
import torch, triton
from benchmarks.first.compile import compile_ahead, cases
from benchmarks.harness.op import Draw
import fastgpt_kernels
from fastgpt_kernels import _launch, aot

found = compile_ahead("sm90", 1, True)
assert found["kernels"] and not found["failed"], found
cache = Path(os.environ["TRITON_CACHE_DIR"])
before = set(cache.iterdir())
op, case = next(cases(True))
with _launch.record(90) as launches:
    fastgpt_kernels.gelu(*op.inputs({**case.size, "rows": 32}, Draw(torch.bfloat16)))
triton.runtime.driver.set_active(aot._Driver(aot.parse_target("sm90")))
for launch in launches:
    launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.kwargs)
print(len(launches), len(before), len(set(cache.iterdir()) - before))
"""


def test_what_is_compiled_ahead_is_what_the_jit_looks_for(tmp_path):
    """Of tensors with memory, the JIT finds in the cache what was compiled of tensors without."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", KEYS], capture_output=True, text=True, env=kept, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    launched, compiled, new = map(int, done.stdout.split()[-3:])
    assert launched
    assert compiled
    assert new == 0


def test_the_command_is_the_shells(tmp_path):
    command = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), "first", "--dry-run", "--minutes", "0.2"]
    kept = {name: value for name, value in os.environ.items() if name not in ("OUT", "TRITON_INTERPRET")}
    kept |= {"OUT": "out", "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=kept, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^floors +not begun", done.stdout, flags=re.MULTILINE)
    assert (tmp_path / "out" / "first.txt").read_text() == done.stdout.removesuffix("\n")
