"""What people see while a stream is read: a bar on a terminal, plain lines elsewhere.

Both show one line of `metrics.jsonl` in words. Facts that were planted and are asked on the way
appear above it as they are answered.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from wakesleep.streams.console import Console, shortened
from wakesleep.streams.quantities import count, duration

LINE_EVERY = 10.0  # seconds between two plain lines
QUESTION_WIDTH = 52  # columns


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
        self._bar = _Bar(total) if on_terminal() and not console.quiet else None

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
            self._bar.move(line["tokens"], figures(line, self._total))
        elif now - self._shown_at >= LINE_EVERY:
            self._shown_at = now
            self._console.say(
                f"{progressed(line['tokens'], self._total)}  {figures(line, self._total)}"
            )

    def answers(self, tokens: int, facts: Sequence[Mapping[str, Any]]) -> None:
        """Show facts that were asked after `tokens` tokens."""
        right = sum(bool(fact["correct"]) for fact in facts)
        lines = [f"asked after {count(tokens)} tokens: {right} of {len(facts)} right"]
        lines += [f"  {answered(fact)}" for fact in facts]
        for line in lines:
            if self._bar:
                self._bar.print(line)
            else:
                self._console.say(line)


def on_terminal() -> bool:
    """Tell whether people look at stderr on a screen that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"


def progressed(tokens: int, total: float) -> str:
    """1.20M of 10.0M tokens, 12 %."""
    if not math.isfinite(total):
        return f"{count(tokens)} tokens"
    return f"{count(tokens)} of {count(total)} tokens, {100 * tokens / max(total, 1):.0f} %"


def figures(line: Mapping[str, Any], total: float) -> str:
    """Speed, loss, surprise, fill and time left, as far as `line` knows them."""
    speed = line.get("tokens_per_second")
    parts = [f"{speed:,.0f} tokens/s"] if speed else []
    for key, words in (("bits_per_byte", "{:.3f} bits/byte"), ("surprise", "surprise {:.2f}")):
        if line.get(key) is not None:
            parts.append(words.format(line[key]))
    if line.get("store_fill") is not None:
        parts.append(f"store {100 * line['store_fill']:.0f} % full")
    if speed and math.isfinite(total):
        parts.append(f"{duration(max(total - line['tokens'], 0) / speed)} left")
    return "  ".join(parts)


def answered(fact: Mapping[str, Any]) -> str:
    """One asked fact on a line: question, answer, whether it is right, and how old it is."""
    given = shortened(fact["predicted"].strip(), 24) or "no answer"
    verdict = "right" if fact["correct"] else f"wrong, it is {shortened(fact['answer'], 24)}"
    question = shortened(fact["question"], QUESTION_WIDTH)
    age = count(fact["age_tokens"])
    return f"{question:<{QUESTION_WIDTH}}  {given}  ({verdict}; {age} tokens ago)"


class _Bar:
    """A bar that rich draws on stderr. Text goes in as it is: no mark-up, no colours of numbers."""

    def __init__(self, total: float) -> None:
        from rich.console import Console as Screen
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Live

        self._total = total
        self._live = Live(
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            console=Screen(stderr=True, highlight=False, markup=False),
            transient=True,
        )
        known = total if math.isfinite(total) else None
        self._task = self._live.add_task("", total=known)

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def move(self, tokens: int, text: str) -> None:
        words = f"{progressed(tokens, self._total)}  {text}"
        self._live.update(self._task, completed=tokens, description=words)

    def print(self, text: str) -> None:
        self._live.console.print(text)
