"""A pytest plugin for tests on a machine lent by the minute: pytest -p benchmarks.harness.resumed --passed FILE --until S

Each test that passes is written to FILE at once, under the digest of the sources; a later call with the same sources leaves out
what is there. No test is begun once S seconds have passed.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.harness.record import source_digest


def pytest_addoption(parser):
    group = parser.getgroup("resumed")
    group.addoption("--passed", type=Path, required=True, metavar="FILE", help="tests that have passed, a line each")
    group.addoption("--until", type=float, required=True, metavar="S", help="begin no test after so many seconds")


def pytest_configure(config):
    config.pluginmanager.register(Resumed(config.getoption("--passed"), config.getoption("--until")))


class Resumed:
    def __init__(self, file: Path, until: float) -> None:
        self.file, self.deadline, self.later = file, time.monotonic() + until, 0
        digest = source_digest()
        held = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        if held[:1] != [digest]:
            held = [digest]
            file.write_text(digest + "\n", encoding="utf-8")
        self.passed = set(held[1:])

    def pytest_collection_modifyitems(self, config, items):
        done = [item for item in items if item.nodeid in self.passed]
        items[:] = [item for item in items if item.nodeid not in self.passed]
        config.hook.pytest_deselected(items=done)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        if time.monotonic() > self.deadline:
            self.later += 1
            pytest.skip("out of time; the same command goes on where this one stopped")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed and not hasattr(report, "node"):  # which xdist's worker has written
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(report.nodeid + "\n")

    def pytest_terminal_summary(self, terminalreporter):
        if self.passed:
            terminalreporter.write_line(f"{len(self.passed)} tests passed in an earlier call")
        if self.later:
            terminalreporter.write_line(
                f"{self.later} tests not begun for want of time: the same command goes on there"
            )
