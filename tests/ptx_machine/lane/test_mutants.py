"""The checkers see kernels that lack a synchronisation: every deletion of some kinds, and a good part of the barriers."""

from __future__ import annotations

import pytest
from ptx_machine.lane.mutants import KINDS, SUBJECTS

# Kinds of which no deletion survives (README.md has the counts): a survivor there is a checker that has gone blind.
ALL_SEEN = {
    "attention forward sm80": (),
    "attention forward sm90": ("mbarrier wait",),
    "attention backward sm90": ("mbarrier wait",),
    "GEMM sm80": ("cp.async wait",),
    "GEMM sm90": ("mbarrier wait", "proxy fence"),
    "decode attention sm80": ("bar.sync",),
    "token, matrix sm80": (),
    "token, matrix sm90": (),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.one_of("mutants")) for name in ALL_SEEN])
def test_a_missing_synchronisation_is_seen(name):
    for kind in {"bar.sync", *ALL_SEEN[name]}:
        assert kind in KINDS
        seen = [bool(found) for *_, found in SUBJECTS[name].mutants(kind)]
        assert seen, f"{name} has no {kind}"
        # Where boxes arrive at mbarriers, most barriers stand between what one thread announces and another asks for.
        needed = len(seen) if kind in ALL_SEEN[name] else len(seen) // (3 if name.endswith("sm80") else 6)
        assert sum(seen) >= needed, f"{name}, {kind}: {sum(seen)} of {len(seen)} deletions seen"
