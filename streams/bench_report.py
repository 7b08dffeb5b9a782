"""A benchmark as tables: aligned for a terminal, in Markdown for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wakesleep.streams.bench_rows import Row
from wakesleep.streams.quantities import count, size

HEADS = ("case", "implementation", "tokens/s", "low to high", "ms/token", "speed", "peak memory")
ABOUT = {
    "memory-streaming": "a memory layer reads a stream in calls with carried state, float32",
    "memory-training": "forward and backward pass of a memory layer over one sequence, float32",
    "model-streaming": "a model reads the document as `wakesleep stream` does, its store full; "
    "full attention in calls of 256 tokens behind a context of noise",
    "model-training": "a step of `wakesleep train`, optimiser included, the store full",
    "mac-prefill": "one call of a model that has read nothing, float32",
    "mac-decode": "single tokens behind that call, float32",
    "decode": "single tokens, each a call of its own; far into a stream the position is set in a "
    "state whose store is full, full attention looks back on noise",
    "one-shot": "one long call of a model that has read nothing",
    "growth": "speed since the mark before, and the peak so far, of one stream that is read; full "
    "attention behind a context of noise; ~ is extrapolated",
}
SPEED = "speed: of the named one in the same turns (growth, decode: of the first row)"
PEAK = "peak memory: in a process of its own, what it held with torch loaded taken off"


def as_text(rows: Sequence[Row]) -> str:
    """All tables for a terminal."""
    lines = []
    for operation, mine in by_operation(rows).items():
        table = [HEADS, *map(cells_of, mine)]
        full = [row for row in table if len(row) == len(HEADS)]
        widths = [max(len(r[i]) for r in (table if i < 2 else full)) for i in range(len(HEADS))]
        lines.append(f"{operation}: {ABOUT[operation]}")
        lines += ["  " + _aligned(row, widths) for row in table]
        lines.append("")
    return "\n".join([*lines, SPEED, PEAK])


def as_markdown(data: Mapping[str, Any], command: str) -> str:
    """The whole page: what was measured where, the tables, what was checked, page faults.

    Args:
        data: the object that --json prints.
        command: that makes it again.
    """
    machine = data["machine"]
    packages = [f"{name} {v or 'not installed'}" for name, v in machine["packages"].items()]
    lines = [
        "# Benchmark",
        "",
        f"`{command}`, {data['date']}, commit {data['commit']}.",
        f"{machine['processor']}, threads: {machine['threads']}, {machine['dtype']}, allocator: "
        f"{machine['allocator']}, {machine['system']}, Python {machine['python']}, torch "
        f"{machine['torch']}, {', '.join(packages)}.",
        "",
        f"Medians of {data['config']['repeats']} turns, after {data['config']['warmup']} that do "
        f"not count; {SPEED}; {PEAK}.",
    ]
    for operation, rows in by_operation(data["rows"]).items():
        about = ABOUT[operation]
        lines += ["", f"## {operation}", "", f"{about[0].upper()}{about[1:]}.", ""]
        lines += [f"| {' | '.join((*HEADS, 'page faults'))} |", "|---|---|" + "--:|" * 6]
        for row in rows:
            cells = [*cells_of(row), *[""] * (len(HEADS) - len(cells_of(row))), _faults(row)]
            lines.append(f"| {' | '.join(cells)} |")
        found = dict.fromkeys(
            f"- {row['implementation']}, {row['case']}: {row['check']}"
            for row in rows
            if row.get("check") and not row.get("extrapolated")
        )
        lines += ["", "Checked before it was timed:" if found else "", *found]
    return "\n".join(lines).rstrip() + "\n"


def by_operation(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each operation, in the order in which they come."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["operation"], []).append(row)
    return found


def cells_of(row: Row) -> tuple[str, ...]:
    """The row as texts in the order of `HEADS`; fewer where there is nothing to tell."""
    head = (row["case"], row["implementation"])
    if "skipped" in row:
        return (*head, f"skipped: {row['skipped']}")
    if "failed" in row:
        return (*head, f"failed: {row['failed']}")
    if row["equal"] is False:
        return (*head, f"NOT EQUAL, not timed: {row['check']}")
    rate = row["tokens_per_second"]
    if rate is None:
        return (*head, "not finite")
    guess = "~" if row.get("extrapolated") else ""
    spread = guess or f"{_figures(row['low'])} to {_figures(row['high'])}"
    peak = size(row["peak_bytes"])
    if (per_token := row.get("bytes_per_token")) is not None:
        peak += f", {count(per_token)} B/token"
    numbers = (f"{guess}{_figures(rate)}", spread, f"{1000 / rate:.3g}")
    return (*head, *numbers, ratio_text(row), f"{guess}{peak}")


def ratio_text(row: Row) -> str:
    """2.31 x window only; the reference has none."""
    to = row["ratio_to"]
    if to is None:
        return ""
    name = to["implementation"]
    ratio = f"{to['ratio']:.2f}" if to["ratio"] >= 0.01 else f"{to['ratio']:.1g}"
    return f"{ratio} x " + (to["case"] if name == row["implementation"] else name)


def _figures(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _faults(row: Row) -> str:
    if "minor_faults" not in row:
        return ""
    return f"{row['minor_faults']:,} minor, {row['major_faults']:,} major"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right; what takes the place of numbers just follows."""
    if len(cells) < len(widths):
        return "  ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=False)).rstrip()
    parts = [
        f"{c:<{w}}" if i in (0, 1, 5) else f"{c:>{w}}"
        for i, (c, w) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(parts).rstrip()
