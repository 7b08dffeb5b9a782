"""The rows of a benchmark: how they come out of what was timed, and what follows from several."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from wakesleep.streams.bench_cases import Entry, Group, peer_of
from wakesleep.streams.bench_config import BenchConfig
from wakesleep.streams.bench_growth import extrapolate
from wakesleep.streams.bench_models import ATTENTION, OURS
from wakesleep.streams.quantities import rounded

Row = dict[str, Any]


def make_row(group: Group, entry: Entry, values: Mapping[str, Any]) -> Row:
    """A row with the promised keys, null where there is no number, and some more."""
    values = dict(values)
    rates = values.pop("rates", [])
    usable = rates if values.get("finite", True) and values.get("equal") else []
    row = {
        "operation": group.operation,
        "implementation": entry.implementation,
        "case": entry.case,
        "equal": values.pop("equal", None),
        "tokens_per_second": statistics.median(usable) if usable else None,
        "low": min(usable, default=None),
        "high": max(usable, default=None),
        "peak_bytes": values.pop("peak_bytes", None),
        "ratio_to": None,
        "group": group.name,
        **values,
    }
    if row["equal"] is False:
        row["peak_bytes"] = None
    return row | ({"position": entry.size} if entry.size else {})


def add_ratios(rows: Mapping[Entry, Row], found: Mapping[Entry, Any], group: Group) -> None:
    """Compare everything with the fastest reference: medians of the ratios of single rounds."""
    timed = [entry for entry in group.references if rows[entry]["tokens_per_second"]]
    if not timed:
        return
    reference = max(timed, key=lambda entry: rows[entry]["tokens_per_second"])
    theirs = found[reference]["rates"]
    for entry, row in rows.items():
        if entry == reference or not row["tokens_per_second"]:
            continue
        ours = found[entry]["rates"]
        if len(ours) == len(theirs):
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        else:
            ratio = row["tokens_per_second"] / rows[reference]["tokens_per_second"]
        row["ratio_to"] = _ratio_to(rows[reference], ratio)


def completed(measured: list[Row], config: BenchConfig) -> list[Row]:
    """The rows with bytes per token of long calls, and with extrapolated ones behind them."""
    rows = [dict(row) for row in measured]
    for row in rows:
        half = _half(rows, row) if row["operation"] == "one-shot" else None
        if half:
            more = row["peak_bytes"] - half["peak_bytes"]
            row["bytes_per_token"] = more / (row["position"] - half["position"])
    for name in (OURS, ATTENTION):
        grown = [
            row for row in rows if (row["operation"], row["implementation"]) == ("growth", name)
        ]
        if grown:
            behind = rows.index(grown[-1]) + 1
            rows[behind:behind] = _beyond([row for row in grown if _is_whole(row)], config)
    return rows


def _beyond(measured: list[Row], config: BenchConfig) -> list[Row]:
    """Rows of one implementation at the positions behind the last one that was measured."""
    if not measured or (len(measured) == 1 and measured[0]["implementation"] == ATTENTION):
        return []  # one point makes no line
    name, first, rows = measured[0]["implementation"], measured[0], []
    for position in config.positions:
        if position > measured[-1]["position"]:
            entry = Entry(name, f"after {rounded(position)}", position)
            row = make_row(Group("growth", first["group"], (), ()), entry, {})
            row |= extrapolate(measured, position, straight=name == ATTENTION)
            ratio = row["tokens_per_second"] / first["tokens_per_second"]
            rows.append(row | {"ratio_to": _ratio_to(first, ratio)})
    return rows


def faults_of(rows: list[Row]) -> list[str]:
    """What makes a benchmark fail: something of ours that is unequal or not finite, or a crash."""
    faults = []
    for row in rows:
        ours = peer_of(row["implementation"]) is None
        what = row.get("failed") or (row["equal"] is False and f"not timed: {row['check']}")
        if not what and ours and not row.get("finite", True):
            what = "not finite"
        if what and (ours or "failed" in row):
            faults.append(f"{row['operation']}, {row['implementation']}, {row['case']}: {what}")
    return faults


def _ratio_to(row: Row, ratio: float) -> Row:
    return {"implementation": row["implementation"], "case": row["case"], "ratio": ratio}


def _is_whole(row: Row) -> bool:
    return bool(row["tokens_per_second"]) and row["peak_bytes"] is not None


def _half(rows: list[Row], row: Row) -> Row | None:
    """The row of the same implementation with a call of half the length."""
    return next(
        (
            other
            for other in rows
            if other["operation"] == row["operation"]
            and other["implementation"] == row["implementation"]
            and other["position"] < row["position"]
            and other["peak_bytes"] is not None is not row["peak_bytes"]
        ),
        None,
    )
