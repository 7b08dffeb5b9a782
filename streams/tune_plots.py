"""Pictures of a study: what compute buys, and which offline ratio to take."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wakesleep.streams.plots import BLUE, DPI, GREY, INK, ORANGE, SIZE, wilson
from wakesleep.streams.tune_config import TuneConfig
from wakesleep.streams.tune_report import RATIO, Report, Result, cost_of
from wakesleep.ttl.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ISO_LINES = 5


def draw_study(folder: Path, config: TuneConfig, report: Report) -> list[Path]:
    """Draw compute.png, and ratio.png if ratios were tried; returns the pictures."""
    figures = {"compute.png": compute_figure(config, report)}
    if len(config.search.get(RATIO, [])) > 1:
        figures["ratio.png"] = ratio_figure(config, report)
    for name, figure in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=DPI)
        write_atomically(folder / name, picture.getvalue())
    return [folder / name for name in figures]


def compute_figure(config: TuneConfig, report: Report) -> Figure:
    """Left: the goal over all FLOPs, with the front. Right: awake against asleep, if any slept."""
    wake = np.array([r["wake_flops"] / 1e6 for r in report.results])
    sleep = np.array([r["sleep_flops"] / 1e6 for r in report.results])
    figure, (left, *rest) = _figure(2 if sleep.any() else 1)
    x = np.array([cost_of(r) / 1e6 for r in report.results])
    y, reach = _goals(config, report.results)
    left.errorbar(x, y, reach, fmt="o", color=GREY, ms=4, elinewidth=0.8, capsize=2)
    front_y, _ = _goals(config, report.front)
    front_x = [cost_of(r) / 1e6 for r in report.front]
    look = {"color": BLUE, "ms": 5, "lw": 1.6, "zorder": 4}
    left.plot(front_x, front_y, "o-", label="nothing beats these", **look)
    first_y, _ = _goals(config, [report.first])
    at = cost_of(report.first) / 1e6
    left.plot(at, first_y[0], "D", color=ORANGE, ms=7, zorder=5, label="first")
    left.set_xlabel("MFLOP per token" + (", awake and asleep" if rest else ""))
    left.set_ylabel(_label(config))
    left.set_title("What compute buys", loc="left")
    left.legend(frameon=False, fontsize=9, loc="best")
    for right in rest:
        dots = right.scatter(wake, sleep, c=y, cmap="viridis", s=40, zorder=3)
        figure.colorbar(dots, ax=right, label=_label(config))
        _iso_compute(right, wake, sleep)
        right.set_xlabel("MFLOP per token awake")
        right.set_ylabel("MFLOP per token asleep")
        right.set_title("Dashed: equal compute", loc="left")
    return figure


def ratio_figure(config: TuneConfig, report: Report) -> Figure:
    """The goal over the offline ratio: a grey line per setting of the rest, blue the best."""
    figure, (ax,) = _figure(1)
    ratios = sorted({float(r["values"][RATIO]) for r in report.results})
    places = {ratio: place for place, ratio in enumerate(ratios)}
    x = np.array([places[float(r["values"][RATIO])] for r in report.results])
    y, reach = _goals(config, report.results)
    others = [{**r["values"], RATIO: None} for r in report.results]
    for index, setting in enumerate(others):
        if others.index(setting) == index:
            mine = np.flatnonzero([other == setting for other in others])
            mine = mine[x[mine].argsort()]
            ax.plot(x[mine], y[mine], "o-", color=GREY, ms=3, lw=0.8)
    # results come best first, so the first of each ratio is its best
    best = np.array([np.flatnonzero(x == place)[0] for place in range(len(ratios))])
    look = {"color": BLUE, "ms": 6, "lw": 1.8, "elinewidth": 1, "capsize": 4, "zorder": 4}
    label = "best of each ratio, with its 95 % interval"
    label = "best of each ratio" if config.goal == "bits_per_byte" else label
    ax.errorbar(x[best], y[best], reach[:, best], fmt="o-", label=label, **look)
    ax.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
    ax.set_xlabel("offline ratio (FLOPs of sleep per FLOP of reading)")
    ax.set_ylabel(_label(config))
    ax.set_title("Which ratio to take", loc="left")
    ax.legend(frameon=False, fontsize=9)
    return figure


def _goals(config: TuneConfig, results: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    """The goal as people read it [n], and how far its interval reaches [2, n]."""
    if config.goal == "bits_per_byte":
        bits = [(r["bits_per_byte"], r["bits_by_seed"]) for r in results]
        rows = [(mean, min(each), max(each)) for mean, each in bits]
        factor = 1.0
    else:
        rows = [(r["recall"][0] / r["recall"][1], *wilson(*r["recall"])) for r in results]
        factor = 100.0
    y, low, high = factor * np.array(rows).T
    return y, np.array([np.maximum(y - low, 0), np.maximum(high - y, 0)])


def _label(config: TuneConfig) -> str:
    return "bits per byte" if config.goal == "bits_per_byte" else "facts answered right (%)"


def _iso_compute(ax: Axes, wake: np.ndarray, sleep: np.ndarray) -> None:
    """Lines of equal compute through the middle of what was measured."""
    ax.margins(0.12)
    ax.autoscale_view()
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    totals = np.linspace((wake + sleep).min(), (wake + sleep).max(), ISO_LINES)
    for total in np.unique(totals.round(6)):
        ax.plot([x0, x1], [total - x0, total - x1], "--", color=INK, lw=0.6, alpha=0.5)
    ax.set_xlim(x0, x1)
    ax.set_ylim(y0, y1)


def _figure(columns: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    width = SIZE[0] * (1.3 if columns > 1 else 1)
    figure = Figure(figsize=(width, SIZE[1]), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e4e4e4", lw=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(colors=INK, labelsize=9)
    return figure, axes
