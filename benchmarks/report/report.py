"""Recorded results -> report.md, results.csv, results.json and plots.

A row's floor is the larger of two times: its bytes at the bandwidth that floors.json of the same machine has (a copy's where it
writes, a read's where it hardly does), and its FLOPs at the rate of the library's product in that dtype.

A machine's speed drifts, so a peer's samples alternate with fastgpt's, and its row has both medians and the median of the
ratios, pair by pair. fastgpt's own row is all of its samples at that case: those taken alone and those in turn with each peer.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.floors import rate
from benchmarks.harness.floors import table as floors_table
from benchmarks.harness.growth import growth, power
from benchmarks.harness.measure import OURS, timing
from benchmarks.harness.record import CPU
from benchmarks.report import plots
from fastgpt.training.progress import PEAK_TFLOPS

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
    "percent_of_floor",
    "fastgpt_rate",
    "fastgpt_is",
    "fastgpt_is_p20",
    "fastgpt_is_p80",
    "token_us",
    "mfu",
    "largest_batch",
    "peak_MB",
    "error",
    "reason",
)
# A ratio nearer to 1 than this changes sides between two runs on the same machine.
NEARLY = 0.98


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
    measured = groups.get("floors", {"runs": []})["runs"]

    def same_machine(run: dict) -> list[Row]:
        return [floor for floor in floors if measured[floor["run"]].get("device") == run.get("device")]

    found = [derived(row, same_machine(runs[row["run"]]), runs[row["run"]]) for row in pooled(rows)]
    ours = {(row["benchmark"], row["case"]): row for row in found if row["provider"] == OURS}
    first = {(*_prompt(row), row["provider"]): row for row in found if row["benchmark"] == "prefill" and "ms" in row}
    for row in found:
        mine = ours.get((row["benchmark"], row["case"]))
        if mine and row["provider"] != OURS and "rate" in row and "rate" in mine:
            compare(row, mine)
        before = first.get((*_prompt(row), row["provider"])) if row["benchmark"] == "generate" else None
        if before and "ms" in row:
            after, made = row["ms"] - before["ms"], row.get("new_tokens", row["size"]["new"])
            row["token_us"] = 1e3 * after / (made - 1)
    return runs, floors, found


def cpus(results: Path) -> list[Path]:
    return sorted(path for path in results.iterdir() if path.is_dir() and is_cpu(path))


def gpus(results: Path) -> list[Path]:
    return sorted(path for path in results.iterdir() if path.is_dir() and not is_cpu(path))


def is_cpu(directory: Path) -> bool:
    return directory.name.partition("-")[0] == CPU


def _prompt(row: Row) -> tuple[Any, ...]:
    return tuple(row["size"].get(name) for name in ("model", "batch", "prompt"))


def pooled(rows: Sequence[Row]) -> list[Row]:
    """`rows`, fastgpt's with all of its samples of the same run: its own and those that its peers' rows hold."""
    turns: dict[tuple[str, str, int], list[float]] = {}
    for row in rows:
        turns.setdefault((row["benchmark"], row["case"], row["run"]), []).extend(row.get("fastgpt_ms", ()))
    found = []
    for row in rows:
        if row["provider"] == OURS and "samples_ms" in row:
            t = timing([*row["samples_ms"], *turns[row["benchmark"], row["case"], row["run"]]])
            row = {**row, "ms": t.median, "p20": t.p20, "p80": t.p80, "rounds": t.rounds}
        found.append(row)
    return found


def compare(row: Row, mine: Row) -> None:
    """Give `row` fastgpt's rate in the samples between its own, and the ratio with its 20th and 80th percentile.

    Where the two weren't timed in turn, the ratio is that of the medians and its range that of the two ranges. A record of
    pairs that kept their median alone has that range only if the median lies in it: else the machine drifted in between.
    """
    if "fastgpt_ms" in row:
        row["fastgpt_rate"] = mine["rate"] * mine["ms"] / statistics.median(row["fastgpt_ms"])
    row.setdefault("fastgpt_is", mine["rate"] / row["rate"])
    if "fastgpt_is_p20" not in row:
        work = mine["rate"] * mine["ms"] / (row["rate"] * row["ms"])
        low, high = work * row["p20"] / mine["p80"], work * row["p80"] / mine["p20"]
        if low <= row["fastgpt_is"] <= high:
            row["fastgpt_is_p20"], row["fastgpt_is_p80"] = low, high


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
    peak = next((peak for name, peak in PEAK_TFLOPS if name in run["device"]), None)
    if row["benchmark"] == "train_step" and peak:
        row["mfu"] = row["flops"] / row["ms"] / 1e9 / peak
    return row


def behind(rows: Sequence[Row]) -> list[Row]:
    """Rows of peers that were faster than fastgpt beyond the noise, the fastest first: four ratios in five are below 1."""
    peers = [row for row in rows if not row.get("provider", "").startswith(OURS)]
    found = [row for row in peers if row.get("fastgpt_is", 1.0) < NEARLY and row.get("fastgpt_is_p80", 1.0) < 1.0]
    return sorted(found, key=lambda row: row["fastgpt_is"])


def ratio(row: Row) -> str:
    shown = [row[name] for name in ("fastgpt_is", "fastgpt_is_p20", "fastgpt_is_p80") if name in row]
    median, *ends = (f"{value:.2f}" if value >= 0.1 else f"{value:.2g}" for value in shown)
    return f"{median}x" + (f" ({' to '.join(ends)})" if ends else "")


def left_out(rows: Iterable[Row]) -> list[str]:
    """A line a reason of the providers that took no part."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons.setdefault(f"{row['status']}, {row['reason']}", {})[row["provider"]] = None
    return [f"{reason}: {'; '.join(providers)}" for reason, providers in reasons.items()]


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


HEADER = ("provider", "ms", "p20 to p80", "rate", "of its floor", "fastgpt in turn", "fastgpt is", "")


def cells(row: Row) -> list[str]:
    if "ms" not in row:
        if "peak_MB" in row:
            return [row["provider"], "", "", f"{row['peak_MB']:,.0f} MB", "", "", "", ""]
        parts = ", ".join(f"{k} {number(v)} ms" for k, v in row["parts"].items())
        return [row["provider"], "", "", parts, "", "", "", ""]
    share = row.get("percent_of_floor")
    more = ""
    if "mfu" in row:
        more = f"{100 * row['mfu']:.1f}% MFU"
    elif "token_us" in row:
        more = f"{number(row['token_us'])} us a later token"
    if "largest_batch" in row:
        more = ", ".join(filter(None, (f"batch {row['largest_batch']}", more, f"{row['peak_MB']:,.0f} MB")))
    asked = row["size"].get("new")
    fewer = "" if row.get("new_tokens", asked) == asked else f" ({row['new_tokens']} tokens)"
    return [
        row["provider"] + fewer,
        number(row["ms"]),
        f"{number(row['p20'])} to {number(row['p80'])}",
        f"{number(row['rate'])} {row['rate_unit']}",
        "" if share is None else f"{share:.0f}% ({row['bound']})",
        f"{number(row['fastgpt_rate'])} {row['rate_unit']}" if "fastgpt_rate" in row else "",
        ratio(row) if "fastgpt_is" in row else "",
        more,
    ]


def table(rows: Sequence[Row]) -> str:
    """Of one case: a provider a line; who took no part is listed below by reason."""
    body = [cells(row) for row in rows if row["status"] == "ok"]
    missing = "\n".join(f"- {line}" for line in left_out(rows))
    return "\n\n".join(part for part in (markdown(HEADER, body) if body else "", missing) if part)


def machine(run: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    commit = (run["commit"] or "unknown")[:12] + (", changed since" if run["changed_since_commit"] else "")
    parts = [f"{run['device']}; {versions}; Python {run['python']}; commit {commit}; {run['timestamp'][:10]}"]
    if run.get("driver"):
        parts.append(f"driver {run['driver']}, power limit {run['power_limit_W']} W")
    if run.get("note"):
        parts.append(run["note"])
    return "; ".join(parts)


def report_text(directory: Path, pictures: Sequence[Path] = ()) -> str:
    runs, floors, rows = load(directory)
    lines = ["# Benchmarks", ""]
    lines += [f"- {text}" for text in dict.fromkeys(machine(run) for run in runs)]
    lines += ["", "Commands:", "", *(f"- `{command}`" for command in dict.fromkeys(run["command"] for run in runs))]
    lines += [
        "",
        "Medians, with the 20th and 80th percentile. Each peer's samples alternated with fastgpt's own: `fastgpt in turn` is",
        "what fastgpt did between them, `fastgpt is` the median of the ratios, pair by pair, with their percentiles; above 1,",
        "fastgpt is faster. fastgpt's own line is all of its samples at that size. A share of the floor above 100% was measured",
        "at a moment at which the machine was faster than when its floors were. Training FLOPs by llm.c's convention,",
        "6 N + 6 L C T a token.",
        *(part for path in pictures for part in ("", f"![{path.stem}]({path.name})")),
        "",
        "## Where a peer is ahead",
        "",
        *(ahead_lines(rows) or ["Nowhere beyond the noise."]),
        "",
        "## Floors",
        "",
        "```",
        floors_table(floors),
        "```",
    ]
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        chosen = [row for row in rows if row["benchmark"] == name and not row["grows"]]
        lines += ["", f"## {name}"] if chosen else []
        for case in dict.fromkeys(row["case"] for row in chosen):
            lines += ["", f"### {case}", "", table([row for row in chosen if row["case"] == case])]
    series = growth(rows)
    if series:
        header = ("what", "grows", "provider", "from", "to", "time grows as")
        body = [
            [title, over, provider, *(f"{number(p.size)}: {number(p.ms)} ms" for p in (points[0], points[-1]))]
            + [power(over, points)]
            for (title, over, provider), points in series.items()
        ]
        lines += ["", "## Growth", "", "Exponents fitted through all points, with their standard errors.", ""]
        lines += [markdown(header, body)]
    return "\n".join(lines) + "\n"


def ahead_lines(rows: Sequence[Row]) -> list[str]:
    return [f"- {row['benchmark']} {row['case']}: {row['provider']}, fastgpt is {ratio(row)}" for row in behind(rows)]


def write(directory: Path) -> list[str]:
    """report/report.md, results.csv, results.json and the plots, beside the records; gives the lines to print."""
    runs, floors, rows = load(directory)
    folder = directory / "report"
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    drawn = plots.draw(rows, floors, folder) if plots.possible() else []
    (folder / "report.md").write_text(report_text(directory, drawn), encoding="utf-8")
    with open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    results = {"runs": runs, "floors": floors, "rows": rows}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    missing = [] if plots.possible() else ["no plots: matplotlib isn't installed"]
    return [*missing, f"report: {folder / 'report.md'}"]


def summary(directory: Path, group: str | None = None) -> str:
    """A line a case of `group`, or of all of them, with the best peer; then how fastgpt's time grows, and whatever failed."""
    _, _, rows = load(directory)
    rows = [row for row in rows if group in (None, row["group"])]
    lines = []
    for name, case in dict.fromkeys((row["benchmark"], row["case"]) for row in rows if not row["grows"]):
        chosen = [row for row in rows if (row["benchmark"], row["case"]) == (name, case) and row["status"] == "ok"]
        mine = next((row for row in chosen if row["provider"] == OURS), None)
        best = min((row for row in chosen if "fastgpt_is" in row), key=lambda row: row["fastgpt_is"], default=None)
        texts = (
            [text for text in (cells(mine)[1], *cells(mine)[3:5], cells(mine)[7]) if text]
            if mine
            else ["fastgpt: none"]
        )
        texts += [f"{best['provider']}: fastgpt is {ratio(best)}"] if best else []
        lines.append(f"{name} {case:<44.80} {'  '.join(texts)}")
    for (title, over, provider), points in growth(rows).items():
        if provider == OURS:
            ends = " to ".join(f"{number(p.ms)} ms at {number(p.size)}" for p in (points[0], points[-1]))
            lines.append(f"{title}: {ends}, {power(over, points)}")
    failed = [row for row in rows if row["status"] not in ("ok", "absent")]
    lines += [f"{row['benchmark']} {row['case']} {row['provider']}: {row['status']}, {row['reason']}" for row in failed]
    return "\n".join(lines)
