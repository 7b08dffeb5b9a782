"""The picture of a benchmark: how we compare, and how time and memory grow with what was read."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wakesleep.streams.bench_models import ATTENTION, OURS
from wakesleep.streams.bench_rows import Row
from wakesleep.streams.plots import BLUE, DPI, GREY, INK, ORANGE
from wakesleep.streams.quantities import rounded, size
from wakesleep.ttl.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (11.0, 8.0)  # inches
COLOURS = {OURS: BLUE, ATTENTION: ORANGE}


def draw_bench(path: Path, rows: Sequence[Row]) -> None:
    """Draw the rows into a PNG."""
    picture = io.BytesIO()
    bench_figure(rows).savefig(picture, format="png", dpi=DPI)
    write_atomically(path, picture.getvalue())


def bench_figure(rows: Sequence[Row]) -> Figure:
    """Above: our speed over that of others. Below: what grows with the stream, dashed beyond."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    _bars(above.subplots(), compared(rows))
    growth = [row for row in rows if row["operation"] == "growth" and row["tokens_per_second"]]
    decode = [row for row in rows if row["operation"] == "decode" and row["tokens_per_second"]]
    panels = below.subplots(1, 3)
    _curves(panels[0], growth, _milliseconds, "Reading: ms per token")
    _curves(panels[1], growth, lambda row: row["peak_bytes"], "Peak memory")
    panels[1].yaxis.set_major_formatter(lambda value, _: size(value))
    _curves(panels[2], decode, _milliseconds, "Decoding: ms per token")
    return figure


def compared(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """What ours is over what: a label and the ratio, where the two are different things."""
    found = []
    for row in rows:
        to = row["ratio_to"]
        if to and row["implementation"].startswith(OURS) and to["implementation"] != OURS:
            parts = [row["operation"], row["case"], row["implementation"].removeprefix(OURS)]
            label = " ".join(part.strip(" ,") for part in parts if part)
            found.append((f"{label}\nover {to['implementation']}", to["ratio"]))
    return found


def _bars(ax: Axes, ratios: Sequence[tuple[str, float]]) -> None:
    _frame(ax, "x")
    ax.set_title("Our speed over that of others (right of 1 is faster)", loc="left")
    if not ratios:
        _nothing(ax)
        return
    places = range(len(ratios))
    values = [ratio for _, ratio in ratios]
    colours = [BLUE if ratio >= 1 else GREY for ratio in values]
    # from 1, not from 0: on a logarithmic axis a bar has no other beginning
    ax.barh(places, [v - 1 for v in values], left=1, color=colours, height=0.62)
    ax.set_xscale("log")
    ax.axvline(1, color=INK, lw=1)
    for place, value in zip(places, values, strict=True):
        side = 1 if value >= 1 else -1
        at = {"ha": "left" if side > 0 else "right", "va": "center", "fontsize": 9}
        ax.annotate(f"{value:.2f}", (value, place), (4 * side, 0), textcoords="offset points", **at)
    ax.set_yticks(places, [label for label, _ in ratios], fontsize=7.5)
    ax.invert_yaxis()
    ax.set_xlim(min(0.3, *values) / 1.5, max(3, *values) * 1.5)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[-1] in "25" else "")


def _curves(ax: Axes, rows: Sequence[Row], value: Callable[[Row], float], title: str) -> None:
    """One curve per implementation over what was read; hollow and dashed where extrapolated."""
    from matplotlib.ticker import LogLocator, NullFormatter

    _frame(ax, "both")
    ax.set_title(title, loc="left")
    rows = [row for row in rows if value(row)]  # a logarithmic axis has no 0
    if not rows:
        _nothing(ax)
        return
    for name, colour in COLOURS.items():
        mine = [row for row in rows if row["implementation"] == name]
        sure = [row for row in mine if not row.get("extrapolated")]
        look = {"color": colour, "marker": "o", "ms": 4}
        ax.plot(*_points(sure, value), "-", lw=1.8, label=name, **look)
        if len(sure) < len(mine):
            ax.plot(*_points(mine[len(sure) - 1 :], value), "--", lw=1.2, mfc="white", **look)
            ax.plot(*_points(sure[-1:], value), **look)
    if any(row.get("extrapolated") for row in rows):
        ax.plot([], [], "--", color=INK, lw=1.2, label="extrapolated")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("tokens read before")
    ax.xaxis.set_major_formatter(lambda at, _: rounded(at))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda at, _: f"{at:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    low, high = ax.get_ylim()
    ax.set_ylim(low / 1.5, high * 1.5)
    ax.legend(frameon=False, fontsize=8)


def _points(rows: Sequence[Row], value: Callable[[Row], float]) -> tuple[list, list]:
    return [row["position"] for row in rows], [value(row) for row in rows]


def _milliseconds(row: Row) -> float:
    return 1000 / row["tokens_per_second"]


def _nothing(ax: Axes) -> None:
    ax.text(0.5, 0.5, "not measured", ha="center", color=GREY, transform=ax.transAxes)
    ax.set_xticks([])
    ax.set_yticks([])


def _frame(ax: Axes, grid: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="#e4e4e4", lw=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(colors=INK, labelsize=9)
