"""Pictures of a session: how reading went, what is still known, and what the store holds.

Each picture has a function that works out its numbers and one that draws them. matplotlib is
imported where a figure is made, without pyplot: no window, no global state.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from wakesleep.streams.quantities import count, rounded
from wakesleep.streams.results import Fact, by_decade, by_training, decade_name
from wakesleep.ttl.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, INK = "#2660a4", "#c4661f", "#9a9a9a", "#222222"  # told apart in print too
SHADES = ("#2660a4", "#7fa9d6", "#c4661f", "#e6b08a")  # one per layer, and again
CURVES = (("bits_per_byte", "bits per byte", BLUE), ("surprise", "surprise", ORANGE))
STORE = re.compile(r"blocks\.(\d+)\.store\.position$")  # a tensor of a snapshot
SIZE = (8.0, 4.5)  # inches
DPI = 130
BINS = 100  # of the stream, in the picture of the store
SMOOTHED_FROM = 80  # points of a curve; from here on a running mean is drawn over them
Z95 = 1.959964  # two-sided 95 % point of the normal distribution


class Recall(NamedTuple):
    """Share of right answers in one decade of age, with its 95 % interval."""

    decade: int
    right: int
    asked: int
    low: float
    high: float


def draw_plots(folder: Path) -> list[Path]:
    """Draw everything that the files of a session allow; return the pictures, in the folder.

    Reads `metrics.jsonl`, `summary.json` and the snapshot that `session.json` names.
    """
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    state = folder / json.loads((folder / "session.json").read_text(encoding="utf-8"))["state"]
    figures = {
        "reading.png": reading_figure([json.loads(line) for line in lines], summary["resumed_at"])
    }
    if summary["facts"]:
        figures["recall.png"] = recall_figure(*map(recall_by_age, by_training(summary["facts"])))
    if held := stored_positions(state):
        planted = [summary["tokens"] - fact["age_tokens"] for fact in summary["facts"]]
        figures["store.png"] = store_figure(held, summary["tokens"], planted)
    for name, figure in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=DPI)
        write_atomically(folder / name, picture.getvalue())
    return [folder / name for name in figures]


def stored_positions(state: Path) -> dict[int, np.ndarray]:
    """Positions that the stores of a snapshot hold, by layer; all heads and lanes together."""
    from safetensors import safe_open

    held = {}
    with safe_open(state, framework="numpy") as file:
        for name in file.keys():
            if store := STORE.search(name):
                positions = file.get_tensor(name).ravel()
                held[int(store[1])] = positions[positions >= 0]
    return dict(sorted(held.items()))


def recall_by_age(facts: Sequence[Fact]) -> list[Recall]:
    """Recall per decade of age, youngest first, with Wilson's interval."""
    return [
        Recall(power, right, asked, *wilson(right, asked))
        for power, (right, asked) in by_decade(facts).items()
    ]


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927); it stays inside 0..1 and is honest at both ends."""
    share, z = right / asked, Z95**2 / asked
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(share * (1 - share) * z + z * z / 4) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a 25th of the curve, narrower at its ends."""
    half = max(1, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    here = np.arange(len(values))
    low, high = np.maximum(here - half, 0), np.minimum(here + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def curve_of(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions and values of one key of the metrics, where it was measured."""
    known = [line for line in lines if line.get(key) is not None]
    return (
        np.array([line["tokens"] for line in known], float),
        np.array([line[key] for line in known], float),
    )


def reading_figure(lines: Sequence[Mapping[str, Any]], resumed_at: Sequence[int] = ()) -> Figure:
    """Bits per byte above surprise, over the position in the stream; dotted where it resumed."""
    rows = [
        (label, colour, *curve)
        for key, label, colour in CURVES
        if len((curve := curve_of(lines, key))[0])
    ]
    figure, axes = _figure(rows=max(1, len(rows)))
    for ax, (label, colour, x, y) in zip(axes, rows, strict=False):
        smooth = len(y) >= SMOOTHED_FROM
        mark = "o" if len(y) == 1 else None
        ax.plot(
            x, y, marker=mark, color=colour, lw=0.6 if smooth else 1.6, alpha=0.35 if smooth else 1
        )
        if smooth:
            ax.plot(x, running_mean(y), color=colour, lw=1.8)
        ax.vlines(
            resumed_at,
            0,
            1,
            colors=GREY,
            lw=1,
            ls=":",
            transform=ax.get_xaxis_transform(),
            label="resumed",
        )
        ax.set_ylabel(label)
        ax.set_xlim(0, x[-1])
    if resumed_at:
        _legend(axes[0])
    axes[0].set_title("How well the stream was predicted (lower is better)", loc="left")
    _positions(axes[-1])
    return figure


def recall_figure(trained: Sequence[Recall], held_out: Sequence[Recall] = ()) -> Figure:
    """Recall over age, a point per decade at its middle, with interval and number asked.

    Families of facts that training holds out are a curve of their own.
    """
    figure, (ax,) = _figure()
    curves = [("kinds of facts in training", BLUE, trained), ("held out of it", GREY, held_out)]
    curves = [curve for curve in curves if curve[2]]
    for label, colour, recalls in curves:
        _recall_curve(ax, label, colour, recalls)
    decades = sorted({recall.decade for *_, recalls in curves for recall in recalls})
    ax.set_xscale("log")
    ax.set_xlim(10 ** decades[0], 10 ** (decades[-1] + 1))
    ax.set_xticks([10 ** (d + 0.5) for d in decades], [decade_name(d) for d in decades])
    ax.minorticks_off()
    ax.set_ylim(-3, 112)
    ax.set_yticks(range(0, 101, 20))
    ax.set_xlabel("age of the fact when it was asked (tokens)")
    ax.set_ylabel("planted facts answered right (%)")
    ax.set_title("What is still known (bars: 95 % interval)", loc="left")
    if len(curves) > 1:
        _legend(ax)
    return figure


def _recall_curve(ax: Axes, label: str, colour: str, recalls: Sequence[Recall]) -> None:
    x = [10 ** (recall.decade + 0.5) for recall in recalls]
    share = np.array([recall.right / recall.asked for recall in recalls])
    reach = np.abs([share - [r.low for r in recalls], [r.high for r in recalls] - share])
    look = {"color": colour, "label": label, "marker": "o", "lw": 1.8}
    ax.errorbar(x, 100 * share, 100 * reach, elinewidth=1, capsize=4, **look)
    for recall, at, y in zip(recalls, x, 100 * share, strict=True):
        text = f"{recall.right} of {recall.asked}"
        ax.annotate(text, (at, y), (8, 8), textcoords="offset points", color=colour)


def store_counts(held: Mapping[int, np.ndarray], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges [BINS + 1] of equal stretches of the stream, and places held in each [layer, BINS]."""
    edges = np.linspace(0, max(tokens, 1), BINS + 1)
    return edges, np.array([np.histogram(positions, edges)[0] for positions in held.values()])


def store_figure(
    held: Mapping[int, np.ndarray], tokens: int, planted: Sequence[int] = ()
) -> Figure:
    """Places of the store by the position that they hold, stacked by layer; ticks: facts."""
    figure, (ax,) = _figure()
    edges, counts = store_counts(held, tokens)
    bottom = np.zeros(BINS)
    for number, (layer, row) in enumerate(zip(held, counts, strict=True)):
        colour = SHADES[number % len(SHADES)]
        ax.stairs(
            bottom + row, edges, baseline=bottom, fill=True, color=colour, label=f"layer {layer}"
        )
        bottom = bottom + row
    if planted:
        marks = ax.get_xaxis_transform()
        ax.plot(
            planted,
            [-0.015] * len(planted),
            "|",
            color=INK,
            ms=7,
            transform=marks,
            clip_on=False,
            label="planted fact",
        )
        ax.tick_params(axis="x", pad=9)
    ax.set_xlim(0, edges[-1])
    ax.set_ylim(0, max(1, bottom.max()) * 1.08)
    ax.yaxis.get_major_locator().set_params(integer=True)
    total = sum(len(positions) for positions in held.values())
    ax.set_ylabel(f"places held per {count(edges[1])} tokens")
    ax.set_title(f"Where the {total:,} stored pairs come from", loc="left")
    _legend(ax)
    _positions(ax)
    return figure


def _figure(rows: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """An empty figure of `rows` axes that share their positions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e4e4e4", lw=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(colors=INK, labelsize=9)
    return figure, axes


def _legend(ax: Axes) -> None:
    """On the line of the title, where it covers nothing."""
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=8, fontsize=9)


def _positions(ax: Axes) -> None:
    ax.set_xlabel("position in the stream (tokens)")
    ax.xaxis.set_major_formatter(lambda value, _: rounded(value))
