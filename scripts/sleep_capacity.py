"""How many made-up pairs replay gets into fast weights, next to what all at once would give.

    python scripts/sleep_capacity.py
    python scripts/sleep_capacity.py --expansion 4 --pairs 128,256,512,1024
    python scripts/sleep_capacity.py --pairs 64,512 --tolerances 0.5 --width 128

Keys of length 1 and values at random; units of half the width (of twice the width for an MLP, whose
hidden width is --expansion head widths), each behind the gate, until nothing more is taken. At
once: the ridge fit of a matrix, 300 steps of Adam of an MLP. Recall is the share of the pairs whose
value is the nearest of all values.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wakesleep.consolidation.gate import NOISE_CUES, advance, judge, known_after, set_aside
from wakesleep.consolidation.replay import (
    Standard,
    can_be_asked,
    change,
    choose,
    keep_keys,
    mark,
    take,
)
from wakesleep.kernels.protected_write import joint_ridge
from wakesleep.kernels.rehearsed_write import rehearsed_write
from wakesleep.streams.quantities import size
from wakesleep.ttl.fast import answer, no_fast_weights
from wakesleep.ttl.key_space import unit_key
from wakesleep.ttl.state import SPAN, StoreState, flatten

LANES, HEADS, LAM = 4, 4, 0.05
MOST_UNITS = 40


def make_store(num_pairs: int, width: int, generator: torch.Generator) -> StoreState:
    """A full store of random pairs with random scores."""
    shape = (LANES, HEADS, num_pairs)
    k, v = torch.randn(2, *shape, width, generator=generator)
    score = torch.randn(*shape, generator=generator)
    position = torch.arange(num_pairs).expand(shape).clone()
    span = torch.full((*shape, SPAN), -1, dtype=torch.int32)
    return StoreState(unit_key(k), v, score, 0 * score, position, span, score[..., :3])


def replayed(
    store: StoreState, tolerance: float, generator: torch.Generator, expansion: int
) -> Tensor:
    """The fast weights [B, H, K, Y] when the gate takes nothing more."""
    width, lane = store.k.shape[-1], torch.arange(LANES)
    sizes = (LANES, HEADS, width, store.k.shape[2])
    fast = no_fast_weights(store.k, *sizes, hidden=expansion * width)
    standard = Standard(tolerance, torch.zeros(HEADS))  # queries are keys
    for _ in range(MOST_UNITS):
        pairs = choose(store, fast, 2 * width if expansion else width // 2, -math.inf)
        full = change(fast, pairs, LAM)
        cues = unit_key(torch.randn(NOISE_CUES, width, generator=generator))
        step = judge(fast, full, pairs, cues, standard).step
        if not bool((step > 0).any()):
            break
        new = advance(fast, full, step)
        known = known_after(new, pairs, standard) & (step > 0)[..., None]
        position = take(store.position, pairs.place)
        new = keep_keys(new, store, pairs, known)
        new = set_aside(new, pairs, position, known & can_be_asked(new, position), lane)
        fast = mark(store, new, pairs, standard)
    return fast.s


def at_once(store: StoreState, expansion: int) -> Tensor:
    """Fast weights that all pairs were written into together, without a gate."""
    if not expansion:
        return joint_ridge(store.k, store.v, LAM)
    width = store.k.shape[-1]
    fast = no_fast_weights(store.k, LANES, HEADS, width, hidden=expansion * width)
    weight = torch.ones(store.k.shape[:-1])
    return rehearsed_write(fast.s, store.k, store.v, weight, fast.old.k, 300)


def bytes_per_head(
    width: int, expansion: int, places: int = 0, dtype: torch.dtype = torch.bfloat16
) -> tuple[int, int]:
    """Of fast weights with all that guards them, and of a place of the store without them.

    Args:
        places: of the store that the fast weights are beside: each has a mark.
        dtype: of the window.
    """
    like = torch.zeros(1, dtype=dtype)
    fast = no_fast_weights(like, 1, 1, width, places, hidden=expansion * width)
    place = 2 * width * like.itemsize + 2 * 4 + 8 + 4 * SPAN  # score, mass, position, ids
    return sum(t.nbytes for t in flatten(fast).values()), place


def recall(s: Tensor, store: StoreState) -> float:
    """Share of the pairs that are told from all others."""
    near = F.normalize(answer(s, store.k), dim=-1) @ F.normalize(store.v, dim=-1).mT
    return float((near.argmax(-1) == torch.arange(near.shape[-1])).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", default="32,64,128,256")
    parser.add_argument("--tolerances", default="0.9,0.6,0.4")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--expansion", type=int, default=0, help="of an MLP; 0 for a matrix")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tolerances = [float(t) for t in args.tolerances.split(",")]
    ceiling = "Adam 300" if args.expansion else "ridge"
    head = ["pairs", *(f"tolerance {t:g}" for t in tolerances), ceiling]
    print("| " + " | ".join(head) + " |\n|" + "--:|" * len(head))
    for num_pairs in map(int, args.pairs.split(",")):
        generator = torch.Generator().manual_seed(args.seed + num_pairs)
        store = make_store(num_pairs, args.width, generator)
        found = [recall(replayed(store, t, generator, args.expansion), store) for t in tolerances]
        found.append(recall(at_once(store, args.expansion), store))
        print(f"| {num_pairs} | " + " | ".join(f"{x:.2f}" for x in found) + " |", flush=True)
    fast, place = bytes_per_head(args.width, args.expansion)
    print(f"\nfast weights, probes, old keys: {size(fast)} per head, {fast // place} store places")


if __name__ == "__main__":
    main()
