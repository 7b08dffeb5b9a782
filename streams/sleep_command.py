"""`wakesleep sleep`: consolidate what a session holds, while nothing comes in."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wakesleep.streams.console import Console, typed
from wakesleep.streams.errors import Refused
from wakesleep.streams.quantities import count, duration
from wakesleep.streams.stopping import Stopped

if TYPE_CHECKING:
    from wakesleep.streams.session import Session

SUMMARY = "sleep over a session at rest, on a budget of its own"
FLAGS = ("--config", "--json", "--quiet", "--debug")
BUDGET = "sleep.budget"


def help_text() -> str:
    return """\
wakesleep sleep DIR sleep.budget=FLOPS [--config YAML] [--json] [key=value ...]

  wakesleep sleep runs/book sleep.budget=1e12       a thousand GFLOPs of it
  wakesleep sleep runs/book sleep.budget=1e12 sleep.tolerance=0.8
  wakesleep sleep runs/book sleep.budget=1e12 sleep.rule=cross

Reads nothing. By replay, pairs of the exact store are written into fast
weights, block by block; what a block harms is put back, and the places of what
is known by heart are freed. It ends when the budget is spent or nothing is
gained. By recurrence (recurrent: the last tokens; cross: spans of the store)
the blocks pass over text once more. The model must have fast weights.

  --json   {sleeps, sleep_flops, gate_flops, wasted_flops, seconds} on stdout
  --config YAML      keys from a file, such as those that tune ends with
  --quiet, --debug   the last line only; tracebacks
Keys: sleep.rule=replay sleep.passes=8 sleep.worth=0 sleep.tolerance=0.6
      sleep.tail_loss=0.01 sleep.span_tokens=256 sleep.evict=keep|hard threads=N"""


def run(arguments: argparse.Namespace) -> int:
    """Sleep and say what came of it."""
    folder, grant, overrides = _sort(arguments.items)
    console = Console(json=arguments.json, quiet=arguments.quiet)

    from wakesleep.streams.config import flat, load_config
    from wakesleep.streams.progress import Progress
    from wakesleep.streams.session import Session
    from wakesleep.streams.snapshot import read_manifest
    from wakesleep.streams.stream_config import StreamConfig

    read_manifest(Path(folder))  # before a folder is opened that would be a new session
    config, origins = load_config(StreamConfig, arguments.config, overrides)
    given = {key: value for key, value in flat(config).items() if origins[key] != "default"}
    with Session.open(folder, **given) as session:
        session.check_rest(grant)
        console.say(f"sleeping over {typed(folder)}; Ctrl-C keeps the sleeps that are finished")
        granted = session.runner.meters.ledger.granted
        try:
            with Progress(console, session.tokens) as progress:
                rows = session.sleep(grant, watch=progress)
        except Stopped:
            left = grant - session.runner.meters.ledger.granted + granted
            console.warn(f"stopped; the sleeps that were finished are saved in {typed(folder)}")
            yaml = ["--config", arguments.config] if arguments.config else []
            keys = shlex.join([f"{BUDGET}={left}", *yaml, *overrides])
            console.warn(f"go on with: wakesleep sleep {typed(folder)} {keys}")
            raise
        words = _words(folder, rows, grant) if rows else _no_sleep(session, grant)
    console.result(_totals(rows), words)
    return 0


def _sort(items: list[str]) -> tuple[str, int, list[str]]:
    """The folder, the budget, and the other keys."""
    from wakesleep.streams.values import parse_count

    if not items:
        raise Refused(
            "sleep needs the folder of a session", "", f"wakesleep sleep DIR {BUDGET}=1e12"
        )
    folder = next((item for item in items if "=" not in item or Path(item).exists()), items[0])
    keys = list(items)
    keys.remove(folder)
    given = [key.partition("=")[2] for key in keys if key.startswith(f"{BUDGET}=")]
    if not given:
        raise Refused(
            f"{BUDGET}: needed, in FLOPs", "", f"wakesleep sleep {typed(folder)} {BUDGET}=1e12"
        )
    try:
        grant = parse_count(given[-1])
    except ValueError:
        raise Refused(
            f"{BUDGET}={given[-1]}: expected a whole number of FLOPs up to 9e18 (1e12)"
        ) from None
    return folder, grant, [key for key in keys if not key.startswith(f"{BUDGET}=")]


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    sums = ("sleep_flops", "gate_flops", "wasted_flops", "seconds")
    return {"sleeps": rows, **{name: sum(row[name] for row in rows) for name in sums}}


def _no_sleep(session: Session, grant: int) -> str:
    if session.rest_config.does_nothing:
        return f"slept nothing: sleep.passes={session.rest_config.num_passes} leaves nothing to do"
    least = count(session.least_budget())
    return f"slept nothing: a sleep here takes {least} FLOPs at least, {BUDGET} is {count(grant)}"


def _words(folder: str, rows: list[dict[str, Any]], grant: int) -> str:
    taken = [row for row in rows if row["accepted"]]
    written, released = (sum(row[name] for row in taken) for name in ("written", "released"))
    what = f"{written:,} pairs written, {released:,} places freed"
    if rows[0]["rule"] != "replay":
        what = f"{sum(row['units'] for row in taken)} more passes"
    spent = sum(row[name] for row in rows for name in ("sleep_flops", "gate_flops", "wasted_flops"))
    seconds = duration(sum(row["seconds"] for row in rows))
    slept = f"{len(rows)} sleeps" if len(rows) > 1 else "1 sleep"
    lines = [
        f"{slept} in {seconds}, {count(spent)} of {count(grant)} FLOPs: {what}",
        f"ended because: {rows[-1]['reason']}",
        f"next: wakesleep ask {typed(folder)}",
    ]
    audit = rows[-1]["audit"]
    if audit is not None:
        lines.insert(1, f"of pairs written long ago {audit:.1%} are still known")
    return "\n".join(lines)
