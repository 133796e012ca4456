"""What `pytest benchmarks` takes beside pytest-benchmark's own options, and what its tests share."""

from __future__ import annotations

import os
import re
import time
from datetime import datetime
from pathlib import Path

import pytest

from benchmarks.harness import floors, measure
from benchmarks.harness.record import Store, machine_name, run_record
from benchmarks.suite import name_of, selected

# With what is running at that moment, and the report, a run on two cores is over within ten.
CPU_MINUTES = 9.0


def pytest_addoption(parser, pluginmanager):
    group = parser.getgroup("fastgpt benchmarks")
    group.addoption("--only", action="append", default=[], metavar="NAME", help="a benchmark or group; may be repeated")
    group.addoption("--match", default="", metavar="REGEX", help="only what it finds in BENCHMARK-CASE-PROVIDER")
    group.addoption("--out", type=Path, help="folder of the records; out/bench/<machine> by default")
    group.addoption("--quick", action="store_true", help="the first size of each benchmark, and no growth")
    group.addoption("--again", action="store_true", help="measure what is recorded already, too")
    group.addoption(
        "--minutes", type=float, metavar="M", help="start nothing more after so many minutes; 9 on a CPU, else no end"
    )
    group.addoption("--dry-run", action="store_true", help="every code path at tiny sizes, in Triton's interpreter")
    group.addoption("--keep-failures", action="store_true", help="don't try again what failed or was wrong")
    group.addoption("--no-report", action="store_true", help="write records alone")
    group.addoption("--note", default="", help="about the circumstances, kept in the record")
    if not pluginmanager.hasplugin("timeout"):  # an option of pyproject.toml that tests alone need
        parser.addini("timeout", "pytest-timeout's, which isn't installed")


def pytest_configure(config):
    if config.getoption("--dry-run") and os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter  # of the tests

        interpreter.waste_no_time()


def pytest_collection_modifyitems(items):
    for item in items:  # a peer's warning is no failure of it
        item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_generate_tests(metafunc):
    if "provider" in metafunc.fixturenames:
        config = metafunc.config
        scale = measure.scale_of(config.getoption("--dry-run"))
        chosen = selected(config.getoption("--only"), scale, config.getoption("--quick"))
        ids = [name_of(*one) for one in chosen]
        found = [i for i, name in enumerate(ids) if re.search(config.getoption("--match"), name)]
        chosen, ids = [chosen[i] for i in found], [ids[i] for i in found]
        metafunc.parametrize(("measured", "case", "provider"), chosen, ids=ids)


class Session:
    """The stores of this run, and the fastgpt candidate of the case in hand, with which peers are timed in turn."""

    def __init__(self, config: pytest.Config) -> None:
        self.directory = config.getoption("--out") or Path("out/bench") / machine_name()
        self.keep_failures = config.getoption("--keep-failures")
        self.again, self.dry_run = config.getoption("--again"), config.getoption("--dry-run")
        self.scale = measure.scale_of(self.dry_run)
        self._minutes, self._started = config.getoption("--minutes"), time.monotonic()
        if self._minutes is None and self.scale == "cpu":
            self._minutes = CPU_MINUTES
        timestamp = datetime.now().astimezone().isoformat(timespec="seconds")
        command = " ".join(["pytest", *map(str, config.invocation_params.args)])
        self.run = run_record(command, timestamp, note=config.getoption("--note"))
        self._stores: dict[str, Store] = {}
        self._paired: measure.Case | None = None
        self._ours: tuple[measure.Case, measure.Candidate | None] | None = None

    def store(self, group: str) -> Store:
        if group not in self._stores:
            self._stores[group] = Store(self.directory, group)
            self._stores[group].start(self.run)
        return self._stores[group]

    def out_of_time(self) -> bool:
        return self._minutes is not None and time.monotonic() - self._started > 60 * self._minutes

    def ours(self, benchmark: measure.Benchmark, case: measure.Case) -> measure.Candidate | None:
        """fastgpt, prepared once a case, what the case before held being freed; None if preparing it failed before."""
        if self._ours is None or self._ours[0] != case:
            self._ours = case, None
            self._ours = case, benchmark.providers[measure.OURS](case)
        return self._ours[1]

    def rival(self, benchmark: measure.Benchmark, case: measure.Case) -> measure.Candidate | None:
        """What a peer is timed in turn with: nothing where fastgpt itself fails, which its own row says.

        In a dry run, where fastgpt is interpreted, one peer a case is enough.
        """
        if case.alone or (self.dry_run and self._paired == case):
            self._ours = None if case.alone else self._ours
            return None
        self._paired = case
        try:
            return self.ours(benchmark, case)
        except Exception:
            return None


@pytest.fixture(scope="session")
def session(request) -> Session:
    """The session, its floors measured: they come before anything that is compared with them."""
    made = Session(request.config)
    floors.measure_floors(made.store(floors.GROUP), made.scale)
    return made


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--collect-only"):
        return
    from benchmarks.report import report

    directory = config.getoption("--out") or Path("out/bench") / machine_name()
    if directory.is_dir() and any(directory.glob("*.json")):
        terminalreporter.write_line(report.summary(directory))
        if not config.getoption("--no-report"):
            terminalreporter.write_line("\n".join(report.write(directory)))
