"""A budget that is passed says by what."""

from __future__ import annotations

from fractions import Fraction

import pytest
from fake_gpu.budgets import Budget
from fake_gpu.trace import PINNED, READ, STAGED, UPLOAD, Event, Trace


def trace_of(*kinds: str) -> Trace:
    return Trace([Event(kind, "a value", "fastgpt/ops.py:7 op") for kind in kinds])


@pytest.mark.parametrize(
    ("budget", "kinds", "units"),
    [
        (Budget(), (), 0),
        (Budget(reads=2), (READ, READ), 0),
        (Budget(uploads=2), (UPLOAD, STAGED), 0),
        (Budget(reads=1, each_reads=Fraction(1, 16)), (READ,) * 4, 33),  # 3 bursts of 16
        (Budget(each_pinned=2), (PINNED,) * 6, 3),
    ],
)
def test_what_is_allowed_passes_and_one_more_does_not(budget, kinds, units):
    budget.check(trace_of(*kinds), units)
    more = kinds[0] if kinds else READ
    with pytest.raises(AssertionError, match=r"x .*a value at fastgpt/ops\.py:7 op"):
        budget.check(trace_of(*kinds, more), units)


def test_captures_are_limited():
    with pytest.raises(AssertionError, match="2 captures, at most 1"):
        Budget(captures=1).check(Trace(captures=2))
