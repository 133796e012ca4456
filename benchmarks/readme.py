"""README's result tables, from benchmarks/results/ alone: `python -m benchmarks.report --readme` fills them, a test compares."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.floors import rate
from benchmarks.harness import OURS
from benchmarks.report import behind, growth, load, machine, markdown, number, slope

Row = dict[str, Any]
NOT_YET = "not yet measured"


def filled(text: str, results: Path) -> str:
    """`text` with what stands between each pair of markers, `<!-- results: NAME -->` and `<!-- end of results -->`, made anew."""
    for name, make in SECTIONS.items():
        pattern = rf"(<!-- results: {name} -->\n).*?(<!-- end of results -->)"
        text, count = re.subn(pattern, lambda m, make=make: m[1] + make(results) + "\n" + m[2], text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README must have <!-- results: {name} --> once, it has it {count} times")
    return text


def headline(results: Path) -> str:
    """One sentence: generation on the CPU, and what is known of a GPU."""
    _, _, rows = load(results / "cpu")
    first = _first_case(rows, "generate")
    ours, theirs = (next(r for r in first if r["provider"] == name) for name in (OURS, "transformers"))
    sentence = (
        f"On two CPU cores it decodes GPT-2 124M (fp32, batch 1) at {ours['rate']:.1f} tokens/s, where transformers gives "
        f"{theirs['rate']:.1f} in the same run and what has to be read and\ncomputed would allow "
        f"{100 * ours['rate'] / ours['percent_of_floor']:.1f}."
    )
    return sentence + ("" if _gpus(results) else " On a GPU nothing has been measured yet.")


def cpu(results: Path) -> str:
    runs, floors, rows = load(results / "cpu")
    bandwidth, products = rate(floors, "read"), rate(floors, "matmul")
    lines = [*dict.fromkeys(f"- {machine(run)}." for run in runs)]
    if bandwidth:
        lines.append(
            f"- It reads {bandwidth:.1f} GB/s"
            + (f" and multiplies at {1e3 * products:.0f} GFLOP/s." if products else ".")
        )
    lines.append("")
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
    for directory in _gpus(results):
        runs, _, rows = load(directory)
        parts += [*dict.fromkeys(f"- {machine(run)}." for run in runs), "", kernels(rows)]
        for name in ("train_step", "generate"):
            for case in dict.fromkeys(r["case"] for r in rows if r["benchmark"] == name):
                parts += ["", compared([r for r in rows if (r["benchmark"], r["case"]) == (name, case)], name)]
        parts += ["", ahead(rows)]
    return "\n".join(parts) if parts else markdown(["on a GPU", ""], [["kernels, training, decode", NOT_YET]])


def compared(rows: Sequence[Row], name: str) -> str:
    """A table of one case: a provider a line, fastgpt first; who took no part is listed below."""
    body = []
    for row in (r for r in rows if r["status"] == "ok" and "ms" in r):
        asked, made = row["size"].get("new"), row.get("new_tokens", row["size"].get("new"))
        tokens = "" if made == asked else f" ({made} tokens)"
        ratio = f"{row['fastgpt_is']:.2f}x as fast" if "fastgpt_is" in row else ""
        share = f"{row['percent_of_floor']:.0f}%" if "percent_of_floor" in row else ""
        mfu = [f"{100 * row['mfu']:.1f}%"] if "mfu" in row else []
        body.append([row["provider"] + tokens, number(row["rate"]), f"{number(row['ms'])}", ratio, share, *mfu])
    header = [f"{name}: {rows[0]['case']}", "tokens/s", "ms", "fastgpt is", "of its floor"]
    header += ["MFU (6 N + 6 L C T)"] if body and len(body[0]) > len(header) else []
    left = [f"{r['provider']}: {r['status']}, {r['reason']}" for r in rows if r["status"] != "ok"]
    return markdown(header, body) + ("\n\nNot in the table: " + "; ".join(left) + "." if left else "")


def kernels(rows: Sequence[Row]) -> str:
    """fastgpt's kernels at each op's first size, with the best peer."""
    body = []
    ops = [r for r in rows if r["provider"] == OURS and r["mode"] in ("forward", "backward", "both") and not r["grows"]]
    for row in ops:
        peers = [
            r for r in rows if (r["benchmark"], r["case"]) == (row["benchmark"], row["case"]) and "fastgpt_is" in r
        ]
        best = min(peers, key=lambda r: r["fastgpt_is"], default=None)
        if row["status"] == "ok":
            peer = f"{best['provider']}, {best['fastgpt_is']:.2f}x" if best else ""
            share = f"{row['percent_of_floor']:.0f}% ({row['bound']})" if "floor_ms" in row else ""
            body.append([row["benchmark"], row["case"], number(row["ms"]), share, peer])
        else:
            body.append([row["benchmark"], row["case"], row["status"], "", ""])
    return (
        markdown(["op", "size", "ms", "of its floor", "best peer, fastgpt is"], body)
        if body
        else f"Kernels: {NOT_YET}."
    )


def grown(rows: Sequence[Row]) -> str:
    """How a token's cost grows with the context."""
    found = []
    for (title, over, provider), points in growth(rows).items():
        if title.startswith("next_token"):
            measured = ", ".join(f"{ms:.1f} ms at {x:.0f}" for x, ms in points)
            found.append(f"{provider}: {measured}, as {over}^{slope(points):.2f}")
    return "One more token, by context. " + ". ".join(found) + "." if found else ""


def ahead(rows: Sequence[Row]) -> str:
    worst = sorted(behind(rows), key=lambda r: r["fastgpt_is"])
    listed = [f"{r['provider']} in {r['benchmark']} ({r['case']}), {r['fastgpt_is']:.2f}x" for r in worst]
    return "Where a peer is ahead: " + ("; ".join(listed) if listed else "nowhere in these rows") + "."


def memory(rows: Sequence[Row]) -> str:
    found = [r for r in rows if r["benchmark"] == "memory" and r["status"] == "ok"]
    listed = ", ".join(f"{row['provider']} {row['peak_MB']:,.0f} MB" for row in found)
    return f"Peak memory of a training step ({found[0]['case']}): {listed}." if found else ""


def imports(rows: Sequence[Row]) -> str:
    found = [r for r in rows if r["benchmark"] == "import_time" and r["status"] == "ok"]
    return "Import: " + ", ".join(f"{row['provider']} {row['ms'] / 1e3:.2f} s" for row in found) + "." if found else ""


def _first_case(rows: Sequence[Row], name: str) -> list[Row]:
    found = [r for r in rows if r["benchmark"] == name]
    return [r for r in found if r["case"] == found[0]["case"]]


def _gpus(results: Path) -> list[Path]:
    return sorted(path for path in results.iterdir() if path.is_dir() and path.name != "cpu")


SECTIONS: dict[str, Callable[[Path], str]] = {"headline": headline, "cpu": cpu, "gpu": gpu}
