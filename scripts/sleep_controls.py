"""Sleep in a stream beside its controls: what else the same compute, or the same bytes, would buy.

    python scripts/sleep_controls.py
    python scripts/sleep_controls.py --only awake,asleep,noise store.capacity=512 limit_tokens=1M

Every row reads the same text with the same facts in it, through the code that streams; several
seeds of the facts are counted together. The rows:

    awake             the store as small as in sleep
    asleep            sleep by replay
    noise             the same, with random values written in place of the pairs' own
    shuffled          the same, with the values of other pairs
    flipped           the same, but every write goes the other way
    ... ungated       the same with no write refused and no sleep undone; all that was written
                      counts as known
    equal compute     awake, with a store so large that reading costs what `asleep` cost in all
    equal bytes       awake, with a store larger by what fast weights, their keys and probes weigh
    wider window      awake, with a window so wide that reading costs what `asleep` cost in all
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from recall_rows import wilson
from sleep_capacity import bytes_per_head

from wakesleep.consolidation import replay_sleep
from wakesleep.consolidation.gate import Verdict
from wakesleep.streams import Session
from wakesleep.streams.config import flat, load_config, split_overrides
from wakesleep.streams.language_model import load_language_model, pick_device, pick_dtype
from wakesleep.streams.results import by_training
from wakesleep.streams.stream_config import StreamConfig
from wakesleep.ttl.flops import wake_flops
from wakesleep.ttl.model import ModelConfig

USUAL = {"limit_tokens": "200k", "facts.count": "128", "store.capacity": "512"}
SPOILT = ("noise", "shuffled", "flipped")
UNGATED = " ungated"
ASLEEP = ("asleep", *SPOILT)
ROWS = ("awake", *ASLEEP, *(name + UNGATED for name in ASLEEP))
CONTROLS = ("equal compute", "equal bytes", "wider window")
HEAD = ["", "places, window", "right", "95 %", "bits per byte", "MFLOP per token", "of sleep"]
HEAD += ["refused, undone"]


class Row(NamedTuple):
    right: int
    asked: int
    bits: float  # per byte, mean over the seeds
    flops: float  # per token, of reading and of sleep
    asleep: float  # of these, of sleep
    told: str  # writes of heads that the gate refused, and sleeps that came to nothing


def spoilt(name: str, change: Callable) -> Callable:
    """The write of a unit, with what a control does to it."""

    def write(fast, pairs, lam: float, steps: int):
        match name:
            case "noise":
                v = torch.randn(pairs.v.shape, generator=torch.Generator().manual_seed(0))
                v = v * (pairs.v.norm(dim=-1) / v.norm(dim=-1))[..., None]
                return change(fast, pairs._replace(v=v), lam, steps)
            case "shuffled":
                return change(fast, pairs._replace(v=pairs.v.roll(1, 2)), lam, steps)
        full = change(fast, pairs, lam, steps)
        return full._replace(s=2 * fast.s - full.s)

    return write


def taken(fast, full, pairs, cues, standard) -> Verdict:
    """The verdict of a gate that refuses nothing."""
    some = pairs.chosen.any(-1)
    return Verdict(some.float(), some, some, some, torch.zeros_like(some, dtype=torch.int64))


def believed(fast, pairs, standard) -> torch.Tensor:
    """All that was written counts as known, whatever comes back."""
    return pairs.chosen


@contextlib.contextmanager
def control(name: str) -> Iterator[None]:
    """Sleep as the control of this name has it, while this lasts."""
    kind, ungated = name.removesuffix(UNGATED), name.endswith(UNGATED)
    with contextlib.ExitStack() as patches:
        if kind in SPOILT:
            write = spoilt(kind, replay_sleep.change)
            patches.enter_context(mock.patch.object(replay_sleep, "change", write))
        if ungated:
            patches.enter_context(mock.patch.object(replay_sleep, "judge", taken))
            patches.enter_context(mock.patch.object(replay_sleep, "known_after", believed))
        yield


def stream(options: dict[str, Any], document: str | None, seeds: list[int]) -> Row:
    """Read the document with each seed of the facts."""
    right = asked = refused = undone = tokens = 0
    flops = asleep = bits = 0.0
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            given = {**options, "facts.seed": seed}
            with Session.open(Path(folder) / "session", **given) as session:
                summary = session.read(document)
        facts = by_training(summary["facts"])[0] or summary["facts"]
        right, asked = right + sum(f["correct"] for f in facts), asked + len(facts)
        spent = sum(summary[f"{part}_flops"] for part in ("sleep", "gate", "wasted"))
        asleep, flops = asleep + spent, flops + spent + summary["wake_flops"]
        tokens, bits = tokens + summary["tokens"], bits + summary["bits_per_byte"] / len(seeds)
        refused += sum(night["rejected"] for night in summary["sleep_log"])
        undone += sum(not night["accepted"] for night in summary["sleep_log"])
    told = f"{refused}, {undone}" if asleep else ""
    return Row(right, asked, bits, flops / tokens, asleep / tokens, told)


def largest(cost: Callable[[int], float], most: float, step: int) -> int:
    """The largest multiple of `step` that costs at most that much."""
    size = step
    while cost(size + step) <= most:
        size += step
    return size


def sizes_of(
    c: ModelConfig, places: int, tokens: int, flops: float, dtype: torch.dtype
) -> dict[str, dict[str, int]]:
    """The keys of each control in CONTROLS, for a cost of so many FLOPs per token."""

    def cost(**sizes: int) -> float:
        return wake_flops(c, 0, tokens, **sizes) / tokens

    wide = c.fast.expansion if c.fast.kind == "mlp" else 0
    weighs, place = bytes_per_head(c.head_dim, wide, places, dtype)
    more = -(-weighs * len(c.fast_layers) // (place * len(c.store_layers)))
    wide = largest(lambda n: cost(window=n, capacity=places), flops, c.chunk)
    large = largest(lambda n: cost(capacity=n), flops, 16)
    return {
        "equal compute": {"store.capacity": large},
        "equal bytes": {"store.capacity": places + more},
        "wider window": {"store.capacity": places, "window": wide},
    }


def main() -> None:
    """Read the command line, stream, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("options", nargs="*", help="key=value of `wakesleep stream`")
    parser.add_argument("--document", help="a file; the bundled one if left out")
    parser.add_argument("--seeds", default="0,1", help="of the facts")
    parser.add_argument("--only", default=",".join((*ROWS, *CONTROLS)), help="rows, with commas")
    args = parser.parse_args()
    config, _ = load_config(StreamConfig, None, USUAL | split_overrides(args.options))
    places, seeds = config.store.capacity, [int(seed) for seed in args.seeds.split(",")]
    dtype = getattr(torch, pick_dtype(config.dtype, pick_device(config.device)))
    c = load_language_model(config.model).model.config
    rows = args.only.split(",")
    if unknown := [name for name in rows if name not in ROWS + CONTROLS]:
        parser.error(f"--only {unknown[0]}: the rows are {', '.join(ROWS + CONTROLS)}")
    first = next((name for name in rows if name in CONTROLS or name == "asleep"), "asleep")
    if first != "asleep":
        parser.error(f"--only: {first} is compared with asleep, which must stand before it")
    print(f"| {' | '.join(HEAD)} |\n|---{'|--:' * (len(HEAD) - 1)}|")
    most = 0.0  # FLOPs per token of `asleep`
    for name in rows:
        given = flat(config)
        if name in CONTROLS:
            given |= sizes_of(c, places, config.limit_tokens, most, dtype)[name]
        elif name.removesuffix(UNGATED) in ASLEEP:
            given["sleep.rule"] = "replay"
            given |= {"sleep.tail_loss": 100.0} if name.endswith(UNGATED) else {}
        with control(name):
            row = stream(given, args.document, seeds)
        most = row.flops if name == "asleep" else most
        low, high = wilson(row.right, row.asked)
        sizes = f"{given['store.capacity']:,}, {given['window'] or c.window}"
        right = f"{row.right} of {row.asked} | {low:.2f} to {high:.2f}"
        cost = f"{row.flops / 1e6:.2f} | {row.asleep / 1e6:.2f}"
        print(f"| {name} | {sizes} | {right} | {row.bits:.4f} | {cost} | {row.told} |", flush=True)


if __name__ == "__main__":
    main()
