"""The checkers see kernels that lack a synchronisation: some of every kind that they have, and most of all."""

from __future__ import annotations

import pytest
from ptx_machine.lane.mutants import KINDS, SUBJECTS

# Kinds whose every deletion is seen: a survivor there is a checker that has gone blind.
ALL_SEEN = {
    ("attention forward sm90", "cp.async wait"),
    ("GEMM sm90", "mbarrier wait"),
    ("GEMM sm90", "proxy fence"),
    ("token, matrix sm90", "bar.sync"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.one_of("mutants")) for name in SUBJECTS])
def test_a_missing_synchronisation_is_seen(name):
    for kind in KINDS:
        found = [bool(seen) for *_, seen in SUBJECTS[name].mutants(kind)]
        if (name, kind) in ALL_SEEN:
            assert found, f"{name} has no {kind}"
            assert all(found), f"{name}, {kind}: {sum(found)} of {len(found)}"
        elif kind == "bar.sync":
            assert sum(found) >= len(found) // 3, f"{name}, {kind}: {sum(found)} of {len(found)}"
