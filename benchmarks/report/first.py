"""The first minutes on a card as a table: how each step ended, and predictions beside what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.first.predictions import PREDICTIONS, Records
from benchmarks.harness.floors import table as floors_table
from benchmarks.report.report import load, machine, markdown, number, summary

# The end of what a borrowed machine says is all that comes back.
MOST_CHARACTERS = 11_500
SLACK = 1.15  # beyond a prediction's ends by so much, it was wrong


def records(folder: Path) -> Records:
    _, floors, rows = load(folder)
    read = lambda name: json.loads(path.read_text(encoding="utf-8")) if (path := folder / name).is_file() else {}  # noqa: E731
    profiled = [row for row in read("profile.json").get("rows", []) if row["provider"] == "fastgpt" and "parts" in row]
    parts = next((row["parts"] for row in profiled if row["benchmark"] == "train_step by part"), {})
    return Records(rows, floors, read("sweep.json").get("rows", []), parts, read("questions.json"))


def measured(folder: Path) -> list[dict[str, Any]]:
    """Every prediction with what the folder's records say of it, null where they say nothing."""
    held = records(folder)
    return [
        {
            "what": p.what,
            "low": p.low,
            "high": p.high,
            "unit": p.unit,
            "measured": None if p.measured is None else p.measured(held),
            "then": p.then,
        }
        for p in PREDICTIONS
    ]


def verdict(row: Mapping[str, Any]) -> str:
    """Empty within the prediction, give or take; else on which side it was wrong."""
    value = row["measured"]
    if value is None or row["low"] / SLACK <= value <= row["high"] * SLACK:
        return ""
    return "more" if value > row["high"] else "less"


def predictions_table(rows: Sequence[Mapping[str, Any]]) -> str:
    body = []
    for row in rows:
        said = number(row["low"]) + ("" if row["low"] == row["high"] else f" to {number(row['high'])}")
        wrong = verdict(row)
        body.append(
            [
                row["what"],
                said,
                number(row["measured"]),
                row["unit"],
                f"{wrong}: {row['then']}" if wrong and row["then"] else wrong,
            ]
        )
    return markdown(("prediction", "said", "measured", "", "otherwise"), body)


def text(folder: Path, state: Mapping[str, Any], steps: Sequence[tuple[str, str]]) -> str:
    """Steps, predictions, then whatever of the floors and rows still fits."""
    lines = [machine(state["runs"][-1]), ""]
    for name, what in steps:
        ended = state["steps"].get(name)
        said = "not begun" if ended is None else f"{ended['status']} in {ended['seconds']:g} s"
        lines.append(f"{name:<11} {said:<26} {what if ended is None or 'reason' not in ended else ended['reason']}")
    lines += ["", predictions_table(state["predictions"])]
    _, floors, rows = load(folder)
    lines += ["", floors_table(floors)] if floors else []
    lines += ["", summary(folder)] if rows else []
    whole, rest = "\n".join(lines), "\n… the rest is in records.json"
    return whole if len(whole) <= MOST_CHARACTERS else whole[: MOST_CHARACTERS - len(rest)].rsplit("\n", 1)[0] + rest
