"""Recorded results -> report.md, results.csv, results.json and plots, and README's tables. Measures nothing.

    python -m benchmarks.report [DIR]       the report of one machine's records
    python -m benchmarks.report --readme    fill README's tables from benchmarks/results/; --check only compares

A row's floor is the larger of two times: its bytes at the bandwidth that floors.json of the same machine has (a copy's where it
writes, a read's where it hardly does), and its FLOPs at the rate of the library's product in that dtype.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.floors import rate
from benchmarks.floors import table as floors_table
from benchmarks.harness import OURS
from benchmarks.record import RESULTS, ROOT, machine_name
from benchmarks.train_step import peak_tflops

Row = dict[str, Any]
COLUMNS = (
    "benchmark",
    "case",
    "provider",
    "status",
    "ms",
    "p20",
    "p80",
    "rounds",
    "rate",
    "rate_unit",
    "floor_ms",
    "bound",
)
COLUMNS += ("percent_of_floor", "fastgpt_is", "token_us", "mfu", "peak_MB", "error", "reason")


def load(directory: Path) -> tuple[list[dict], list[Row], list[Row]]:
    """Runs, floors, and all other rows with what can be derived of them."""
    groups = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))}
    groups = {stem: held for stem, held in groups.items() if isinstance(held, dict) and {"runs", "rows"} <= set(held)}
    floors = groups.get("floors", {"rows": []})["rows"]
    runs, rows = [], []
    for stem, held in groups.items():
        first = len(runs)
        runs += held["runs"]
        rows += [
            {**row, "run": first + row["run"], "group": stem}
            for row in held["rows"]
            if row["benchmark"] not in ("floors", "sweep")
        ]
    found = [derived(row, floors, runs[row["run"]]) for row in rows]
    ours = {(row["benchmark"], row["case"]): row for row in found if row["provider"] == OURS}
    first = {(*_prompt(row), row["provider"]): row for row in found if row["benchmark"] == "prefill" and "ms" in row}
    for row in found:
        mine = ours.get((row["benchmark"], row["case"]))
        if mine and row["provider"] != OURS and "rate" in row and "rate" in mine:
            row.setdefault("fastgpt_is", mine["rate"] / row["rate"])  # not timed in turn: the ratio of medians
        before = first.get((*_prompt(row), row["provider"])) if row["benchmark"] == "generate" else None
        if before and "ms" in row:
            after, made = row["ms"] - before["ms"], row.get("new_tokens", row["size"]["new"])
            row["token_us"] = 1e3 * after / (made - 1)
    return runs, floors, found


def _prompt(row: Row) -> tuple[Any, ...]:
    return tuple(row["size"].get(name) for name in ("model", "batch", "prompt"))


def derived(row: Row, floors: Sequence[Row], run: dict) -> Row:
    """With floor, rate and, for training, model FLOPs utilization."""
    row = dict(row)
    if row["status"] != "ok" or "ms" not in row:
        return row
    scale = row["new_tokens"] / row["size"]["new"] if "new_tokens" in row else 1.0  # fewer tokens, as much less work
    memory = rate(floors, "read" if row["written"] < 0.1 * row["read"] else "copy")
    compute = rate(floors, "matmul", row["dtype"])
    times = {}
    if memory:
        times["memory"] = scale * (row["read"] + row["written"]) / memory / 1e6
    if compute:
        times["compute"] = scale * row["flops"] / compute / 1e9
    if times and max(times.values()) > 0:
        row["bound"] = max(times, key=lambda bound: times[bound])
        row["floor_ms"] = times[row["bound"]]
        row["percent_of_floor"] = 100 * row["floor_ms"] / row["ms"]
    if row["units"]:
        row["rate"], row["rate_unit"] = 1e3 * row["units"] / row["ms"], f"{row['unit']}/s"
    elif row["flops"] and row.get("bound") == "compute":
        row["rate"], row["rate_unit"] = row["flops"] / row["ms"] / 1e9, "TFLOP/s"
    else:
        row["rate"], row["rate_unit"] = (row["read"] + row["written"]) / row["ms"] / 1e6, "GB/s"
    peak = peak_tflops(run["device"])
    if row["benchmark"] == "train_step" and peak:
        row["mfu"] = row["flops"] / row["ms"] / 1e9 / peak
    return row


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The exponent of the power law through (size, time), by least squares on logarithms."""
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def growth(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[tuple[float, float]]]:
    """(benchmark and its fixed sizes, what grows, provider) -> (size, milliseconds) in order, three points at least.

    The size that a series starts from is recorded once, as a case of its own, and belongs to every series.
    """
    series: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    timed = [row for row in rows if row["status"] == "ok" and "ms" in row]
    for row in sorted(timed, key=lambda row: row["grows"] is None):
        for over in [row["grows"]] if row["grows"] else row["size"]:
            fixed = " ".join(f"{k}={v}" for k, v in row["size"].items() if k != over)
            title = " ".join(part for part in (row["benchmark"], fixed, row["dtype"], row["mode"]) if part)
            key = title, over, row["provider"]
            if row["grows"] or key in series:
                series.setdefault(key, []).append((row["size"][over], row["ms"]))
    return {key: sorted(points) for key, points in series.items() if len(points) >= 3}


def behind(rows: Sequence[Row]) -> list[Row]:
    """Rows of peers that were faster than fastgpt in the same run."""
    return [row for row in rows if row.get("fastgpt_is", 1.0) < 0.98]


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def cells(row: Row) -> list[str]:
    if row["status"] != "ok":
        return [row["case"], row["provider"], f"{row['status']}: {row['reason']}", "", "", "", "", ""]
    if "ms" not in row:
        found = (
            f"{row['peak_MB']:,.0f} MB"
            if "peak_MB" in row
            else ", ".join(f"{k} {number(v)} ms" for k, v in row["parts"].items())
        )
        return [row["case"], row["provider"], "", "", found, "", "", ""]
    share = row.get("percent_of_floor")
    return [
        row["case"],
        row["provider"],
        number(row["ms"]),
        "" if row["p20"] is None else f"{number(row['p20'])} to {number(row['p80'])}",
        f"{number(row['rate'])} {row['rate_unit']}",
        "" if share is None else f"{share:.0f}% ({row['bound']})",
        f"{row['fastgpt_is']:.2f}x" if "fastgpt_is" in row else "",
        f"{100 * row['mfu']:.1f}% MFU"
        if "mfu" in row
        else f"{number(row['token_us'])} us"
        if "token_us" in row
        else "",
    ]


HEADER = ("case", "provider", "ms", "p20 to p80", "rate", "of its floor", "fastgpt is", "MFU, or a later token")


def machine(run: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    commit = (run["commit"] or "unknown")[:12] + (", changed since" if run["changed_since_commit"] else "")
    parts = [f"{run['device']}; {versions}; Python {run['python']}; commit {commit}; {run['timestamp'][:10]}"]
    if run.get("driver"):
        parts.append(f"driver {run['driver']}, power limit {run['power_limit_W']} W")
    if run.get("note"):
        parts.append(run["note"])
    return "; ".join(parts)


def report_text(directory: Path) -> str:
    runs, floors, rows = load(directory)
    lines = ["# Benchmarks", ""]
    lines += [f"- {text}" for text in dict.fromkeys(machine(run) for run in runs)]
    lines += ["", "Commands:", "", *(f"- `{command}`" for command in dict.fromkeys(run["command"] for run in runs))]
    lines += [
        "",
        "Medians, with the 20th and 80th percentile; each peer's samples alternated with fastgpt's own, and `fastgpt is` is the",
        "median of their ratios. Training FLOPs by llm.c's convention, 6 N + 6 L C T a token.",
        "",
        "## Floors",
        "",
        "```",
        floors_table(floors),
        "```",
    ]
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        chosen = [row for row in rows if row["benchmark"] == name and not row["grows"]]
        if chosen:
            lines += ["", f"## {name}", "", markdown(HEADER, [cells(row) for row in chosen])]
    series = growth(rows)
    if series:
        header = ("what", "grows", "provider", "from", "to", "time grows as")
        body = [
            [title, over, provider, *(f"{number(x)}: {number(ms)} ms" for x, ms in (points[0], points[-1]))]
            + [f"{over}^{slope(points):.2f}"]
            for (title, over, provider), points in series.items()
        ]
        lines += ["", "## Growth", "", markdown(header, body)]
    lines += ["", "## Where a peer is ahead", ""]
    ahead = sorted(behind(rows), key=lambda row: row["fastgpt_is"])
    lines += [f"- {r['benchmark']} {r['case']}: {r['provider']}, fastgpt is {r['fastgpt_is']:.2f}x" for r in ahead]
    return "\n".join([*lines, *([] if ahead else ["Nowhere in these rows."])]) + "\n"


def write(directory: Path) -> None:
    """report.md, results.csv, report/results.json and the plots, beside the records."""
    runs, floors, rows = load(directory)
    folder = directory / "report"
    folder.mkdir(exist_ok=True)
    (folder / "report.md").write_text(report_text(directory), encoding="utf-8")
    with open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    results = {"runs": runs, "floors": floors, "rows": rows}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    from benchmarks import plots

    plots.draw(rows, floors, growth(rows), folder)


def summary(directory: Path, group: str | None = None) -> str:
    """A line a row of `group`, or of all of them, for the end of a run."""
    _, _, rows = load(directory)
    lines = []
    for row in rows:
        if row["status"] != "absent" and group in (None, row["group"]):
            _, provider, *rest = cells(row)
            texts = "  ".join(part for part in rest if part)
            lines.append(f"{row['benchmark']} {row['case']:<44.80} {provider:<32} {texts}")
    if group is None:
        lines.append(f"report: {directory / 'report' / 'report.md'}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, default=Path("out/bench") / machine_name())
    parser.add_argument("--summary", metavar="GROUP", help="print the rows of a group and write nothing")
    parser.add_argument("--readme", action="store_true", help="fill README.md's tables from benchmarks/results")
    parser.add_argument("--check", action="store_true", help="with --readme: change nothing, fail if it would")
    arguments = parser.parse_args(argv)
    if not arguments.readme:
        if not any(arguments.directory.glob("*.json")):
            parser.error(f"no records in {arguments.directory}; run the benchmarks first")
        if arguments.summary is None:
            write(arguments.directory)
        print(summary(arguments.directory, arguments.summary))
        return 0
    from benchmarks.readme import filled

    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = filled(text, RESULTS)
    if arguments.check:
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
