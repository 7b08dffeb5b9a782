"""What a small model knows of many times as many pairs as its store has places, asleep and awake.

    python scripts/sleep_pairs.py runs/pairs/last              # a model of configs/pairs.yaml
    python scripts/sleep_pairs.py runs/pairs/last --store 256 --times 1,4,8 --kinds mlp --gap 6

P different keys with a value each and some filler between, then every key is asked for, from the
state behind the last of them. The rows of a table:

    awake        a store of --store places
    equal bytes  awake, a store that is larger by what fast weights, probes and old keys weigh
    matrix, mlp  --store places, and a sleep by replay whenever the store is nearly full
    at once      --store places, and fast weights that all P pairs were written into together: the
                 ridge fit of a matrix, 300 steps of Adam of an MLP

Sequences are of seeds that no training uses; a lane each, intervals of 95 %.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from recall_rows import wilson
from sleep_capacity import bytes_per_head
from torch import Tensor

from wakesleep.consolidation.budget import Cost, Ledger
from wakesleep.consolidation.replay import Pairs as Written
from wakesleep.consolidation.replay import keep_keys, opened, readable
from wakesleep.consolidation.sleep import pressure, sleep
from wakesleep.consolidation.sleep_config import SleepConfig
from wakesleep.kernels.protected_write import joint_ridge
from wakesleep.kernels.rehearsed_write import rehearsed_write
from wakesleep.ttl.fast import open_keys
from wakesleep.ttl.flops import wake_flops
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.model_io import load_model
from wakesleep.ttl.state import StreamState, select

SEED = (1 << 32) + 7_919  # training draws from seeds below, its validation from 1 << 32 on
SEGMENT = 128  # tokens between two looks at the pressure
ASKED = 256  # questions at a time
ADAM_STEPS = 300


class Pairs(NamedTuple):
    tokens: Tensor  # [B, T] what is read
    key: Tensor  # [B, P]
    value: Tensor  # [B, P]


def draw(num_pairs: int, gap: int, lanes: int, vocab_size: int, window: int) -> Pairs:
    """Pairs with `gap` tokens of filler behind each on average, and behind all a window of it."""
    rng = np.random.default_rng((SEED, num_pairs))
    half = vocab_size // 2
    key = np.stack([1 + rng.permutation(half - 1)[:num_pairs] for _ in range(lanes)])
    value = rng.integers(half, vocab_size, key.shape)
    length = num_pairs * (2 + gap) + 2 * window
    length = -(-length // SEGMENT) * SEGMENT
    tokens = np.zeros((lanes, length), np.int64)
    for lane in range(lanes):
        spare = np.sort(rng.integers(0, gap * num_pairs + 1, num_pairs))
        start = 2 * np.arange(num_pairs) + spare
        tokens[lane, start], tokens[lane, start + 1] = key[lane], value[lane]
    return Pairs(*map(torch.from_numpy, (tokens, key, value)))


def read(
    model: TTLModel, pairs: Pairs, places: int, config: SleepConfig | None
) -> tuple[StreamState, Ledger]:
    """The state behind all pairs, with a sleep wherever the store was full, and what that cost."""
    lanes = len(pairs.tokens)
    state, ledger = model.init_state(lanes, capacity=places), Ledger(granted=10**18)
    generator, position = torch.Generator().manual_seed(0), 0
    for part in pairs.tokens.split(SEGMENT, 1):
        held = [open_keys(state.blocks[i].fast) for i in model.config.fast_layers]
        _, state, _ = model(part, state, head=False)
        sizes = {"capacity": places, "batch": lanes, "held": held}
        flops = wake_flops(model.config, position, SEGMENT, **sizes, head=False)
        ledger = ledger._replace(wake=ledger.wake.plus(Cost(flops)))
        position += SEGMENT
        if config is not None and pressure(model, state, config) >= config.high:
            state, ledger, _ = sleep(model, state, config, ledger, generator)
    return state, ledger


def recall(model: TTLModel, state: StreamState, pairs: Pairs) -> tuple[int, int]:
    """Right answers, and questions: each is asked of a copy of its lane."""
    right = 0
    for lane, (keys, values) in enumerate(zip(pairs.key, pairs.value, strict=True)):
        for key, value in zip(keys.split(ASKED), values.split(ASKED), strict=True):
            copies = select(state, torch.full_like(key, lane))
            logits, _, _ = model(key[:, None], copies)
            right += int((logits[:, -1].argmax(-1) == value).sum())
    return right, pairs.key.numel()


def at_once(model: TTLModel, pairs: Pairs, state: StreamState) -> StreamState:
    """`state` with fast weights that every pair was written into together."""
    full, _ = read(model, pairs, pairs.tokens.shape[1], None)
    blocks = list(state.blocks)
    for layer in model.config.fast_layers:
        store, fast = full.blocks[layer].store, blocks[layer].fast
        k = model.blocks[layer].attention.fast.space.keys(store.k)
        k, v, good = readable(store._replace(k=k))
        lane = torch.arange(len(pairs.tokens))[:, None, None]
        value = pairs.tokens >= model.config.vocab_size // 2
        known = good & value[lane, store.position.clamp(min=0)]
        k, v = (torch.where(known[..., None], t, 0.0) for t in (k, v))
        if fast.old is None:
            s = joint_ridge(k, v, model.config.fast.lam)
        else:
            s = rehearsed_write(fast.s, k, v, known.float(), k[:, :, :0], ADAM_STEPS)
            place = torch.arange(k.shape[2]).expand(known.shape)
            fast = keep_keys(fast, store, Written(place, known, k, v, ~known), known)
            fast = opened(fast, blocks[layer].store)
        blocks[layer] = blocks[layer]._replace(fast=fast._replace(s=s.to(fast.s.dtype)))
    return state._replace(blocks=tuple(blocks))


def with_kind(folder: Path, kind: str) -> TTLModel:
    """The model with fast weights of this kind: no trained weight depends on it."""
    found = load_model(folder)
    fast = dataclasses.replace(found.config.fast, kind=kind)
    model = TTLModel(dataclasses.replace(found.config, fast=fast)).eval()
    model.load_state_dict(found.state_dict(), strict=False)  # a matrix alone has gates
    return model


class Row(NamedTuple):
    name: str
    places: int
    right: int
    asked: int
    spent: float | None  # FLOPs of sleep per FLOP of reading


def rows_of(models: dict[str, TTLModel], pairs: Pairs, places: int, config: SleepConfig):
    """The rows of a table, one by one."""
    first = next(iter(models.values()))
    awake, _ = read(first, pairs, places, None)
    yield Row("awake", places, *recall(first, awake, pairs), None)
    for kind, model in models.items():
        c = model.config
        wide, dtype = c.fast.expansion if kind == "mlp" else 0, next(model.parameters()).dtype
        weighs, place = bytes_per_head(c.head_dim, wide, places, dtype)
        more = places + -(-weighs // place)
        state, _ = read(first, pairs, more, None)
        yield Row(f"equal bytes, {kind}", more, *recall(first, state, pairs), None)
        state, ledger = read(model, pairs, places, config)
        spent = ledger.sleep.flops + ledger.gate.flops + ledger.wasted.flops
        yield Row(kind, places, *recall(model, state, pairs), spent / ledger.wake.flops)
        state = at_once(model, pairs, read(model, pairs, places, None)[0])
        yield Row(f"at once, {kind}", places, *recall(model, state, pairs), None)


@torch.inference_mode()
def main() -> None:
    """Read the command line, ask, and print a table per number of pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--store", type=int, default=128, help="places")
    parser.add_argument("--times", default="1,2,4,8", help="pairs, in sizes of the store")
    parser.add_argument("--kinds", default="matrix,mlp")
    parser.add_argument("--gap", type=int, default=4, help="tokens of filler behind a pair, mean")
    parser.add_argument("--lanes", type=int, default=3, help="sequences")
    parser.add_argument("--tolerance", type=float, default=0.6)
    args = parser.parse_args()
    models = {kind: with_kind(args.model, kind) for kind in args.kinds.split(",")}
    c = next(iter(models.values())).config
    config = SleepConfig(rule="replay", tolerance=args.tolerance, tail_loss=1.0)
    for times in map(int, args.times.split(",")):
        pairs = draw(times * args.store, args.gap, args.lanes, c.vocab_size, c.window + c.chunk)
        print(f"\n{times * args.store:,} pairs, {pairs.tokens.shape[1]:,} tokens:\n")
        print("| | places | right | of | 95 % | sleep per reading |\n|---|--:|--:|--:|--:|--:|")
        for row in rows_of(models, pairs, args.store, config):
            low, high = wilson(row.right, row.asked)
            share, spent = row.right / row.asked, "" if row.spent is None else f"{row.spent:.2f}"
            cells = [row.name, f"{row.places:,}", f"{share:.3f}", f"{row.asked:,}"]
            cells += [f"{low:.3f} to {high:.3f}", spent]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
