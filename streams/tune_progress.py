"""What people see while settings are measured: the stream that is read, and what each came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wakesleep.streams.progress import Progress
from wakesleep.streams.quantities import duration


class Trials(Progress):
    """How far the stream of this process is; a line for each setting that was measured."""

    def answers(self, tokens: int, facts: Sequence[Mapping[str, Any]]) -> None:
        """Leave out single questions: what they come to is in the line of the setting."""

    def slept(self, line: Mapping[str, Any]) -> None:
        """Leave out single sleeps."""

    def told(self, result: Mapping[str, Any]) -> None:
        """A setting was measured."""
        self.say(line_of(result))


def line_of(result: Mapping[str, Any]) -> str:
    """One setting that was measured, in words."""
    values = " ".join(f"{key}={value}" for key, value in result["values"].items())
    right, asked = result["recall"]
    parts = [f"{right} of {asked} facts"] if asked else []
    parts += [f"{result['bits_per_byte']:.3f} bits/byte"] if result["bits_per_byte"] else []
    cost = (result["wake_flops"] + result["sleep_flops"]) / 1e6
    parts += [f"{cost:.2f} MFLOP/token", duration(result["seconds"])]
    return f"{values}: {', '.join(parts)}"
