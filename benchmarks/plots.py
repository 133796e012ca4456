"""Plots of recorded rows: bars against peers, the roofline, growth on logarithmic axes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.floors import rate

Row = dict[str, Any]
Series = Mapping[tuple[str, str, str], Sequence[tuple[float, float]]]


def draw(rows: Sequence[Row], floors: Sequence[Row], series: Series, folder: Path) -> list[Path]:
    """The PNG files that the rows are enough for; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    timed = [row for row in rows if row["status"] == "ok" and "ms" in row]
    made = [
        bars(timed, folder / "peers.png"),
        roofline(timed, floors, folder / "roofline.png"),
        lines(series, folder / "growth.png"),
    ]
    return [path for path in made if path is not None]


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def bars(rows: Sequence[Row], path: Path) -> Path | None:
    """Time of each provider as a multiple of fastgpt's, one panel a benchmark at its first size."""
    panels = []
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        first = next(row for row in rows if row["benchmark"] == name)
        chosen = [row for row in rows if row["benchmark"] == name and row["case"] == first["case"]]
        if len(chosen) > 1 and any("fastgpt_is" in row for row in chosen):
            panels.append((name, first["case"], chosen))
    if not panels:
        return None
    figure = _figure(9, 1.2 + sum(0.9 + 0.3 * len(chosen) for _, _, chosen in panels))
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[1 + len(c) for _, _, c in panels])[:, 0]
    for ax, (name, case, chosen) in zip(axes, panels, strict=True):
        values = [row.get("fastgpt_is", 1.0) for row in chosen]
        colors = ["tab:blue" if row["provider"].startswith("fastgpt") else "tab:gray" for row in chosen]
        held = ax.barh([row["provider"] for row in chosen], values, color=colors)
        ax.bar_label(held, [f"{v:.2f}x" for v in values], padding=3, fontsize=8)
        ax.invert_yaxis()
        ax.set_title(f"{name}: {case}", fontsize=9)
        ax.set_xlim(0, 1.2 * max(values))
        ax.tick_params(labelsize=8)
    axes[-1].set_xlabel("time, as a multiple of fastgpt's in the same run")
    figure.savefig(path, format="png", dpi=110)
    return path


def roofline(rows: Sequence[Row], floors: Sequence[Row], path: Path) -> Path | None:
    """Achieved FLOP/s against FLOPs a byte, under the measured bandwidth and product rate."""
    copy, products = rate(floors, "copy"), rate(floors, "matmul")
    points = [row for row in rows if row["flops"] and row["read"] and not row["grows"] and "new_tokens" not in row]
    if not points or not copy or not products:
        return None
    figure = _figure(8, 5)
    ax = figure.add_subplot(xlabel="FLOPs a byte", ylabel="TFLOP/s", xscale="log", yscale="log")
    intensities = [row["flops"] / (row["read"] + row["written"]) for row in points]
    low, high = min(intensities) / 2, max(max(intensities) * 2, 2e3 * products / copy)
    ridge = 1e3 * products / copy
    ax.plot([low, ridge, high], [low * copy / 1e3, products, products], color="black", lw=1, label="measured roof")
    for name in dict.fromkeys(row["benchmark"] for row in points):
        for ours, marker in ((True, "o"), (False, "x")):
            chosen = [
                (x, row["flops"] / row["ms"] / 1e9)
                for x, row in zip(intensities, points, strict=True)
                if row["benchmark"] == name and (row["provider"] == "fastgpt") == ours
            ]
            if chosen:
                color = f"C{list(dict.fromkeys(r['benchmark'] for r in points)).index(name) % 10}"
                ax.plot(*zip(*chosen, strict=True), marker, ms=5, color=color, label=name if ours else None)
    ax.set_title("Roofline (circles fastgpt, crosses peers)", fontsize=10)
    ax.grid(alpha=0.3, which="both", lw=0.3)
    ax.legend(fontsize=7)
    figure.savefig(path, format="png", dpi=110)
    return path


def lines(series: Series, path: Path) -> Path | None:
    """Time against size, a panel a benchmark and size."""
    panels = list(dict.fromkeys((title, over) for title, over, _ in series))
    if not panels:
        return None
    columns = min(3, len(panels))
    count = -(-len(panels) // columns)
    figure = _figure(4.2 * columns, 3.2 * count)
    axes = figure.subplots(count, columns, squeeze=False).ravel()
    for ax, (title, over) in zip(axes, panels, strict=False):
        for (held, axis, provider), points in series.items():
            if (held, axis) == (title, over):
                ax.plot(*zip(*points, strict=True), "o-", ms=3, lw=1, label=provider)
        ax.set(xscale="log", yscale="log", xlabel=over, ylabel="ms")
        ax.set_title(title, fontsize=7)
        ax.grid(alpha=0.3, which="both", lw=0.3)
        ax.legend(fontsize=6)
    for ax in axes[len(panels) :]:
        ax.remove()
    figure.savefig(path, format="png", dpi=110)
    return path
