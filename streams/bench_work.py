"""The work of a benchmark: what is measured in which process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from wakesleep.streams.bench_cases import Entry, Group, build, skipped
from wakesleep.streams.bench_config import BenchConfig
from wakesleep.streams.bench_growth import read_on
from wakesleep.streams.bench_measure import Unequal, in_turn, peak_of, touch
from wakesleep.streams.bench_process import Failed
from wakesleep.streams.bench_rows import Row, add_ratios, make_row

Told = Callable[[str], None]


def measure(config: BenchConfig, group: Group, run: Callable[..., Any], told: Told) -> list[Row]:
    """The rows of a group: peaks in processes of their own, then all in turn in one process.

    Args:
        run: calls a function in a process, see `Processes.run`.
    """
    found: dict[Entry, dict[str, Any]] = {}
    for entry in group.entries:
        if reason := skipped(entry):
            found[entry] = {"skipped": reason}
    live = [entry for entry in group.entries if entry not in found]
    try:
        if group.name == "read":
            marks = run(read_stream, config, [entry.size for entry in live], told=told)
            found |= {entry: marks[entry.size] for entry in live}
        else:
            peaks = {}
            for number, entry in enumerate(live):
                told(f"memory of {number + 1} of {len(live)}")
                peaks[entry] = run(peak, config, group, entry, told=told)
            most = max(peaks.values(), default=0)
            timed = run(time_group, config, group, live, most, told=told) if live else {}
            found |= {e: values | {"peak_bytes": peaks[e]} for e, values in timed.items()}
    except Failed as failure:
        kind, _, text = str(failure).partition(": ")
        unequal = kind == Unequal.__name__
        values = {"equal": False, "check": text} if unequal else {"failed": str(failure)}
        found |= {entry: values for entry in live if entry not in found}
    rows = {entry: make_row(group, entry, found[entry]) for entry in group.entries}
    add_ratios(rows, found, group)
    return list(rows.values())


def peak(config: BenchConfig, group: Group, entry: Entry, told: Told) -> int:
    """Peak memory of an implementation; for a process of its own."""
    _begin(config)
    return peak_of(lambda: build(config, group, entry))


def time_group(
    config: BenchConfig, group: Group, entries: list[Entry], num_bytes: int, told: Told
) -> dict[Entry, dict[str, Any]]:
    """Check every implementation, and time those that are as they should be.

    Args:
        num_bytes: memory that is touched first.
    """
    contenders, found = {}, {}
    for number, entry in enumerate(entries):
        told(f"check {number + 1} of {len(entries)}")
        _begin(config)
        contender = build(config, group, entry)
        try:
            found[entry] = {"equal": True, "check": contender.check()}
        except Unequal as error:
            found[entry] = {"equal": False, "check": str(error)}
            continue
        contenders[entry] = contender
    touch(num_bytes)
    for entry, timing in in_turn(contenders, config.warmup, config.repeats, told).items():
        facts = contenders[entry].facts or {}
        tokens = {"tokens_per_turn": contenders[entry].tokens}
        found[entry] |= {**timing._asdict(), **tokens, **facts}
    return found


def read_stream(config: BenchConfig, marks: list[int], told: Told) -> dict[int, dict[str, Any]]:
    """Read a stream; for a process of its own."""
    _begin(config)
    return read_on(config, marks, told)


def _begin(config: BenchConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
