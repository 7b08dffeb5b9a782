"""Running totals of a stream, in bounded memory, exact across a resume.

JSON writes a float so that reading gives the same float: totals that were saved and read back go
on as if nothing had happened. Everything here but seconds is the same in every run.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from dataclasses import dataclass, field
from typing import Any

from wakesleep.consolidation.budget import Cost, Ledger
from wakesleep.consolidation.triggers import TriggerState

SHORTEST = 1e-6  # seconds, the first bucket of a histogram
RATIO = 1.05  # between the bounds of a bucket: a percentile is exact to 5 %
LONGEST = 1e7  # seconds; 614 buckets at most
MAX_NUMBER = 2**100  # that is read from a file: more than can be counted


@dataclass
class Histogram:
    """Durations in buckets of equal ratio."""

    counts: dict[int, int] = field(default_factory=dict)  # bucket -> durations
    longest: float = 0.0  # seconds, exact

    def add(self, seconds: float) -> None:
        inside = min(max(seconds, SHORTEST), LONGEST)
        bucket = math.ceil(math.log(inside / SHORTEST, RATIO))
        self.counts[bucket] = self.counts.get(bucket, 0) + 1
        self.longest = max(self.longest, seconds)

    def percentile(self, share: float) -> float:
        """The upper bound of the bucket in which the duration of rank `share` lies; 0 if empty."""
        left = math.ceil(share * sum(self.counts.values()))
        for bucket in sorted(self.counts):
            left -= self.counts[bucket]
            if left <= 0:
                return min(SHORTEST * RATIO**bucket, self.longest)
        return self.longest


@dataclass
class Span:
    """Sums over some tokens: since the last line of metrics, or since the start."""

    tokens: int = 0
    text_tokens: int = 0  # of the documents: neither planted nor special
    text_bytes: int = 0  # that these stand for
    nats: float = 0.0  # negative log-likelihood of these
    surprise: float = 0.0  # sum over all tokens

    def add(self, other: Span) -> None:
        for name in (f.name for f in dataclasses.fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None


@dataclass
class Meters:
    """What a session has counted since its first token."""

    total: Span = field(default_factory=Span)
    line: Span = field(default_factory=Span)  # since the last line of metrics
    seconds: float = 0.0  # by a monotonic clock, from the first segment of a call to its last
    line_seconds: float = 0.0  # the same, since the last line of metrics
    ledger: Ledger = field(default_factory=Ledger)  # what reading and sleep cost
    triggers: TriggerState = field(default_factory=TriggerState)  # of the wish to sleep
    sleeps: int = 0
    interrupted_flops: int = 0  # of sleeps that a signal cut short: spent, and decides nothing
    nonfinite_rows: int = 0
    pauses: Histogram = field(default_factory=Histogram)
    resumed_at: list[int] = field(default_factory=list)  # tokens of the session

    @property
    def wake_flops(self) -> int:
        return self.ledger.wake.flops

    def add(self, span: Span) -> None:
        self.total.add(span)
        self.line.add(span)

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["pauses"]["counts"] = {str(b): n for b, n in sorted(self.pauses.counts.items())}
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Meters:
        """Read what `to_json` gave.

        Raises:
            ValueError: something else, or a number that is negative or not finite.
        """
        try:
            given = {"interrupted_flops": 0} | values  # sessions from before do not count them
            pauses = dict(given.pop("pauses"))
            counts = {_bucket(b): _number(n, int) for b, n in pauses.pop("counts").items()}
            meters = cls(
                total=_span(given.pop("total")),
                line=_span(given.pop("line")),
                pauses=Histogram(counts, _number(pauses.pop("longest"), float)),
                resumed_at=[_number(n, int) for n in given.pop("resumed_at")],
                ledger=_ledger(given.pop("ledger")),
                triggers=_triggers(given.pop("triggers")),
                **{f: _number(given.pop(f), kind) for f, kind in _NUMBERS.items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"meters lack or misspell {error}") from error
        if given or pauses:
            raise ValueError(f"meters hold something unknown: {str([*given, *pauses])[:80]}")
        return meters


_NUMBERS = {"seconds": float, "line_seconds": float}
_NUMBERS |= dict.fromkeys(("sleeps", "interrupted_flops", "nonfinite_rows"), int)


def _span(values: dict[str, Any]) -> Span:
    kinds = {f.name: type(f.default) for f in dataclasses.fields(Span)}
    return Span(**{name: _number(value, kinds[name]) for name, value in dict(values).items()})


def _ledger(values: list[Any]) -> Ledger:
    wake, sleep, gate, wasted, granted, lost = values
    kinds = (int, int, float)
    costs = [
        Cost(*(_number(value, kind) for value, kind in zip(cost, kinds, strict=True)))
        for cost in (wake, sleep, gate, wasted)
    ]
    return Ledger(*costs, _number(granted, int), _number(lost, int))


def _triggers(values: list[Any]) -> TriggerState:
    kinds = [type(value) for value in TriggerState()]
    return TriggerState(*(_plain(v, kind) for v, kind in zip(values, kinds, strict=True)))


def _plain(value: Any, kind: type) -> Any:
    if kind is not bool:
        return _number(value, kind)
    if type(value) is not bool:
        raise ValueError(f"meters hold {str(value)[:40]!r} where true or false belongs")
    return value


def _bucket(name: str) -> int:
    if not (name.isascii() and name.isdecimal() and len(name) <= 3):
        raise ValueError(f"meters hold {name[:40]!r} where a bucket of durations belongs")
    return int(name)


def _number(value: Any, kind: type) -> Any:
    legal = (int, float) if kind is float else (int,)
    if type(value) not in legal or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"meters hold {str(value)[:40]!r} where a number belongs")
    return kind(value)


def peak_rss_bytes() -> int:
    """Most memory that this process ever held, in bytes.

    Linux hands `ru_maxrss` on to the program that a process is replaced by, so a small program
    started by a large one would report the large one; `VmHWM` begins anew.
    """
    if sys.platform == "linux" and os.path.exists("/proc/self/status"):
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
