"""The first minutes on a card: what is worth most comes first, and nothing that fails takes the rest with it.

    bash benchmarks/on_gpu.sh first [STEP …] [--minutes 8] [--dry-run]
    python -m benchmarks.first --unpack FOLDER      first.json and records.json of FOLDER -> benchmarks/results/<machine>/

Each step of steps.py is a process of its own with its own limit. One that fails, hangs or loses the device is noted and passed
over; called again, what wasn't begun comes first, then what failed, and what is done is passed over. Records are kept in
out/first/<machine>/, from where a later call on the same machine goes on. While steps run, and whenever one ends, four flat files
are written to $OUT, where that is set: first.txt, the table; first.json, predictions beside measurements and how each step
ended; records.json, every row; first.log, what the steps printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.first.steps import STEPS, Step
from benchmarks.harness.record import RESULTS, ROOT, machine_name, run_record, source_digest
from benchmarks.report import first as report

NOTHING_LEFT = 5  # pytest's status where no test was left to run
DEVICE_LOST = 77  # what test_suite.py leaves with
MOST_MINUTES = 9.0  # a borrowed machine may cut a command at ten
RESERVE = 12.0  # seconds at the end for what is to be written
LOST, UNFINISHED = "lost the device", "out of time"
OUT_OF_TIME = "out of time; "  # what a step prints that begins nothing more, and goes on there when it is called again
PROBE = "import torch; torch.zeros(1, device='cuda').item()"
STATE, RECORDS, TABLE, LOG, PASSED = "first.json", "records.json", "first.txt", "first.log", "passed.txt"


class Run:
    """One call: what earlier ones left in `work`, a copy of all that matters in `shown`, seconds until `deadline`."""

    def __init__(self, steps: Sequence[Step], work: Path, shown: Path | None, minutes: float, dry: bool) -> None:
        self.steps, self.work, self.shown, self.dry = steps, work, shown, dry
        self.deadline = time.monotonic() + 60 * minutes - RESERVE
        work.mkdir(parents=True, exist_ok=True)
        kept = RESULTS / work.name
        if not dry and (kept / STATE).is_file() and not (work / STATE).is_file():  # of another machine of this kind
            for path in (*kept.glob("*.json"), *kept.glob(PASSED)):
                shutil.copy(path, work)
        held = json.loads((work / STATE).read_text(encoding="utf-8")) if (work / STATE).is_file() else {}
        if held and held["sources"] != source_digest():  # what was measured of other sources is kept apart
            earlier = work / "earlier" / held["sources"]
            earlier.mkdir(parents=True, exist_ok=True)
            for path in [path for path in work.iterdir() if path.is_file() and path.name != "floors.json"]:
                path.replace(earlier / path.name)
            held = {}
        self.ended: dict[str, dict[str, Any]] = held.get("steps", {})
        command = " ".join(["bash benchmarks/on_gpu.sh first", *sys.argv[1:]])
        self.runs = [
            *held.get("runs", []),
            run_record(command, datetime.now().astimezone().isoformat(timespec="seconds")),
        ]
        self.device = True

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def go(self) -> None:
        beside = {step.beside: step for step in self.steps}
        companions = {step.name: step for step in self.steps if step.name in beside}
        waiting = [step for step in self.steps if step.name not in companions and not self.done(step)]
        for step in sorted(waiting, key=lambda step: step.name in self.ended):  # what failed before comes last
            if self.device and self.left() >= step.least:
                companion = companions.get(step.beside or "")
                ended = self.execute(step, None if companion is None or self.done(companion) else companion)
                self.ended |= ended
                if any(found["status"] == LOST for found in ended.values()):
                    self.device = self.probe()
                self.write()
        self.write()

    def done(self, step: Step) -> bool:
        return self.ended.get(step.name, {}).get("status") == "ok"

    def probe(self) -> bool:
        """Whether a new process can use the device: after an illegal access it can, after a lost bus it can't."""
        if self.dry:
            return True
        for _ in range(2):
            try:
                if subprocess.run([sys.executable, "-c", PROBE], timeout=30, capture_output=True).returncode == 0:
                    return True
            except subprocess.TimeoutExpired:
                pass
            time.sleep(3)
        return False

    def execute(self, step: Step, companion: Step | None) -> dict[str, dict[str, Any]]:
        """Run a step, and at its side one that needs no GPU; how each ended."""
        began, running, ended = time.monotonic(), {}, {}
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
            "PYTHONUNBUFFERED": "1",
        }
        environment |= {"TRITON_INTERPRET": "1"} if self.dry else {}
        for one in (step, companion):
            if one is not None:
                limit = min(one.limit, self.left())
                log = self.work / f"{one.name}.log"
                words = [sys.executable, *one.command(self.work, self.dry, int(limit))]
                with open(log, "a", encoding="utf-8") as file:
                    file.write(f"=== {one.name}: {' '.join(words[1:])}\n")
                    file.flush()
                    process = subprocess.Popen(
                        words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
                    )
                running[one.name] = process, limit, log
        mirrored = began
        while running:
            time.sleep(0.2)
            now = time.monotonic()
            if now - mirrored > 5:
                self.mirror()
                mirrored = now
            for name, (process, limit, log) in list(running.items()):
                code = process.poll()
                if code is None and now - began <= limit:
                    continue
                del running[name]
                if code is None:
                    kill(process)
                    ended[name] = {"status": "hung", "reason": f"killed after {limit:.0f} s"}
                elif code in (0, NOTHING_LEFT):
                    ended[name] = {"status": UNFINISHED if OUT_OF_TIME in printed(log) else "ok"}
                else:
                    lost = code == DEVICE_LOST
                    ended[name] = {"status": LOST if lost else "failed", "reason": reason(log, code)}
                ended[name]["seconds"] = round(now - began, 1)
        return ended

    def write(self) -> None:
        """State, table and copies anew."""
        measured = report.measured(self.work)
        state = {
            "machine": self.work.name,
            "runs": self.runs,
            "sources": source_digest(),
            "steps": self.ended,
            "predictions": measured,
        }
        replace(self.work / STATE, json.dumps(state, indent=1) + "\n")
        replace(self.work / TABLE, report.text(self.work, state, [(step.name, step.what) for step in self.steps]))
        self.mirror()

    def mirror(self) -> None:
        replace(
            self.work / LOG,
            "".join(path.read_text(encoding="utf-8", errors="replace")[-200_000:] for path in self.logs()),
        )
        if self.shown is None:
            return
        self.shown.mkdir(parents=True, exist_ok=True)
        for name in (STATE, TABLE, LOG):
            if (self.work / name).is_file():
                shutil.copy(self.work / name, self.shown / name)
        replace(self.shown / RECORDS, json.dumps(packed(self.work)))

    def logs(self) -> list[Path]:
        return sorted((p for p in self.work.glob("*.log") if p.name != LOG), key=lambda path: path.stat().st_mtime)


def kill(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started: asked first, so that it can leave its records whole."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(3)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def printed(log: Path) -> str:
    """By a step in its last run."""
    return log.read_text(encoding="utf-8", errors="replace").rpartition(f"=== {log.stem}: ")[2]


def reason(log: Path, code: int) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in printed(log).splitlines() if line.strip()]
    telling = [line for line in lines[-40:] if "rror" in line or line.startswith(("FAILED", "E  "))]
    return f"exit status {code}: {(telling or lines)[-1][:160]}"


def replace(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def packed(work: Path) -> dict[str, Any]:
    """Every record of the folder by its file's stem, and the tests that passed."""
    held: dict[str, Any] = {}
    for path in sorted(work.glob("*.json")):
        if path.name != STATE:
            held[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    passed = work / PASSED
    return held | ({PASSED: passed.read_text(encoding="utf-8").splitlines()} if passed.is_file() else {})


def unpack(folder: Path, target: Path) -> None:
    """first.json and records.json of a call's $OUT -> the files that benchmarks/results/<machine>/ holds."""
    target.mkdir(parents=True, exist_ok=True)
    if (folder / RECORDS).is_file():
        for stem, held in json.loads((folder / RECORDS).read_text(encoding="utf-8")).items():
            text = "\n".join(held) if stem == PASSED else json.dumps(held, indent=1)
            (target / (PASSED if stem == PASSED else f"{stem}.json")).write_text(text + "\n", encoding="utf-8")
    if (folder / STATE).is_file() and folder != target:
        shutil.copy(folder / STATE, target)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bash benchmarks/on_gpu.sh first", description=__doc__.split("\n")[0])
    names = [step.name for step in STEPS]
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"only these: {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=8.0, help=f"in all, at most {MOST_MINUTES:g}")
    parser.add_argument("--dry-run", action="store_true", help="the same steps at tiny sizes, in Triton's interpreter")
    parser.add_argument(
        "--unpack", type=Path, metavar="FOLDER", help="make records for the repository of a call's $OUT"
    )
    parser.add_argument("--out", type=Path, help="where the four files go; $OUT's folder")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.minutes <= MOST_MINUTES:
        parser.error(f"--minutes must be over 0 and at most {MOST_MINUTES:g}, got {arguments.minutes:g}")
    if set(arguments.steps) - set(names):
        parser.error(f"no step is called {min(set(arguments.steps) - set(names))!r}; there are {', '.join(names)}")
    if arguments.unpack:
        state = json.loads((arguments.unpack / STATE).read_text(encoding="utf-8"))
        unpack(arguments.unpack, RESULTS / state["machine"])
        return 0
    work = Path(tempfile.mkdtemp()) / "dry" if arguments.dry_run else ROOT / "out" / "first" / machine_name()
    chosen = [step for step in STEPS if step.name in (arguments.steps or names)]
    run = Run(chosen, work, arguments.out, arguments.minutes, arguments.dry_run)
    run.go()
    print((run.work / TABLE).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
