"""summary.json: what a stream came to, in numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wakesleep.streams.errors import Refused
from wakesleep.streams.manifest import Manifest
from wakesleep.streams.meters import peak_rss_bytes
from wakesleep.streams.recorder import SLEEPS
from wakesleep.ttl.config_json import parse_json
from wakesleep.ttl.files import open_regular, write_atomically

SUMMARY = "summary.json"
MAX_BYTES = 1 << 26
MAX_LOG_BYTES = 1 << 25  # of sleeps that a summary shows
MAX_FILE_BYTES = 1 << 40
COUNTS = ("tokens", "wake_flops", "sleep_flops", "gate_flops", "wasted_flops", "sleeps")


def summarise(
    manifest: Manifest,
    state_bytes: int,
    facts: list[dict[str, Any]],
    sleep_log: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The summary of a session at a snapshot. Bytes and bits are those of the documents' text."""
    meters, sleep = manifest.meters, manifest.config.sleep
    return {
        "tokens": manifest.tokens,
        "bytes": meters.total.text_bytes,
        "seconds": meters.seconds,
        "tokens_per_second": manifest.tokens / meters.seconds if meters.seconds else 0.0,
        "bits_per_byte": meters.total.bits_per_byte,
        "peak_rss_bytes": peak_rss_bytes(),
        "state_bytes": state_bytes,
        "wake_flops": meters.wake_flops,
        "sleep_flops": meters.ledger.sleep.flops,
        "gate_flops": meters.ledger.gate.flops,
        "wasted_flops": meters.ledger.wasted.flops,
        "granted_flops": meters.ledger.granted,
        "interrupted_flops": meters.interrupted_flops,
        "sleeps": meters.sleeps,
        "sleep_log": sleep_log or [],
        "offline_ratio": 0 if sleep.rule == "none" else sleep.offline_ratio,
        "pause_p50": meters.pauses.percentile(0.5),
        "pause_p95": meters.pauses.percentile(0.95),
        "pause_max": meters.pauses.longest,
        "nonfinite_rows": meters.nonfinite_rows,
        "resumed_at": list(meters.resumed_at),
        "facts": facts,
    }


def read_sleeps(folder: Path, nbytes: int) -> list[dict[str, Any]]:
    """The sleeps in the first `nbytes` of sleeps.jsonl, as they were recorded.

    Of more than 32 MiB, some fifty thousand sleeps, the last ones.

    Raises:
        Refused: the file is not what a session wrote.
    """
    if not nbytes:
        return []
    start = max(0, nbytes - MAX_LOG_BYTES)
    try:
        with open_regular(folder / SLEEPS, MAX_FILE_BYTES) as file:
            file.seek(start)
            lines = file.read(nbytes - start).splitlines()
        rows = [parse_json(line, SLEEPS) for line in lines[1 if start else 0 :]]
        if not all(type(row) is dict for row in rows):
            raise ValueError(f"{SLEEPS}: a line is no object")
    except ValueError as error:
        what = str(error).splitlines()[0]
        remedy = "put it back as it was, or use another --session"
        raise Refused(f"the session in {folder} cannot be used", what, remedy) from error
    return rows


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Replace summary.json."""
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / SUMMARY, text.encode() + b"\n")


def read_summary(folder: Path, manifest: Manifest) -> dict[str, Any] | None:
    """The summary that was written for this very snapshot, None if there is none."""
    try:
        with open_regular(folder / SUMMARY, MAX_BYTES) as file:
            summary = parse_json(file.read(), SUMMARY)
    except ValueError:
        return None
    now = summarise(manifest, 0, [])
    if type(summary) is not dict or any(summary.get(name) != now[name] for name in COUNTS):
        return None
    whole = _kinds(summary) == _kinds(now)
    return summary if whole and all(map(_is_fact, summary["facts"])) else None


def _is_fact(row: Any) -> bool:
    kinds = dict.fromkeys(("kind", "question", "answer", "predicted"), str)
    kinds |= {"correct": bool, "known": bool, "confidence": float, "age_tokens": float}
    return type(row) is dict and _kinds(row) == kinds


def _kinds(values: dict[str, Any]) -> dict[str, type]:
    """The type of every value; a number is a number, whole or not."""
    kinds = {name: type(value) for name, value in values.items()}
    return {name: float if kind is int else kind for name, kind in kinds.items()}
