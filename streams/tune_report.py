"""What a study came to: a table, settings to take, and what the next FLOP is worth where."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wakesleep.streams.config import as_dict
from wakesleep.streams.plots import Z95, wilson
from wakesleep.streams.quantities import count, size
from wakesleep.streams.tune_config import TuneConfig
from wakesleep.streams.tuning import goal_of
from wakesleep.ttl.files import write_atomically

Result = Mapping[str, Any]
RATIO, PASSES = "sleep.offline_ratio", "sleep.passes"
PARTS = ("sleep", "store", "window")  # whose FLOPs can be bought apart


class Worth(NamedTuple):
    """What one more MFLOP per token is worth in one part, by a straight line through all rows."""

    part: str
    gain: float  # of the goal
    low: float  # 95 % interval
    high: float


class Report(NamedTuple):
    results: list[Result]  # best first
    front: list[Result]  # those that none beats in goal and FLOPs at once, cheapest first
    best: Result  # the highest goal
    cheaper: Result  # the least FLOPs that reach the goal of the first setting
    better: Result  # the highest goal for no more FLOPs than those of the first setting
    first: Result
    worth: list[Worth]
    saturation: int | None  # passes from which on more gain nothing, None if they were not varied


def make_report(config: TuneConfig, results: Sequence[Result]) -> Report:
    """Rank what was measured; the first setting of the search is what all are compared with."""

    def rank(result: Result) -> tuple[float, float]:
        return -goal_of(config, result), cost_of(result)

    ordered = sorted(results, key=rank)
    values = {key: choices[0] for key, choices in config.search.items()}
    first = next(result for result in results if result["values"] == as_dict(values))
    front: list[Result] = []
    for result in sorted(results, key=lambda r: (cost_of(r), -goal_of(config, r))):
        if not front or goal_of(config, result) > goal_of(config, front[-1]):
            front.append(result)
    goal = goal_of(config, first)
    return Report(
        results=ordered,
        front=front,
        best=ordered[0],
        cheaper=next(r for r in front if goal_of(config, r) >= goal),
        better=[r for r in front if cost_of(r) <= cost_of(first)][-1],
        first=first,
        worth=worth_of(config, results),
        saturation=_saturation(config, results),
    )


def cost_of(result: Result) -> float:
    """FLOPs per token, awake and asleep."""
    return result["wake_flops"] + result["sleep_flops"]


def worth_of(config: TuneConfig, results: Sequence[Result]) -> list[Worth]:
    """Least squares of the goal on the MFLOP per token of each part that was varied."""
    table = np.array([[r[f"{part}_flops"] / 1e6 for part in PARTS] for r in results])
    varied = [i for i in range(len(PARTS)) if np.ptp(table[:, i]) > 1e-9]
    free = len(results) - len(varied) - 1
    if not varied or free < 1:
        return []
    x = np.column_stack([np.ones(len(results)), table[:, varied]])
    y = np.array([goal_of(config, r) for r in results])
    gains, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    if rank < x.shape[1]:
        return []  # parts that were only varied together cannot be told apart
    left = float(((y - x @ gains) ** 2).sum()) / free
    reach = Z95 * np.sqrt(left * np.linalg.inv(x.T @ x).diagonal())
    return [
        Worth(PARTS[i], float(gain), float(gain - half), float(gain + half))
        for i, gain, half in zip(varied, gains[1:], reach[1:], strict=True)
    ]


def _saturation(config: TuneConfig, results: Sequence[Result]) -> int | None:
    """The least number of passes that does as well as the best within an error over the seeds."""
    groups: dict[int, list[list[float]]] = {}
    by_seed = "bits_by_seed" if config.goal == "bits_per_byte" else "recall_by_seed"
    for result in results:
        if result["values"].get(PASSES) is not None:
            goals = [_signed(config, goal) for goal in result[by_seed]]
            groups.setdefault(result["values"][PASSES], []).append(goals)
    if len(groups) < 2:
        return None
    means = {passes: np.mean(goals, axis=0) for passes, goals in groups.items()}  # of each seed
    best = max(means.values(), key=np.mean)
    return min(passes for passes, mean in means.items() if _as_good(best - mean))


def _as_good(lost: np.ndarray) -> bool:
    """Whether what is lost in each seed is within its standard error; of one seed nothing is."""
    error = np.std(lost, ddof=1) / math.sqrt(len(lost)) if len(lost) > 1 else 0.0
    return bool(np.mean(lost) <= error)


def write_report(folder: Path, config: TuneConfig, report: Report) -> list[Path]:
    """Write table.md, results.json, and the settings to take; returns the files."""
    names = ("best", "cheaper", "better")
    files = {"table.md": markdown(config, report).encode()}
    text = json.dumps(as_data(report), indent=1, allow_nan=False)
    files["results.json"] = text.encode() + b"\n"
    for name in names:
        files[f"{name}.yaml"] = settings_yaml(config, getattr(report, name)).encode()
    for name, text in files.items():
        write_atomically(folder / name, text)
    return [folder / name for name in files]


def as_data(report: Report) -> dict[str, Any]:
    """The report for programs."""
    return report._asdict() | {"worth": [worth._asdict() for worth in report.worth]}


def settings_yaml(config: TuneConfig, result: Result) -> str:
    """The keys of a setting, for `--config` of `wakesleep stream` and `wakesleep sleep`."""
    given = config.kept | result["values"]
    lines = [f"{key}: {json.dumps(as_dict(value))}" for key, value in given.items()]
    return "".join(f"{line}\n" for line in lines)


def markdown(config: TuneConfig, report: Report) -> str:
    """All settings, best first, and what follows from them."""
    keys = list(config.search)
    heads = ["", *keys, "state", "MFLOP/token awake", "asleep", "recall", "deep recall"]
    heads += ["forgetting", "bits per byte", "pause p95 (s)", "tokens/s"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for result in report.results:
        lines.append("| " + " | ".join(_cells(report, keys, result)) + " |")
    streams = f"{len(config.seeds)} stream{'s' if len(config.seeds) > 1 else ''}"
    lines += ["", f"{streams} of {count(config.tokens)} tokens per setting. "]
    lines[-1] += "Brackets: 95 % intervals of the share (Wilson), lowest and highest of the seeds. "
    lines[-1] += "Deep: the oldest third of the facts. Forgetting: the youngest third less these."
    lines += ["", *(f"- {line}" for line in conclusions(config, report))]
    return "\n".join(lines) + "\n"


def conclusions(config: TuneConfig, report: Report) -> list[str]:
    """What to take, in words."""
    unit = "bits per byte" if config.goal == "bits_per_byte" else "of the facts"
    lines = []
    for name in ("best", "cheaper", "better"):
        result = getattr(report, name)
        values = ", ".join(f"{k}={json.dumps(v)}" for k, v in result["values"].items())
        lines.append(f"{name}.yaml: {values}: {_goal_words(config, result)}")
    for worth in report.worth:
        gain, low, high = (_signed(config, g) for g in worth[1:])
        low, high = sorted((low, high))
        lines.append(
            f"one more MFLOP per token in {worth.part}: {gain:+.3f} {unit} ({low:+.3f} to "
            f"{high:+.3f})"
        )
    if report.saturation is not None:
        lines.append(f"more than {report.saturation} passes gain nothing that can be told apart")
    return lines


def _signed(config: TuneConfig, goal: float) -> float:
    return -goal if config.goal == "bits_per_byte" else goal


def _goal_words(config: TuneConfig, result: Result) -> str:
    goal = _signed(config, goal_of(config, result))
    words = f"{goal:.3f} bits per byte" if config.goal == "bits_per_byte" else f"recall {goal:.1%}"
    return f"{words} at {cost_of(result) / 1e6:.2f} MFLOP per token"


def _cells(report: Report, keys: Sequence[str], result: Result) -> list[str]:
    marks = [name for name in ("best", "cheaper", "better") if getattr(report, name) is result]
    marks += ["first"] if result is report.first else []
    young, deep = (_share(result[name]) for name in ("young", "deep"))
    bits = result["bits_by_seed"]
    return [
        ", ".join(marks),
        *(json.dumps(result["values"][key]) for key in keys),
        size(result["state_bytes"]),
        f"{result['wake_flops'] / 1e6:.2f}",
        f"{result['sleep_flops'] / 1e6:.2f}",
        _interval(result["recall"]),
        _interval(result["deep"]),
        "" if young is None else f"{young - deep:+.1%}",
        f"{result['bits_per_byte']:.3f} ({min(bits):.3f} to {max(bits):.3f})" if bits else "",
        f"{result['pause_p95']:.2f}",
        f"{result['tokens'] / result['seconds']:,.0f}" if result["seconds"] else "",
    ]


def _share(counts: Sequence[int]) -> float | None:
    right, asked = counts
    return right / asked if asked else None


def _interval(counts: Sequence[int]) -> str:
    right, asked = counts
    if not asked:
        return ""
    low, high = wilson(right, asked)
    return f"{right / asked:.1%} ({low:.0%} to {high:.0%} of {asked})"
