"""Ctrl-C and SIGTERM: the first asks the work to stop at a safe place, a second stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A signal was obeyed at a safe place and the work so far is saved: exit code 130 or 143."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number


def leave_at_signals() -> None:
    """End this process at once at the first signal: files are whole at every moment.

    An exception would not do. While torch is imported, C code swallows those that a handler raises.
    """
    for number in SIGNALS:
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(128 + number)


class StopSignals:
    """While entered, remember the first signal instead of obeying it; a second one ends all.

    >>> with StopSignals() as stop:
    ...     while work() and not stop:
    ...         ...

    What comes in an inner one is the outer one's, too, when that goes on.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._waiting = False

    def __bool__(self) -> bool:
        return self.number is not None

    def __enter__(self) -> StopSignals:
        self._before = self.take_over()
        return self

    def take_over(self) -> dict[int, object]:
        """Put up our handlers, again if somebody has put up others; return those that went."""
        if threading.current_thread() is not threading.main_thread():  # others may not set any
            return {}
        return {number: signal.signal(number, self._obey) for number in SIGNALS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        outer = getattr(self._before.get(self.number), "__self__", None)
        if isinstance(outer, StopSignals):
            outer.number = outer.number or self.number

    def check(self) -> None:
        """Raise Stopped if a signal came."""
        if self.number is not None:
            raise Stopped(self.number)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Raise Stopped at a signal in here, where a read may wait for ever."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _obey(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            _leave(number, frame)
        self.number = number
        if self._waiting:
            raise Stopped(number)
