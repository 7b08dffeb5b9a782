"""A hundred sleeps, one after the other: what the first ones wrote is still known after the last.

    wakesleep stream --session runs/encyclopaedia
    python scripts/sleep_retention.py runs/encyclopaedia
    python scripts/sleep_retention.py runs/encyclopaedia --items 10 --expansion 4

The pairs that the session's store holds come once more, in the order in which they were read, so
many new ones per head and sleep; nothing else is in the store then. Every sleep is the one that
streams sleep (budget, gate and all), into fresh fast weights. Known means that of the values of all
items the right one is nearest to what the fast weights give back; heads that sleep does not write
are left out. Beside it: all items written together, without a gate (a ridge fit, or 300 steps of
Adam).
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace

import torch
import torch.nn.functional as F
from recall_rows import wilson
from torch import Tensor

from wakesleep.consolidation.budget import Ledger
from wakesleep.consolidation.costs import sizes_of
from wakesleep.consolidation.replay import take
from wakesleep.consolidation.sleep import sleep
from wakesleep.consolidation.sleep_config import SleepConfig
from wakesleep.kernels.protected_write import joint_ridge
from wakesleep.kernels.rehearsed_write import rehearsed_write
from wakesleep.streams.session import Session
from wakesleep.ttl.fast import FastConfig, answer, no_fast_weights
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.state import StoreState, StreamState

TENTHS = 10  # of the sleeps, in the table


def arrange(session: Session, expansion: int) -> tuple[TTLModel, StreamState, int]:
    """The session's model and state with fast weights in its first layer with a store: that one."""
    found, state = session.language_model.model, session.runner.state
    layer = found.config.store_layers[0]
    kind = FastConfig(kind="mlp", expansion=expansion) if expansion else FastConfig()
    model = TTLModel(replace(found.config, fast_layers=(layer,), fast=kind)).eval()
    model.load_state_dict(model.state_dict() | found.state_dict())
    model = model.to(next(found.parameters()).dtype)
    store = state.blocks[layer].store
    B, H, S, K = store.k.shape
    fast = no_fast_weights(store.k, B, H, K, S, hidden=expansion * K)
    blocks = list(state.blocks)
    blocks[layer] = blocks[layer]._replace(fast=fast)
    return model, state._replace(blocks=tuple(blocks)), layer


def items_of(store: StoreState, count: int) -> Tensor:
    """Places [B, H, count] of pairs evenly spread over the stream, in its order."""
    held = int((store.position >= 0).sum(-1).min())
    if held < count:
        raise SystemExit(f"the store holds {held:,} pairs per head, {count:,} are wanted")
    last = torch.where(store.position >= 0, store.position, torch.iinfo(torch.int64).max)
    order = last.argsort(-1)[..., :held]
    return order[..., torch.linspace(0, held - 1, count).long()]


def known(s: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Which of the items [B, H, n] s tells from all others."""
    near = F.normalize(answer(s, k), dim=-1) @ F.normalize(v, dim=-1).mT
    return near.argmax(-1) == torch.arange(k.shape[2])


def at_once(k: Tensor, v: Tensor, model: TTLModel) -> Tensor:
    """Fast weights that all items were written into together: a ridge fit, or 300 steps of Adam."""
    config = model.config.fast
    if config.kind == "matrix":
        return joint_ridge(k, v, config.lam)
    B, H, _, K = k.shape
    fast = no_fast_weights(k, B, H, K, hidden=config.expansion * K)
    return rehearsed_write(fast.s, k, v, torch.ones(k.shape[:-1]), fast.old.k, steps=300)


def carry_out(model, state: StreamState, layer: int, place: Tensor, items: int, tolerance: float):
    """Sleep once per `items` places; yield the fast weights and the report after every sleep."""
    full = state.blocks[layer].store
    unit = sizes_of(state.blocks[layer]).units[-1].pairs
    config = SleepConfig(
        rule="replay",
        passes=-(-items // unit),
        tail_loss=100.0,
        tolerance=tolerance,
        worth=-1e9,  # whatever its score, what is shown is written
    )
    for number in range(place.shape[-1] // items):
        now = place[..., number * items : (number + 1) * items]
        shown = torch.zeros_like(full.position, dtype=torch.bool).scatter(-1, now, True)
        position = torch.where(shown, full.position, -1)
        blocks = list(state.blocks)
        store = full._replace(position=position)
        blocks[layer] = blocks[layer]._replace(store=store)
        state = state._replace(blocks=tuple(blocks))
        generator = torch.Generator().manual_seed(number)
        state, _, report = sleep(model, state, config, Ledger(granted=10**15), generator)
        yield state.blocks[layer].fast, report


def _share(found: Tensor) -> str:
    low, high = wilson(int(found.sum()), found.numel())
    return f"{found.double().mean():.3f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Print what is known of the items of each tenth of the sleeps, then and in the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("session")
    parser.add_argument("--sleeps", type=int, default=100)
    parser.add_argument("--items", type=int, default=1, help="new pairs per head and sleep")
    parser.add_argument("--expansion", type=int, default=0, help="of an MLP; 0 for a matrix")
    parser.add_argument("--tolerance", type=float, default=0.9)
    args = parser.parse_args()
    if args.sleeps < TENTHS or args.sleeps % TENTHS:
        parser.error(f"--sleeps must be a multiple of {TENTHS}, got {args.sleeps}")
    model, state, layer = arrange(Session.load(args.session), args.expansion)
    store = state.blocks[layer].store
    place = items_of(store, args.sleeps * args.items)
    space = model.blocks[layer].attention.fast.space
    heads = space.answers  # sleep writes no others
    k, v = (take(t, place)[:, heads] for t in (space.keys(store.k), store.v.float()))
    per_tenth, then, rules, refused = args.sleeps // TENTHS, [], Counter(), 0
    nights = carry_out(model, state, layer, place, args.items, args.tolerance)
    for number, (fast, report) in enumerate(nights, 1):
        rules.update(report.rules)
        refused += report.rejected
        if number % per_tenth == 0:
            end = number * args.items
            new = slice(end - per_tenth * args.items, end)
            then.append(known(fast.s[:, heads], k, v)[..., new])
    last, ceiling = (
        known(s, k, v).chunk(TENTHS, -1) for s in (fast.s[:, heads], at_once(k, v, model))
    )
    print(f"| sleeps | known right after | in the end | of all at once | of |\n|---|{4 * '--:|'}")
    for tenth in range(TENTHS):
        span = f"{tenth * per_tenth + 1} to {(tenth + 1) * per_tenth}"
        cells = [_share(found[tenth]) for found in (then, last, ceiling)]
        print(f"| {span} | {' | '.join(cells)} | {last[tenth].numel()} |")
    written = len(store.position) * int(heads.sum())
    print(f"\n{args.items} new pairs per head, {written} heads, width {k.shape[-1]}")
    told = ", ".join(f"{count} because {rule}" for rule, count in rules.items())
    print(f"refused: {refused} writes{': ' * bool(told)}{told}")


if __name__ == "__main__":
    main()
