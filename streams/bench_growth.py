"""How time per token and peak memory grow with what was read: measured, and beyond it extrapolated.

Ours really reads the document, in one process, and tells its speed since the last mark and the peak
so far at 1k, 10k, ... tokens. What was measured is carried on by the simplest law that fits: the
speed and memory of ours stay, those of full attention follow a straight line per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wakesleep.streams.bench_config import BenchConfig
from wakesleep.streams.bench_measure import load_libraries, page_faults, risen
from wakesleep.streams.bench_models import OURS, check_cuts, open_reader
from wakesleep.streams.meters import peak_rss_bytes
from wakesleep.streams.segments import Segment

Row = Mapping[str, Any]


def read_on(
    config: BenchConfig, marks: Sequence[int], told: Callable[[str], None]
) -> dict[int, dict[str, Any]]:
    """Read up to the last of `marks` (rising); what was measured at each, see `in_turn`.

    Here the check comes last: it needs memory, and a peak never falls again.

    Raises:
        Unequal: the check fails; what was measured is dropped.
    """
    load_libraries()
    before, found, tokens = peak_rss_bytes(), {}, 0
    open_reader(config, OURS).read(min(marks[0], config.tokens))  # to be warm
    reader = open_reader(config, OURS)
    begin = time.perf_counter()
    for mark in marks:
        rates, faults = [], page_faults()
        while tokens < mark:
            whole = next(reader.segments)
            segment = Segment(*(part[: mark - tokens] for part in whole))
            start = time.perf_counter()
            reader.runner.read(segment)
            rates.append(len(segment.ids) / (time.perf_counter() - start))
            tokens += len(segment.ids)
            told(f"{tokens:,} of {marks[-1]:,} tokens")
        now = page_faults()
        found[mark] = {
            "rates": rates,
            "finite": bool(reader.runner.carried.logits.isfinite().all()),
            "minor_faults": now[0] - faults[0],
            "major_faults": now[1] - faults[1],
            "seconds": time.perf_counter() - begin,
            "peak_bytes": risen(before),
        }
    check = check_cuts(reader.language_model.model, config.seed, by_token=False)
    return {mark: {"equal": True, "check": check, **values} for mark, values in found.items()}


def extrapolate(rows: Sequence[Row], position: int, *, straight: bool) -> dict[str, Any]:
    """What the row at `position` would be.

    Args:
        rows: measured ones of one implementation, by rising `position`.
        straight: seconds per token and memory lie on a line through the last two rows; else they
            stay as they are in the last one.
    """
    last = rows[-1]
    values = {"tokens_per_second": last["tokens_per_second"], "peak_bytes": last["peak_bytes"]}
    if straight:
        first, per = rows[-2], position - last["position"]
        per /= last["position"] - first["position"]
        seconds = [1 / row["tokens_per_second"] for row in (first, last)]
        rise = max(0.0, seconds[1] - seconds[0])
        values["tokens_per_second"] = 1 / (seconds[1] + per * rise)
        more = max(0, last["peak_bytes"] - first["peak_bytes"])
        values["peak_bytes"] = round(last["peak_bytes"] + per * more)
    upto = f"extrapolated from {last['position']:,} tokens"
    return {"equal": last["equal"], "check": upto, "extrapolated": True, **values}
