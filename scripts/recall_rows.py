"""Answers of `recall_table.py` to rows with intervals, and rows to Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wakesleep.streams.families import FAMILIES, HELD_OUT_KINDS, KINDS, TRAINED_KINDS
from wakesleep.streams.results import decade, decade_name
from wakesleep.streams.words import load_words

Z = 1.959964  # of a normal distribution, 95 % two-sided
ALL = "all"  # decades of age together
GROUPS = {
    "trained": "facts of the trained families that were said once: the answer is right",
    "changed": "facts that were said and then changed: the answer is the latest value",
    "held_out": f"facts of families that are in no training data ({', '.join(HELD_OUT_KINDS)})",
    "right_and_known": "as trained, and the confidence reaches the threshold of the model",
    "nothing": "questions about nothing: there is no answer, or one below the threshold",
    "nothing_unsaid": "questions about nothing: there is no answer, not even a guess",
    "found": "all facts, of bm25: the last statement is whole in one of the passages",
}
ONCE = tuple(kind for kind in TRAINED_KINDS if kind != "changed")
Row = dict[str, Any]


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    share, spread = right / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * share * (1 - share) + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def chance(kind: str, split: str) -> float:
    """How often a guess among all values of a kind is right; 0 for numbers and dates."""
    words = load_words(split)
    match FAMILIES[kind].value:
        case "city":
            return 1 / len(words.cities)
        case "job":
            return 1 / len(words.jobs)
        case "colour":
            return 1 / len(words.colours)
        case "goods":
            return 1 / len(words.goods)
        case "person":
            return 1 / (len(words.first_names) * len(words.last_names))
        case "thing":
            return 1 / (len(words.adjectives) * len(words.nouns))
    return 0.0  # at most 1 in 1,000


def rows_of(
    session: str, condition: str, answers: Sequence[Mapping[str, Any]], split: str
) -> list[Row]:
    """Count the answers of one session in one condition; empty groups have no row."""
    facts = [a for a in answers if a["planted"]]
    nothing = [a for a in answers if not a["planted"]]
    once = [a for a in facts if a["kind"] in ONCE]
    held_out = [a for a in facts if a["kind"] in HELD_OUT_KINDS]
    counted = [
        ("trained", decade_name(power), [a for a in once if decade(a["age_tokens"]) == power])
        for power in sorted({decade(a["age_tokens"]) for a in once})
    ]
    counted += [("trained", ALL, once), ("held_out", ALL, held_out)]
    # `changed` is a kind and a group
    counted += [(kind, ALL, [a for a in facts if a["kind"] == kind]) for kind in KINDS]
    rows = []
    for group, age, members in counted:
        guess = sum(chance(a["kind"], split) for a in members) / max(1, len(members))
        rows.append(_row(group, age, [a["correct"] for a in members], guess))
    right_and_known = [a["correct"] and a["known"] for a in once]
    rows.append(_row("right_and_known", ALL, right_and_known))
    rows.append(_row("nothing", ALL, [not a["known"] for a in nothing]))
    rows.append(_row("nothing_unsaid", ALL, [a["correct"] for a in nothing]))
    rows.append(_row("found", ALL, [a["found"] for a in facts if "found" in a]))
    return [{"session": session, "condition": condition, **row} for row in rows if row["n"]]


def _row(group: str, age: str, right: Sequence[bool], guess: float | None = None) -> Row:
    n, correct = len(right), sum(right)
    low, high = wilson(correct, n) if n else (0.0, 1.0)
    return {
        **{"group": group, "decade": age, "n": n, "correct": correct},
        **{"low": low, "high": high, "chance": guess},
    }


def markdown(rows: Sequence[Row], meanings: Mapping[str, str]) -> str:
    """Tables by age and by kind; `meanings` says what the conditions are."""
    by_age = {("trained", age): age for age in _ages(rows)}
    by_age |= {("trained", ALL): "all ages", ("right_and_known", ALL): "right and known"}
    by_age |= {("changed", ALL): "changed", ("held_out", ALL): "held out"}
    by_age |= {("nothing", ALL): "false answers"}
    by_kind = {(kind, ALL): kind.replace("_", " ") for kind in KINDS}
    whole = [row for row in rows if (row["group"], row["decade"]) == ("trained", ALL)]
    guesses = dict.fromkeys(f"{100 * row['chance']:.1f} %" for row in whole)
    lines = [
        "## By age in tokens",
        "",
        *_table(rows, by_age, _with_interval),
        "",
        "Right of all asked, and the 95 % Wilson interval of the share. Ages: facts of the trained",
        "families that were said once. False answers: answers that count as known to questions",
        f"about nothing. A guess among all values of a kind is right in {', '.join(guesses)}.",
        "",
        *(f"- *{name}*: {meaning}." for name, meaning in meanings.items()),
        *(
            f"- In {row['session']}, {row['condition']} finds {row['correct']} of {row['n']} "
            "statements."
            for row in rows
            if row["group"] == "found"
        ),
        "",
        "## By kind",
        "",
        *_table(rows, by_kind, lambda row: f"{row['correct']}/{row['n']}"),
    ]
    return "\n".join(lines) + "\n"


def _ages(rows: Sequence[Row]) -> list[str]:
    """The decades of the rows, youngest first."""
    there = {row["decade"] for row in rows}
    return [name for name in map(decade_name, range(2, 20)) if name in there]


def _table(
    rows: Sequence[Row], columns: Mapping[tuple[str, str], str], cell: Callable[[Row], str]
) -> list[str]:
    """A line per session and condition, a column per group and decade."""
    lines: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for row in rows:
        line = lines.setdefault((row["session"], row["condition"]), {})
        line[row["group"], row["decade"]] = cell(row)
    table = [["session", "condition", *columns.values()]]
    table += [[*name, *(line.get(key, "") for key in columns)] for name, line in lines.items()]
    table.insert(1, ["---", "---", *("---:" for _ in columns)])
    return [f"| {' | '.join(line)} |" for line in table]


def _with_interval(row: Row) -> str:
    right, n, low, high = (row[name] for name in ("correct", "n", "low", "high"))
    if row["group"] == "nothing":
        right, low, high = n - right, 1 - high, 1 - low
    return f"{right}/{n} {100 * right / n:.0f} % ({100 * low:.0f}\N{EN DASH}{100 * high:.0f})"
