"""Two lines that rich keeps redrawing on stderr: a bar with the place, and the figures."""

from __future__ import annotations

import math
import os
import sys


def on_terminal() -> bool:
    """Tell whether people look at stderr on a screen that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"


class Bar:
    """What a command that takes long shows of its way; text goes in as it is, without mark-up.

    Args:
        total: units of the whole way, `inf` where that is not known.
    """

    def __init__(self, total: float) -> None:
        from rich.console import Console as Screen
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Live
        from rich.table import Column

        self._live = Live(
            BarColumn(bar_width=20),
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=Screen(stderr=True, highlight=False, markup=False),
            refresh_per_second=4,
            transient=True,
        )
        known = total if math.isfinite(total) else None
        self._task = self._live.add_task("", total=known)
        self._place = ""

    @property
    def speed(self) -> float | None:
        """Units per second of late, None before there were any."""
        return self._live.tasks[0].speed

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def move(self, done: float, place: str, figures: str) -> None:
        """Show how far it is, in units and in words, and what there is to say of it."""
        self._place = place
        self._live.update(self._task, completed=done, description=f"{place}\n{figures}")

    def say(self, figures: str) -> None:
        """Say something else at the same place."""
        self._live.update(self._task, description=f"{self._place}\n{figures}")

    def print(self, text: str) -> None:
        """Print lines that stay, above the bar."""
        self._live.console.print(text, soft_wrap=True)
