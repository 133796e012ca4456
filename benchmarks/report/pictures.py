"""README's pictures, drawn of records as small SVG files: `python -m benchmarks.report --readme` makes them.

    peers.svg      speed beside fastgpt's in turn, a bar a provider
    context.svg    the time of one more token against the context, with and without a cache
    loss.svg       the loss of README's training command

Each has colours for a light and a dark page and its own background, so that it can be read on either. Written by hand, not by
matplotlib, so that the same records give the same file everywhere and a test can compare.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from benchmarks.harness.growth import growth
from benchmarks.harness.measure import INT8, OURS
from benchmarks.models.curve import FILE as CURVE
from benchmarks.report.readme import DTYPES, SIZES, first_case
from benchmarks.report.report import cpus, load, number

Row = dict[str, Any]
Point = tuple[float, float]

WIDTH = 760
STYLE = """
text { font: 13px -apple-system, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; fill: #1f2328 }
.title { font-weight: 600 } .muted { fill: #59636e } .end { text-anchor: end } .middle { text-anchor: middle }
.page { fill: #ffffff; stroke: #d1d9e0 } .rule { stroke: #d1d9e0 }
.ours { fill: #0969da } .light { fill: #80ccff } .peer { fill: #b7bfc8 }
polyline { stroke-width: 2 } polyline.ours, polyline.peer { fill: none }
polyline.ours, line.ours { stroke: #0969da } polyline.peer, line.peer { stroke: #8c959f }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .muted { fill: #9198a1 }
  .page { fill: #0d1117; stroke: #3d444d } .rule { stroke: #3d444d }
  .ours { fill: #4493f8 } .light { fill: #1f4f8f } .peer { fill: #545d68 }
  polyline.ours, line.ours { stroke: #4493f8 } polyline.peer, line.peer { stroke: #9198a1 }
}
""".strip()


def pictures(results: Path) -> dict[str, str]:
    """File name -> SVG, of what is recorded: of the CPU, which is what everybody has."""
    made: dict[str, str] = {}
    for directory in cpus(results):  # the first that has what a picture needs
        _, _, rows = load(directory)
        names = {row["benchmark"] for row in rows}
        if "generate" in names:
            made.setdefault("peers.svg", peers(rows))
        if "next_token" in names:
            made.setdefault("context.svg", context(rows))
        if (directory / CURVE).is_file():
            made.setdefault("loss.svg", loss(json.loads((directory / CURVE).read_text(encoding="utf-8"))["log"]))
    return made


def page(height: float, label: str, parts: Sequence[str]) -> str:
    size = f'width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} {height:g}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(label)}">',
        f"<style>{STYLE}</style>",
    ]
    lines += [
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="6"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.5g}" y="{y:.5g}"' + (f' class="{kind}"' if kind else "") + f">{escape(words)}</text>"


def peers(rows: Sequence[Row]) -> str:
    """A panel a task and dtype, a bar a provider, as long as the median ratio says. Of fastgpt's other forms, int8 alone."""
    left, right, bar, y = 236, WIDTH - 180, 18, 34.0
    parts = [text(20, y - 6, "Speed of GPT-2 124M on two cores, timed in turn with fastgpt; longer is faster", "title")]
    for title, chosen in panels(rows):
        y += 24
        parts.append(text(20, y, title, "muted"))
        y += 9
        longest = max(1 / row.get("fastgpt_is", 1.0) for row in chosen)
        for row in chosen:
            kind = "ours" if row["provider"] == OURS else "light" if row["provider"] == INT8 else "peer"
            length = (right - left) / row.get("fastgpt_is", 1.0) / longest
            said = (
                f"{number(row['rate'])} tokens/s" if kind == "ours" else f"fastgpt is {row['fastgpt_is']:.2f}x as fast"
            )
            parts += [
                text(left - 10, y + 0.75 * bar, row["provider"] + ("" if cached(row) else ", no cache"), "end"),
                f'<rect class="{kind}" x="{left}" y="{y:.5g}" width="{length:.5g}" height="{bar - 4}" rx="2"/>',
                text(left + length + 8, y + 0.75 * bar, said, "muted"),
            ]
            y += bar + 3
    return page(y + 14, "Speed beside peers", parts)


def cached(row: Row) -> bool:
    """Those without a cache make fewer tokens."""
    return row.get("new_tokens") == row["size"].get("new")


def panels(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for name, what in (("generate", "Generating"), ("train_step", "Training step")):
        for dtype in dict.fromkeys(row["dtype"] for row in rows if row["benchmark"] == name):
            case = first_case([row for row in rows if row["dtype"] == dtype], name)
            timed = [row for row in case if row["status"] == "ok" and "rate" in row]
            shown = [row for row in timed if row["provider"] in (OURS, INT8) or not row["provider"].startswith(OURS)]
            size = shown[0]["size"]
            behind = (
                f"prompt {size['prompt']}, {size['new']} new tokens"
                if "prompt" in size
                else f"context {size['context']}"
            )
            yield f"{what}: batch {size['batch']}, {behind}, {DTYPES[dtype]}", shown


class Line(NamedTuple):
    label: str
    kind: str  # ours or peer, for the colour
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()  # size, 20th and 80th percentile
    marks: bool = False


def chart(title: str, over: str, lines: Sequence[Line], floor: float | None = 0.0) -> str:
    left, right, top, bottom = 64, WIDTH - 30, 62, 300
    xs, ys = ([p[axis] for line in lines for p in line.points] for axis in (0, 1))
    high = [y for line in lines for _, _, y in line.band] + ys
    across, upwards = ticks(0, max(xs)), ticks(min(ys) if floor is None else floor, max(high))
    (x0, x1), (y0, y1) = (across[0], across[-1]), (upwards[0], upwards[-1])
    place = lambda x, y: (  # noqa: E731
        left + (x - x0) / (x1 - x0) * (right - left),
        bottom - (y - y0) / (y1 - y0) * (bottom - top),
    )
    parts = [text(20, 28, title, "title")]
    for value in upwards:
        _, y = place(x0, value)
        parts += [
            f'<line class="rule" x1="{left}" x2="{right}" y1="{y:.5g}" y2="{y:.5g}"/>',
            text(left - 8, y + 4, number(value), "end muted"),
        ]
    for value in across:
        parts.append(text(place(value, y0)[0], bottom + 18, f"{value:,.0f}", "middle muted"))
    parts.append(text((left + right) / 2, bottom + 36, over, "middle muted"))
    for i, line in enumerate(lines):
        for x, low, up_to in line.band:
            (px, bottom_y), (_, top_y) = place(x, low), place(x, up_to)
            parts.append(
                f'<line class="{line.kind}" x1="{px:.5g}" x2="{px:.5g}" y1="{bottom_y:.5g}" y2="{top_y:.5g}"/>'
            )
        places = [place(*point) for point in line.points]
        parts.append(f'<polyline class="{line.kind}" points="{" ".join(f"{x:.5g},{y:.5g}" for x, y in places)}"/>')
        parts += (
            [f'<circle class="{line.kind}" cx="{x:.5g}" cy="{y:.5g}" r="3"/>' for x, y in places] if line.marks else []
        )
        key = left + 16 + 230 * i
        parts += [
            f'<rect class="{line.kind}" x="{key}" y="{top - 17}" width="14" height="10" rx="2"/>',
            text(key + 20, top - 8, line.label),
        ]
    return page(bottom + 50, title, parts)


def context(rows: Sequence[Row]) -> str:
    """Of the rows whose context alone grows."""
    series = {
        provider: points for (title, _, provider), points in growth(rows).items() if title.startswith("next_token")
    }
    sizes = next(row["size"] for row in rows if row["benchmark"] == "next_token")
    label = {OURS: "with the KV cache", "fastgpt, no cache": "without"}
    lines = [
        Line(
            label[name],
            kind,
            [(p.size, p.ms) for p in series[name]],
            [(p.size, p.p20, p.p80) for p in series[name]],
            True,
        )
        for name, kind in ((OURS, "ours"), ("fastgpt, no cache", "peer"))
    ]
    title = f"One more token of GPT-2 {SIZES[sizes['model']]} on two cores, ms"
    return chart(title, "tokens before it", lines)


def loss(log: Sequence[Row]) -> str:
    lines = [
        Line(label, kind, [(entry["step"], entry[key]) for entry in log if key in entry], marks=key != "loss")
        for key, label, kind in (("loss", "training batches", "peer"), ("validation_loss", "held-out text", "ours"))
    ]
    return chart(
        "Loss of README's training command on two cores, nats a token",
        "step",
        [line for line in lines if line.points],
        None,
    )


def ticks(low: float, high: float) -> list[float]:
    """From below low to above high, in steps of 1, 2 or 5 times a power of ten, so that there are about four to ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = max(power * factor for factor in (1, 2, 5) if power * factor <= (high - low) / 4)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]
