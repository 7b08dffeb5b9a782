"""The final table of a stream: speed, memory, loss, what is known by age, and what is next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wakesleep.streams.console import shortened, typed
from wakesleep.streams.families import HELD_OUT_KINDS
from wakesleep.streams.quantities import count, duration, rounded, size

YOUNGEST_DECADE = 3  # ages under 1,000 tokens, inside the window or just beyond, are one row
BAR = 20  # columns

Fact = Mapping[str, Any]  # a row of `facts` in summary.json


def final_table(folder: Path, summary: Mapping[str, Any], sleepless: str | None = None) -> str:
    """The summary of a session as a page of plain text.

    Args:
        sleepless: why it never slept, though it should have.
    """
    title = f"{count(summary['tokens'])} tokens read in {duration(summary['seconds'])}"
    if summary["resumed_at"]:
        title += f", resumed {len(summary['resumed_at'])}x"
    loss = summary["bits_per_byte"]
    peak, state = size(summary["peak_rss_bytes"]), size(summary["state_bytes"])
    rows = [
        ("speed", f"{summary['tokens_per_second']:,.0f} tokens per second"),
        ("peak memory", f"{peak}, of it the state {state}"),
        ("bits per byte", "no text" if loss is None else f"{loss:.3f}"),
    ]
    if summary["nonfinite_rows"]:
        rows.append(("not finite", f"{summary['nonfinite_rows']:,} rows, kept out of all memories"))
    if sleepless:
        rows.append(("sleep", f"none: {sleepless}"))
    facts = summary["facts"]
    if facts:
        right = sum(bool(fact["correct"]) for fact in facts)
        sure = sum(bool(fact["correct"] and fact["known"]) for fact in facts)
        rows.append(("planted facts", f"{right} of {len(facts)} right, {sure} of them sure"))
    lines = [title, "", *_columns(rows)]
    if facts:
        lines += ["", *_by_age(facts)]
    plots = ", ".join(sorted(path.name for path in folder.glob("*.png")))
    rows = [("session", shortened(str(folder), 200))]
    rows += [("plots", plots)] if plots else []
    rows += [("next", next_command(folder, facts))]
    return "\n".join([*lines, "", *_columns(rows)])


def next_command(folder: Path, facts: Sequence[Fact]) -> str:
    """The command to type now: one of the planted facts, or the prompt."""
    command = f"wakesleep ask {typed(folder)}"
    known = next((fact for fact in facts if fact["correct"]), None)
    if known is None:
        return command
    question = shortened(known["question"], 120)
    plain = not set(question) & set('"$`\\!')
    return f'{command} "{question}"' if plain else f"{command} {shlex.quote(question)}"


def decade(age: int) -> int:
    """The power of ten at or below an age in tokens; younger than 1,000 counts as 10^2."""
    return max(YOUNGEST_DECADE - 1, int(math.log10(max(age, 1)) + 1e-9))


def decade_name(power: int) -> str:
    """1k to 10k, for 3."""
    if power < YOUNGEST_DECADE:
        return f"under {rounded(10**YOUNGEST_DECADE)}"
    return f"{rounded(10**power)} to {rounded(10 ** (power + 1))}"


def by_decade(facts: Sequence[Fact]) -> dict[int, tuple[int, int]]:
    """(right, asked) by decade of age, youngest first."""
    groups: dict[int, tuple[int, int]] = {}
    for fact in sorted(facts, key=lambda fact: fact["age_tokens"]):
        power = decade(fact["age_tokens"])
        right, asked = groups.get(power, (0, 0))
        groups[power] = right + bool(fact["correct"]), asked + 1
    return groups


def by_training(facts: Sequence[Fact]) -> tuple[list[Fact], list[Fact]]:
    """Facts of the families that models are trained on, and of those that training holds out.

    What the first ones tell is memory; the others also ask whether a kind of question that was
    never practised is understood.
    """
    trained = [fact for fact in facts if fact["kind"] not in HELD_OUT_KINDS]
    return trained, [fact for fact in facts if fact["kind"] in HELD_OUT_KINDS]


def _by_age(facts: Sequence[Fact]) -> list[str]:
    """A row per decade of age; families never trained on are one row of all ages, with a note."""
    trained, held_out = by_training(facts)
    lines = [f"  {'age in tokens':<14}{'right':>6}{'asked':>7}"]
    groups = by_decade(trained or held_out)
    lines += [_row(decade_name(power), *counts) for power, counts in groups.items()]
    if trained and held_out:
        names = ", ".join(sorted({fact["kind"] for fact in held_out}))
        right = sum(bool(fact["correct"]) for fact in held_out)
        lines.append(_row("held out", right, len(held_out)))
        lines += [
            "",
            f"  held out: kinds of facts that are in no training data ({names}), all ages",
        ]
    return lines


def _row(name: str, right: int, asked: int) -> str:
    bar, share = "#" * round(BAR * right / asked), f"{100 * right / asked:.0f} %"
    return f"  {name:<14}{right:>6}{asked:>7}{share:>7}  {bar}".rstrip()


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows) + 2
    return [f"  {name:<{width}}{value}" for name, value in rows]
