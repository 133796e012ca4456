"""README's table of results and RESULTS.md, from benchmarks/results/ alone: `python -m benchmarks.report --readme` makes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.floors import rate
from benchmarks.harness.growth import growth, power
from benchmarks.harness.measure import INT8, OURS
from benchmarks.report.first import predictions_table
from benchmarks.report.report import ahead_lines, cpus, gpus, is_cpu, left_out, load, machine, markdown, number, ratio

Row = dict[str, Any]
NOT_YET = "not yet measured"
RULE = """In each line, `fastgpt in turn` is what fastgpt did between this very peer's samples, and `fastgpt is` the
median of their ratios with its 20th and 80th percentile; fastgpt's own line is the median of all its samples."""
INTRODUCTION = """Made by `python -m benchmarks.report --readme` of `benchmarks/results/`. Medians; each peer's samples
alternated with fastgpt's own, every output was checked first, and a floor is the larger of two times: bytes over the bandwidth
and FLOPs over the product rate that were measured on the same machine. How to measure yours, and how to read a line, is on
[the benchmarks' own page](README.md)."""
PICTURES = """![The time of one more token against the context](pictures/context.svg)

![The loss of README's training command](pictures/loss.svg)"""
SIZES = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8 weights", "int4": "int4 weights"}


def filled(text: str, results: Path) -> str:
    """`text` with what stands between each pair of markers, `<!-- results: NAME -->` and `<!-- end of results -->`, made anew."""
    for name, make in SECTIONS.items():
        pattern = rf"(<!-- results: {name} -->\n).*?(<!-- end of results -->)"
        text, count = re.subn(pattern, lambda m, make=make: m[1] + make(results) + "\n" + m[2], text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README must have <!-- results: {name} --> once, it has it {count} times")
    return text


def results_page(results: Path) -> str:
    """RESULTS.md: every table, who is missing from it and why, where a peer is ahead."""
    lines = [
        "# Results",
        "",
        INTRODUCTION,
        "",
        "## On a CPU",
        "",
        PICTURES,
        "",
        *(line for directory in cpus(results) for line in (cpu(directory), "")),
        "## On a GPU",
        "",
        gpu(results),
    ]
    return "\n".join(lines) + "\n"


def small(results: Path) -> str:
    """README's table: GPT-2 beside the fastest peer, a line a task and dtype, and what a token costs with and without a cache."""
    header = ("GPT-2", "on", "fastgpt", "fastest peer", "fastgpt is")
    body = [line for directory in (*cpus(results), *gpus(results)) for line in _lines(directory)]
    body += [] if gpus(results) else [["", "a GPU", NOT_YET, "", ""]]
    return markdown(header, body)


def _lines(directory: Path) -> list[list[str]]:
    runs, _, rows = load(directory)
    device = runs[0]["device"] if runs else ""
    where = device
    if is_cpu(directory):
        where = re.sub(r"\(\w+\)| Processor| @ [^,]*", "", device).replace("threads", "cores")
    body = []
    for name, what in (("generate", "generating"), ("train_step", "training")):
        for dtype in dict.fromkeys(row["dtype"] for row in rows if row["benchmark"] == name):
            chosen = first_case([row for row in rows if row["dtype"] == dtype], name)
            (mine,) = of(chosen, OURS)
            title = f"{what}: {SIZES[mine['size']['model']]}, batch {mine['size']['batch']}, {DTYPES[dtype]}"
            best = best_row(rows, mine)
            peer = [f"{best['provider']}, {number(best['rate'])}", ratio(best)] if best else ["", ""]
            body.append([title, where, f"{number(mine['rate'])} tokens/s", *peer])
            for row in chosen:
                if row["provider"] == INT8 and row["status"] == "ok":
                    body.append([f"{title}, weights in int8", where, f"{number(row['rate'])} tokens/s", "", ""])
    tokens = [row for row in rows if row["benchmark"] == "next_token" and "ms" in row]
    if tokens:
        longest = max(row["size"]["context"] for row in tokens)
        last = [row for row in tokens if row["size"]["context"] == longest]
        mine, uncached = of(last, OURS, "fastgpt, no cache")
        title = f"one more token behind {longest:,}: {SIZES[mine['size']['model']]}, {DTYPES[mine['dtype']]}"
        body.append(
            [title, where, f"{number(mine['ms'])} ms", f"without a cache, {number(uncached['ms'])}", ratio(uncached)]
        )
    return body


def cpu(directory: Path) -> str:
    """Every table of one processor, under its name."""
    runs, floors, rows = load(directory)
    bandwidth, products = rate(floors, "read"), rate(floors, "matmul")
    lines = [f"### {runs[0]['device']}", "", *dict.fromkeys(f"- {machine(run)}." for run in runs)]
    if bandwidth:
        lines.append(
            f"- It reads {bandwidth:.1f} GB/s"
            + (f" and multiplies at {1e3 * products:.0f} GFLOP/s." if products else ".")
        )
    lines += ["", RULE, ""]
    for name in ("generate", "train_step"):
        for case in dict.fromkeys(r["case"] for r in rows if r["benchmark"] == name):
            lines += [compared([r for r in rows if (r["benchmark"], r["case"]) == (name, case)], name), ""]
    if not any(row["benchmark"] == "train_step" for row in rows):
        lines += [f"Training steps: {NOT_YET}.", ""]
    for text in (grown(rows), memory(rows), imports(rows), ahead(rows)):
        lines += [text, ""] if text else []
    return "\n".join(lines[:-1])


def gpu(results: Path) -> str:
    parts = []
    for directory in gpus(results):
        runs, _, rows = load(directory)
        parts += [*dict.fromkeys(f"- {machine(run)}." for run in runs), "", RULE, "", kernels(rows)]
        for name in ("train_step", "generate"):
            cases = list(dict.fromkeys(r["case"] for r in rows if r["benchmark"] == name))
            if cases:
                first = [r for r in rows if (r["benchmark"], r["case"]) == (name, cases[0])]
                parts += ["", compared(first, name), "", overview(rows, name)]
        parts += ["", ahead(rows)]
        if (directory / "first.json").is_file():
            said = json.loads((directory / "first.json").read_text(encoding="utf-8"))["predictions"]
            parts += ["", "Predictions, made before a GPU was at hand:", "", predictions_table(said)]
    return "\n".join(parts) if parts else markdown(["on a GPU", ""], [["kernels, training, decode", NOT_YET]])


def overview(rows: Sequence[Row], name: str) -> str:
    """fastgpt at each size, with the best peer."""
    body = []
    for row in (r for r in rows if r["provider"] == OURS and r["benchmark"] == name):
        if row["status"] != "ok":
            body.append([row["case"], row["status"], "", "", best_peer(rows, row)])
            continue
        share = f"{row['percent_of_floor']:.0f}%" if "percent_of_floor" in row else ""
        more = f"{100 * row['mfu']:.1f}% MFU" if "mfu" in row else ""
        more = f"{number(row['token_us'])} us a later token" if "token_us" in row else more
        body.append([row["case"], number(row["rate"]), share, more, best_peer(rows, row)])
    return markdown([f"{name}, every size", "tokens/s", "of its floor", "", "best peer, fastgpt is"], body)


def best_row(rows: Sequence[Row], mine: Row) -> Row | None:
    """The fastest of those that aren't fastgpt in another form."""
    same = [r for r in rows if (r["benchmark"], r["case"]) == (mine["benchmark"], mine["case"]) and "fastgpt_is" in r]
    peers = [row for row in same if not row["provider"].startswith(OURS)]
    return min(peers, key=lambda row: row["fastgpt_is"], default=None)


def best_peer(rows: Sequence[Row], mine: Row) -> str:
    best = best_row(rows, mine)
    return f"{best['provider']}, {ratio(best)}" if best else ""


def compared(rows: Sequence[Row], name: str) -> str:
    """A table of one case: a provider a line, fastgpt first; who took no part is listed below, by reason."""
    body = []
    for row in (r for r in rows if r["status"] == "ok" and "ms" in r):
        asked, made = row["size"].get("new"), row.get("new_tokens", row["size"].get("new"))
        tokens = "" if made == asked else f" ({made} tokens)"
        turn = number(row.get("fastgpt_rate"))
        share = f"{row['percent_of_floor']:.0f}%" if "percent_of_floor" in row else ""
        mfu = [f"{100 * row['mfu']:.1f}%"] if "mfu" in row else []
        compared_with = ratio(row) if "fastgpt_is" in row else ""
        body.append(
            [row["provider"] + tokens, number(row["rate"]), turn, compared_with, number(row["ms"]), share, *mfu]
        )
    header = [f"{name}: {rows[0]['case']}", "tokens/s", "fastgpt in turn", "fastgpt is", "ms", "of its floor"]
    header += ["MFU (6 N + 6 L C T)"] if body and len(body[0]) > len(header) else []
    left = [f"- {line}" for line in left_out(rows)]
    return markdown(header, body) + ("\n\nNot in the table:\n\n" + "\n".join(left) if left else "")


def kernels(rows: Sequence[Row]) -> str:
    """fastgpt's kernels at each op's sizes, with the best peer."""
    body = []
    for row in rows:
        if row["provider"] == OURS and row["mode"] in ("forward", "backward", "both") and not row["grows"]:
            done = row["status"] == "ok"
            share = f"{row['percent_of_floor']:.0f}% ({row['bound']})" if "floor_ms" in row else ""
            time = number(row["ms"]) if done else row["status"]
            body.append([row["benchmark"], row["case"], time, share, best_peer(rows, row) if done else ""])
    header = ["op", "size", "ms", "of its floor", "best peer, fastgpt is"]
    return markdown(header, body) if body else f"Kernels: {NOT_YET}."


def grown(rows: Sequence[Row]) -> str:
    """How a token's cost grows with the context."""
    found = {key: points for key, points in growth(rows).items() if key[0].startswith("next_token")}
    if not found:
        return ""
    over = next(iter(found))[1]
    sizes = sorted({point.size for points in found.values() for point in points})
    body = []
    for size in sizes:
        at = [next((p for p in points if p.size == size), None) for points in found.values()]
        cells = [f"{number(p.ms)} ms ({number(p.p20)} to {number(p.p80)})" if p else "" for p in at]
        body.append([f"{size}", *cells])
    body.append(["grows as", *(power(over, points) for points in found.values())])
    return markdown([f"one more token behind a {over} of", *(provider for _, _, provider in found)], body)


def ahead(rows: Sequence[Row]) -> str:
    """Peers that are ahead beyond the noise; every row is in the report."""
    found = ahead_lines(rows)
    if not found:
        return "Where a peer is ahead: nowhere beyond the noise in these rows."
    return "Where a peer is ahead, beyond the noise (four ratios in five below 1):\n\n" + "\n".join(found)


def memory(rows: Sequence[Row]) -> str:
    found = [r for r in rows if r["benchmark"] == "memory" and r["status"] == "ok"]
    listed = ", ".join(f"{row['provider']} {row['peak_MB']:,.0f} MB" for row in found)
    return f"Peak memory of a training step ({found[0]['case']}): {listed}." if found else ""


def imports(rows: Sequence[Row]) -> str:
    found = [r for r in rows if r["benchmark"] == "import_time" and r["status"] == "ok"]
    return "Import: " + ", ".join(f"{row['provider']} {row['ms'] / 1e3:.2f} s" for row in found) + "." if found else ""


def first_case(rows: Sequence[Row], name: str) -> list[Row]:
    found = [r for r in rows if r["benchmark"] == name]
    return [r for r in found if r["case"] == found[0]["case"]]


def of(rows: Sequence[Row], *providers: str) -> list[Row]:
    return [next(row for row in rows if row["provider"] == name) for name in providers]


SECTIONS: dict[str, Callable[[Path], str]] = {"table": small}
