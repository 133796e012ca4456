"""Launch constants beside what was recorded."""

from __future__ import annotations

import itertools
import json

from benchmark_cases import RESULTS, op_case

from benchmarks import sweep
from benchmarks.harness import measure, op
from benchmarks.ops import decode


def test_constants_are_near_the_best_recorded():
    """For each recorded sweep; there is none until a GPU was measured."""
    for path in RESULTS.glob("*/sweep.json"):
        held = json.loads(path.read_text(encoding="utf-8"))
        known = sweep.constants()
        for title, rows in itertools.groupby(held["rows"], key=lambda row: row["case"]):
            timed = {row["provider"]: row["ms"] for row in rows if row["status"] == "ok"}
            run = held["runs"][held["rows"][0]["run"]]
            constant = known[title.split(":")[0]]
            case = next(case for case in constant.cases("gpu") if case.label == title.split(": ")[1])
            now = sweep.label(constant.current(case, run["capability"], run["multiprocessors"]))
            assert timed[now] <= sweep.TOLERANCE * min(timed.values()), f"{path}: {title} has {now}"


def test_a_replaced_constant_reaches_the_kernel_and_goes_back():
    constant = sweep.constants()["decode-split"]
    module, name = constant._place()
    before = getattr(module, name)
    with constant.replaced(128):
        assert getattr(module, name) == 128
        case = op_case(decode.DECODE)
        measure.prove(decode.DECODE.candidate(op.kernel("decode_attention"), case))
    assert getattr(module, name) == before


def test_every_constant_exists_and_is_a_candidate_somewhere():
    for constant in sweep.constants().values():
        for case in constant.cases("gpu"):
            assert constant.candidates
            assert sweep.label(constant.current(case, 90, 132))


def test_the_table_proposes_what_is_faster():
    rows = [
        {"provider": str(n), "status": "ok", "ms": ms, "current": n == 64}
        for n, ms in ((32, 3.0), (64, 2.0), (128, 1.0))
    ]
    rows.append({"provider": "256", "status": "refused", "reason": "spills 8 bytes a thread", "current": False})
    text = sweep.table("decode-split", rows)
    assert text.splitlines()[-1] == "  propose 128: 2.00x faster than now"
    assert "refused" in text
    assert sweep.table("decode-split", [rows[2] | {"current": True}]).endswith("keep what is there")
