"""One setting measured: a stream with each seed of the planted facts, and what it came to."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wakesleep.streams.config import as_dict, flat
from wakesleep.streams.errors import Refused
from wakesleep.streams.language_model import LanguageModel
from wakesleep.streams.reading import Watch
from wakesleep.streams.results import Fact, by_training
from wakesleep.streams.session import Session
from wakesleep.streams.stopping import StopSignals
from wakesleep.streams.tune_config import TuneConfig
from wakesleep.ttl.config_json import parse_json
from wakesleep.ttl.files import open_regular, write_atomically
from wakesleep.ttl.flops import segment_flops

RESULT = "result.json"
MAX_BYTES = 1 << 20


def measure(
    folder: Path,
    config: TuneConfig,
    values: Mapping[str, Any],
    stop: StopSignals,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Stream with these values of the searched keys, once per seed; goes on where it was killed.

    The sessions are deleted at the end, what they came to stays in result.json.

    Raises:
        Refused: the model cannot do that; Stopped: a signal came, everything is saved.
    """
    found = read_result(folder)
    if found is not None:
        return found
    summaries = []
    for seed in config.seeds:
        stop.check()  # one that came when the stream before was at its end
        options = config.stream_config(values, seed)
        with Session.open(folder / f"seed-{seed}", **flat(options)) as session:
            summaries.append(session.read(config.document, watch=watch))
            model = session.language_model
            sizes = _sizes(model, options)
    stop.check()
    result = {"values": as_dict(values), **_combined(summaries, model, sizes)}
    text = json.dumps(result, indent=1, allow_nan=False)
    for seed in config.seeds:  # first: a kill in between measures again and leaves nothing behind
        shutil.rmtree(folder / f"seed-{seed}")
    write_atomically(folder / RESULT, text.encode() + b"\n")
    return result


def read_result(folder: Path) -> dict[str, Any] | None:
    """What was measured in this folder, None if that is not finished.

    Raises:
        Refused: the file is none of ours.
    """
    if not (folder / RESULT).exists():
        return None
    try:
        with open_regular(folder / RESULT, MAX_BYTES) as file:
            found = parse_json(file.read(), RESULT)
        if type(found) is not dict or not found.keys() >= {"values", "recall", "state_bytes"}:
            raise ValueError(f"{RESULT} has not the fields of a result")
    except ValueError as error:
        what = str(error).splitlines()[0]
        remedy = "delete it, and the setting is measured again"
        raise Refused(f"{folder / RESULT} cannot be used", what, remedy) from error
    return found


def _sizes(model: LanguageModel, options: Any) -> dict[str, int]:
    own = model.model.config
    return {
        "window": options.window or own.window,
        "capacity": options.store.capacity or own.store.capacity,
    }


def _combined(
    summaries: Sequence[Mapping[str, Any]], model: LanguageModel, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """One row of the table: sums over the seeds, means of what is no count."""
    tokens = sum(s["tokens"] for s in summaries)
    asleep = sum(s[f"{n}_flops"] for s in summaries for n in ("sleep", "gate", "wasted"))
    facts = [by_training(s["facts"])[0] or s["facts"] for s in summaries]
    bits = [s["bits_per_byte"] for s in summaries if s["bits_per_byte"] is not None]
    return {
        "tokens": tokens,
        "recall": _counts(facts),
        "deep": _counts([_third(rows, oldest=True) for rows in facts]),
        "young": _counts([_third(rows, oldest=False) for rows in facts]),
        "bits_per_byte": statistics.fmean(bits) if bits else None,
        "bits_by_seed": bits,
        "recall_by_seed": [_share(_counts([rows])) for rows in facts],
        "state_bytes": max(s["state_bytes"] for s in summaries),
        "seconds": sum(s["seconds"] for s in summaries),
        "pause_p95": max(s["pause_p95"] for s in summaries),
        "sleeps": sum(s["sleeps"] for s in summaries),
        "wake_flops": sum(s["wake_flops"] for s in summaries) / tokens,
        "sleep_flops": asleep / tokens,
        **_parts(model, sizes),
    }


def _third(facts: Sequence[Fact], *, oldest: bool) -> list[Fact]:
    """A third of the facts by their age."""
    by_age = sorted(facts, key=lambda fact: fact["age_tokens"], reverse=oldest)
    return by_age[: max(1, len(by_age) // 3)] if by_age else []


def _counts(groups: Sequence[Sequence[Fact]]) -> list[int]:
    rows = [fact for facts in groups for fact in facts]
    return [sum(bool(fact["correct"]) for fact in rows), len(rows)]


def _share(counts: Sequence[int]) -> float | None:
    right, asked = counts
    return right / asked if asked else None


def _parts(model: LanguageModel, sizes: Mapping[str, int]) -> dict[str, float]:
    """FLOPs per token of window and store, once the store is full."""
    c = model.model.config
    period = (c.combine == "mac" and c.memory.page) or c.chunk
    full = -(-(sizes["window"] + sizes["capacity"]) // period) * period
    costs = segment_flops(c, full, period, **sizes)
    found = {"window": 0.0, "store": 0.0}
    for cost in costs:
        if cost.part in found:
            found[cost.part] += (cost.matmul + cost.linalg) / period
    return {f"{part}_flops": flops for part, flops in found.items()}
