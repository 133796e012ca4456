"""The checkers see kernels that lack a synchronisation: every deletion of some kinds, and as many of the barriers as ever."""

from __future__ import annotations

import pytest
from ptx_machine.lane.mutants import KINDS, SUBJECTS

# How many deleted barriers are seen, the fewer of Triton 3.6's and 3.7's, and kinds of which no deletion survives (README.md has
# the counts): a survivor more is a checker that has gone blind.
SEEN = {
    "attention forward sm80": (9, ()),
    "attention forward sm90": (5, ("mbarrier wait",)),
    "attention backward sm90": (6, ("mbarrier wait",)),
    "GEMM sm80": (18, ("cp.async wait",)),
    "GEMM sm90": (8, ("mbarrier wait", "proxy fence")),
    "decode attention sm80": (15, ()),
    "token, matrix sm80": (6, ()),
    "token, matrix sm90": (6, ()),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.one_of("mutants")) for name in SEEN])
def test_a_missing_synchronisation_is_seen(name):
    barriers, kinds = SEEN[name]
    assert {*kinds} < {*KINDS}
    for kind in ("bar.sync", *kinds):
        seen = [bool(found) for *_, found in SUBJECTS[name].mutants(kind)]
        assert seen, f"{name} has no {kind}"
        needed = barriers if kind == "bar.sync" else len(seen)
        assert sum(seen) >= needed, f"{name}, {kind}: {sum(seen)} of {len(seen)} deletions seen"
