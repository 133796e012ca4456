"""Plots of recorded rows: bars against peers, the roofline, growth on logarithmic axes."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.floors import rate
from benchmarks.harness.growth import Series, fit, growth
from benchmarks.harness.measure import OURS

Row = dict[str, Any]

BLUE, LIGHT, GRAY = "#1f5fa8", "#8db8e0", "#9a9a9a"
# Bars beyond this many times fastgpt's time are cut, or they would press the others flat.
LONGEST = 6.0


def possible() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(rows: Sequence[Row], floors: Sequence[Row], folder: Path) -> list[Path]:
    """The PNG files that the rows are enough for: peers and growth by group of benchmarks, and the roofline."""
    timed = [row for row in rows if row["status"] == "ok" and "ms" in row]
    groups = {
        group: [row for row in timed if row["group"] == group] for group in dict.fromkeys(r["group"] for r in timed)
    }
    made = [bars(held, folder / f"peers-{group}.png") for group, held in groups.items()]
    made += [lines(growth(held), folder / f"growth-{group}.png") for group, held in groups.items()]
    made.append(roofline(timed, floors, folder / "roofline.png"))
    return [path for path in made if path is not None]


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, format="png", dpi=110)
    return path


def _first_sizes(rows: Sequence[Row], name: str) -> list[list[Row]]:
    """Rows of a benchmark by case: of the first size in each of its forms (an op's forward and backward pass, another
    activation)."""
    found = [row for row in rows if row["benchmark"] == name and not row["grows"]]
    first: dict[tuple[Any, ...], str] = {}
    for row in found:
        first.setdefault((*row["size"], row["size"].get("activation"), row["mode"]), row["case"])
    return [[row for row in found if row["case"] == case] for case in first.values()]


def bars(rows: Sequence[Row], path: Path) -> Path | None:
    """Each provider's time as a multiple of fastgpt's with the 20th and 80th percentile, a panel a case."""
    names = dict.fromkeys(row["benchmark"] for row in rows if not row["grows"])
    panels = [chosen for name in names for chosen in _first_sizes(rows, name) if any("fastgpt_is" in r for r in chosen)]
    if not panels:
        return None
    columns = 1 if len(panels) < 4 else 2
    height = -(-len(panels) // columns)
    stacks = [panels[i * height : (i + 1) * height] for i in range(columns)]  # down the first column, then the next
    inches = [sum(0.75 + 0.27 * len(chosen) for chosen in stack) for stack in stacks]
    figure = _figure(7.5 * columns, 0.4 + max(inches))
    parts = figure.subfigures(1, columns, squeeze=False)[0]
    for part, stack, used in zip(parts, stacks, inches, strict=True):
        heights = [0.75 + 0.27 * len(chosen) for chosen in stack]
        filler = [max(inches) - used] if max(inches) - used > 0.1 else []
        axes = part.subplots(len(heights + filler), 1, squeeze=False, height_ratios=heights + filler)[:, 0]
        for ax, chosen in zip(axes, stack, strict=False):
            _panel(ax, chosen)
        for ax in axes[len(stack) :]:
            ax.set_axis_off()
    figure.suptitle("Time, as a multiple of fastgpt's in turn: right of the line, fastgpt is faster", fontsize=10)
    return _saved(figure, path)


def _panel(ax: Any, chosen: Sequence[Row]) -> None:
    values = [row.get("fastgpt_is", 1.0) for row in chosen]
    ranges = [
        (row.get("fastgpt_is_p20", v), row.get("fastgpt_is_p80", v)) for row, v in zip(chosen, values, strict=True)
    ]
    limit = min(max(1.25, 1.3 * max(values)), LONGEST)
    for at, (row, value, (low, high)) in enumerate(zip(chosen, values, ranges, strict=True)):
        color = BLUE if row["provider"] == OURS else LIGHT if row["provider"].startswith(OURS) else GRAY
        ax.barh(at, min(value, limit), color=color, height=0.7)
        if high > low and value < limit:
            ax.plot([max(low, 0.0), min(high, limit)], [at, at], color="black", lw=1)
        text = f"{row['ms']:.3g} ms" if row["provider"] == OURS else f"{value:.2f}x"
        inside = max(value, high) > 0.85 * limit
        place = 0.99 * limit if inside else max(value, high) + 0.015 * limit
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        ax.text(place, at, text, va="center", ha="right" if inside else "left", fontsize=8, bbox=box)
    ax.axvline(1.0, color="black", lw=0.8)
    ax.set_yticks(range(len(chosen)), [row["provider"] for row in chosen])
    ax.set_xlim(0, limit)
    ax.invert_yaxis()
    ax.set_title(f"{chosen[0]['benchmark']}: {chosen[0]['case']}", fontsize=9, loc="left")
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def roofline(rows: Sequence[Row], floors: Sequence[Row], path: Path) -> Path | None:
    """Achieved FLOP/s against FLOPs a byte, under the measured bandwidth and product rate."""
    copy = rate(floors, "copy")
    points = [row for row in rows if row["flops"] and row["read"] and not row["grows"] and "new_tokens" not in row]
    dtypes = {row["dtype"] for row in points}
    products = max((found for found in (rate(floors, "matmul", dtype) for dtype in dtypes) if found), default=None)
    if not copy or not products:
        return None
    figure = _figure(9, 5)
    ax = figure.add_subplot(xlabel="FLOPs a byte", ylabel="TFLOP/s", xscale="log", yscale="log")
    intensities = [row["flops"] / (row["read"] + row["written"]) for row in points]
    ridge = 1e3 * products / copy
    low, high = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    ax.plot([low, ridge, high], [low * copy / 1e3, products, products], color="black", lw=1, label="measured roof")
    names = list(dict.fromkeys(row["benchmark"] for row in points))
    for i, name in enumerate(names):
        for ours in (False, True):
            chosen = [
                (x, row["flops"] / row["ms"] / 1e9)
                for x, row in zip(intensities, points, strict=True)
                if row["benchmark"] == name and (row["provider"] == OURS) == ours
            ]
            if chosen:
                marker, label = ("osD^v"[i // 10], name) if ours else ("x", None)
                ax.plot(*zip(*chosen, strict=True), marker, ms=6 if ours else 4, color=f"C{i % 10}", label=label)
    ax.set_title(f"Roofline: {copy:,.0f} GB/s and {products:.3g} TFLOP/s as measured; crosses are peers", fontsize=10)
    ax.grid(alpha=0.3, which="both", lw=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    return _saved(figure, path)


def lines(series: Series, path: Path) -> Path | None:
    """Time against size with its 20th and 80th percentile, a panel a benchmark and size."""
    from matplotlib.ticker import NullLocator

    panels = list(dict.fromkeys((title, over) for title, over, _ in series))
    if not panels:
        return None
    crowded = max(sum((title, over) == panel for title, over, _ in series) for panel in panels) > 5
    columns = min(2 if crowded else 3, len(panels))
    count = -(-len(panels) // columns)
    figure = _figure((7.5 if crowded else 4.6) * columns, 3.4 * count)
    axes = figure.subplots(count, columns, squeeze=False).ravel()
    for ax, (title, over) in zip(axes, panels, strict=False):
        shown = {provider: points for (held, axis, provider), points in series.items() if (held, axis) == (title, over)}
        for provider, points in shown.items():
            sizes, times = [p.size for p in points], [p.ms for p in points]
            style = "o-" if len(ax.lines) < 10 else "s--"  # there are ten colours
            ax.plot(sizes, times, style, ms=3, lw=1, label=f"{provider}: {over}^{fit(points)[0]:.2f}")
            ax.fill_between(sizes, [p.p20 for p in points], [p.p80 for p in points], alpha=0.2, lw=0)
        ax.set(xscale="log", yscale="log", xlabel=over, ylabel="ms")
        ticks = _apart(sorted({p.size for points in shown.values() for p in points}))
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        low, high = ax.get_ylim()
        if high < 10 * low:  # a decade at least, so that noise doesn't look like growth
            middle = math.sqrt(low * high)
            ax.set_ylim(middle / math.sqrt(10), middle * math.sqrt(10))
        ax.set_title(title, fontsize=8, wrap=True)
        ax.grid(alpha=0.3, which="both", lw=0.3)
        ax.tick_params(labelsize=8)
        ax.legend(fontsize=7, **({"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if crowded else {}))
    for ax in axes[len(panels) :]:
        ax.remove()
    return _saved(figure, path)


def _apart(sizes: Sequence[float]) -> list[float]:
    """Those of `sizes` that are far enough from the one before for two labels."""
    kept = [sizes[0]]
    least = (sizes[-1] / sizes[0]) ** 0.09
    for size in sizes[1:]:
        if size >= least * kept[-1]:
            kept.append(size)
    return kept
