"""How something is timed: checked first, warmed up, in turn with what it is compared with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from wakesleep.streams.meters import peak_rss_bytes

Name = TypeVar("Name", bound=Hashable)
PAUSE = 0.02  # seconds before a turn: threads of the one before have stopped spinning
PEAK_TURNS = 2  # the second one begins with what the first one left


class Unequal(ValueError):
    """An implementation gives something else than it should: it is not timed."""


class Contender(NamedTuple):
    """An implementation, ready to be timed."""

    tokens: int  # that one turn reads
    turn: Callable[[], Tensor]  # what it returns has to be finite
    check: Callable[[], str]  # says what was found to be equal; raises Unequal
    facts: Mapping[str, Any] | None = None  # further keys of its row


class Timing(NamedTuple):
    rates: list[float]  # tokens per second of each turn that counts
    minor_faults: int  # fresh memory pages in these turns
    major_faults: int  # of them, read from a disk
    finite: bool


def in_turn(
    contenders: Mapping[Name, Contender],
    warmup: int,
    repeats: int,
    told: Callable[[str], None] = lambda text: None,
) -> dict[Name, Timing]:
    """Let everyone take a turn after the other, `repeats` times after `warmup` rounds.

    Args:
        told: called with a line of text before every round.
    """
    timings = {name: Timing([], 0, 0, True) for name in contenders}
    for number in range(warmup + repeats):
        told(f"turn {number + 1} of {warmup + repeats}")
        for name, contender in contenders.items():
            time.sleep(PAUSE)
            before, start = page_faults(), time.perf_counter()
            result = contender.turn()
            seconds, after = time.perf_counter() - start, page_faults()
            old = timings[name]
            timings[name] = old._replace(finite=old.finite and bool(result.isfinite().all()))
            if number >= warmup:
                timings[name] = Timing(
                    [*old.rates, contender.tokens / seconds],
                    old.minor_faults + after[0] - before[0],
                    old.major_faults + after[1] - before[1],
                    timings[name].finite,
                )
    return timings


def peak_of(build: Callable[[], Contender]) -> int:
    """Bytes that this process needs for an implementation beyond what it held before.

    Meant for a process of its own: a peak never falls again.
    """
    load_libraries()
    before = peak_rss_bytes()
    contender = build()
    for _ in range(PEAK_TURNS):
        contender.turn()
    return risen(before)


def risen(before: int) -> int:
    """Bytes that the peak of this process has risen by since it was `before`.

    The kernel adds up its counts of each processor only now and then, so a peak may be read a few
    pages lower than it was.
    """
    return max(0, peak_rss_bytes() - before)


def touch(num_bytes: int) -> None:
    """Write to fresh memory once, so that no turn waits for its pages."""
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        num_bytes = min(num_bytes, free // 2)
    torch.empty(num_bytes, dtype=torch.uint8).fill_(1)


def page_faults() -> tuple[int, int]:
    """Minor and major faults of this process so far."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt, usage.ru_majflt


def load_libraries() -> None:
    """Load what torch loads at its first product and its first gradient."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(64, 64, dtype=dtype, requires_grad=True)
        torch.nn.functional.layer_norm(x @ x, (64,)).sum().backward()
