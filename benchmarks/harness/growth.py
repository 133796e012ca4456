"""How time grows with a size: series among recorded rows, and the exponent of the power law through each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]


class Point(NamedTuple):
    size: float
    ms: float
    p20: float
    p80: float


Series = dict[tuple[str, str, str], list[Point]]


def fit(points: Sequence[Point]) -> tuple[float, float]:
    """The exponent of the power law through (size, time) by least squares on logarithms, and its standard error."""
    xs, ys = [math.log(point.size) for point in points], [math.log(point.ms) for point in points]
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    exponent = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    left = sum((y - mean_y - exponent * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    return exponent, math.sqrt(left / (len(points) - 2) / spread)


def power(over: str, points: Sequence[Point]) -> str:
    exponent, error = fit(points)
    return f"{over}^{exponent:.2f} ± {error:.2f}"


def growth(rows: Sequence[Row]) -> Series:
    """(benchmark and fixed sizes, what grows, provider) -> points in order, wherever three rows or more differ in one size."""
    series: dict[tuple[str, str, str], dict[float, Point]] = {}
    for row in rows:
        if row["status"] != "ok" or "ms" not in row:
            continue
        for over, value in row["size"].items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                fixed = " ".join(f"{k}={v}" for k, v in row["size"].items() if k != over)
                title = " ".join(part for part in (row["benchmark"], fixed, row["dtype"], row["mode"]) if part)
                point = Point(value, row["ms"], row["p20"], row["p80"])
                series.setdefault((title, over, row["provider"]), {})[value] = point
    return {key: [held[size] for size in sorted(held)] for key, held in series.items() if len(held) >= 3}
