"""`pytest benchmarks`: one test a benchmark, case and provider, timed by pytest-benchmark's pedantic mode.

Each peer's samples alternate with fastgpt's own, so that both see the machine in the same state. A provider that isn't there is
skipped and recorded with the reason; one whose output is wrong, or that fails, is recorded as such and fails the test.
"""

from __future__ import annotations

import pytest

from benchmarks.harness.measure import OURS, Absent, Wrong, clock, measure, measured_row, row
from benchmarks.harness.record import state

DEVICE_LOST = 77  # exit status; on_gpu.sh goes on in a new process


def stop_if_the_device_is_lost(failure: Exception) -> None:
    """After an illegal access every later call of this process would fail too."""
    try:
        clock()
    except RuntimeError:
        pytest.exit(f"the device is lost to this process: {failure}", returncode=DEVICE_LOST)


@pytest.mark.benchmark(timer=clock, disable_gc=True)
def test_provider(measured, case, provider, session, request):
    store = session.store(measured.group)
    if store.has(case.benchmark, case.label, provider, session.keep_failures) and not session.again:
        pytest.skip("recorded already; --again measures it again")
    if session.out_of_time():
        pytest.skip("out of time; the same command goes on where this one stopped")

    def time_rounds(run, setup, rounds):
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = f"{case.benchmark} {case.label}"
        benchmark.pedantic(run, setup=setup, rounds=rounds)
        return list(benchmark.stats.stats.data)

    rounds = min(measured.rounds, 1) if session.dry_run else measured.rounds
    try:
        if provider == OURS:
            ours, candidate = None, session.ours(measured, case)
        else:
            ours, candidate = session.rival(measured, case), measured.providers[provider](case)
        result = measure(candidate, ours, rounds, time_rounds)
    except Absent as reason:
        store.add(row(case, provider, "absent", reason=str(reason)))
        pytest.skip(f"absent: {reason}")
    except Wrong as wrong:
        store.add(row(case, provider, "WRONG", reason=str(wrong)))
        raise
    except Exception as failure:
        store.add(row(case, provider, "FAILED", reason=f"{type(failure).__name__}: {failure}".splitlines()[0][:300]))
        stop_if_the_device_is_lost(failure)
        raise
    store.add({**measured_row(case, provider, candidate, ours, result), "state": state()})
