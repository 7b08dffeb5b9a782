"""What people see while a stream is read: a bar on a terminal, plain lines elsewhere.

Both show one line of `metrics.jsonl` in words. Facts that were planted and are asked on the way
appear above it as they are answered.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from wakesleep.streams.bar import Bar, on_terminal
from wakesleep.streams.console import Console, shortened
from wakesleep.streams.quantities import count, duration

LINE_EVERY = 10.0  # seconds between two plain lines
QUESTION_WIDTH = 44  # columns; a longer question moves what follows it
MAX_QUESTION = 64


class Progress:
    """Show how a stream goes; enter it before the first segment.

    Args:
        console: where people read; nothing is shown if it is quiet.
        total: tokens to read, `inf` where that is not known.
        clock: seconds that never go backwards.
    """

    def __init__(
        self, console: Console, total: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._total = total
        self._clock = clock
        self._shown_at = -math.inf
        self._bar = Bar(total) if on_terminal() and not console.quiet else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def metrics(self, line: Mapping[str, Any]) -> None:
        """Show one line of metrics; without a terminal at most one every ten seconds."""
        now = self._clock()
        if self._bar:
            place = [progressed(line["tokens"], self._total), *time_left(line, self._total)]
            self._bar.move(line["tokens"], ", ".join(place), figures(line))
        elif now - self._shown_at >= LINE_EVERY:
            self._shown_at = now
            words = [progressed(line["tokens"], self._total), figures(line)]
            self._console.say("  ".join([*words, *time_left(line, self._total)]))

    def answers(self, tokens: int, facts: Sequence[Mapping[str, Any]]) -> None:
        """Show facts that were asked after `tokens` tokens."""
        right = sum(bool(fact["correct"]) for fact in facts)
        lines = [f"asked after {count(tokens)} tokens: {right} of {len(facts)} right"]
        for line in [*lines, *(f"  {answered(fact)}" for fact in facts)]:
            self.say(line)

    def sleeping(self, tokens: int) -> None:
        """Show that it sleeps now."""
        if self._bar:
            self._bar.say("asleep")

    def slept(self, line: Mapping[str, Any]) -> None:
        """Show what a sleep came to."""
        self.say(dream(line))

    def sleepless(self, why: str) -> None:
        """Show why it never sleeps."""
        self.say(f"no sleep: {why}")

    def say(self, text: str) -> None:
        """Tell something, above the bar if there is one."""
        if self._bar:
            self._bar.print(text)
        else:
            self._console.say(text)


def dream(line: Mapping[str, Any]) -> str:
    """A line of sleeps.jsonl in words."""
    what = f"{line['units']:,} more passes"
    if line["rule"] == "replay":
        what = f"{line['written']:,} pairs written, {line['released']:,} places freed"
    if not line["accepted"]:
        what = "nothing changed"
    return (
        f"slept after {count(line['tokens'])} tokens ({line['trigger']}, "
        f"{duration(line['seconds'])}): {what}; {line['reason']}"
    )


def progressed(tokens: int, total: float) -> str:
    """1.20M of 10.0M tokens, 12 %."""
    if not math.isfinite(total):
        return f"{count(tokens)} tokens"
    total = max(total, tokens, 1)  # it may have been an estimate
    return f"{count(tokens)} of {count(total)} tokens, {100 * tokens / total:.0f} %"


def figures(line: Mapping[str, Any]) -> str:
    """Speed, loss, surprise and fill, as far as `line` knows them."""
    words = {
        "tokens_per_second": "{:,.0f} tokens/s",
        "bits_per_byte": "{:.3f} bits/byte",
        "surprise": "surprise {:.2f}",
        "store_fill": "store {:.0%} full",
    }
    known = {key: text for key, text in words.items() if line.get(key) is not None}
    return "  ".join(text.format(line[key]) for key, text in known.items())


def time_left(line: Mapping[str, Any], total: float) -> list[str]:
    """The time left in words, nothing where it cannot be told."""
    speed = line.get("tokens_per_second")
    if not speed or not math.isfinite(total):
        return []
    return [f"{duration(max(total - line['tokens'], 0) / speed)} left"]


def answered(fact: Mapping[str, Any]) -> str:
    """One asked fact on a line: question, answer, whether it is right, and how old it is."""
    given = shortened(fact["predicted"].strip(), 24) or "no answer"
    verdict = "right" if fact["correct"] else f"wrong, it is {shortened(fact['answer'], 24)}"
    question = shortened(fact["question"], MAX_QUESTION)
    age = count(fact["age_tokens"])
    return f"{question:<{QUESTION_WIDTH}}  {given}  ({verdict}; {age} tokens ago)"
