"""Find the places of a text that an admission head takes for facts.

    python scripts/mine_negatives.py MODEL train.npy --output hard.npy    (then data.mixture.hard=)
    python scripts/mine_negatives.py MODEL valid.npy                      (how selective it is)

Says for each head of each store which share of the tokens scores above the median token of a fact
in training sequences: a store keeps the best of everything, so this share of ten million tokens
stands between it and a fact. With --output, the highest scores of every head are written as
positions (int64 .npy): passages around them are the noise that teaches most.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wakesleep.streams.mixture import SORTS, Mixture, MixtureConfig
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.model_io import load_model

SEGMENT = 1024  # tokens of a call
FACT_BATCHES = 16  # of training sequences, for the median fact
APART = 64  # tokens between two places of one head


class Scores:
    """Scores of every token of a call, from the admission heads of all stores: [B, T, heads]."""

    def __init__(self, model: TTLModel) -> None:
        self._found: list[Tensor] = []
        heads = [b.attention.store.head for b in model.blocks if b.attention.store is not None]
        if not heads:
            raise ValueError("the model has no store with a learned admission head")
        for head in heads:
            head.register_forward_hook(lambda _module, _inputs, out: self._found.append(out))

    def take(self) -> np.ndarray:
        scores = torch.cat(self._found, -1).float().numpy()
        self._found = []
        return scores


def median_fact(model: TTLModel, scores: Scores, corpus: Path, lanes: int) -> np.ndarray:
    """[heads] median score of the tokens that are facts in sequences with facts in text."""
    shares = {sort: (float(sort == "recall"),) for sort in SORTS}
    mixture = Mixture(MixtureConfig(corpus=str(corpus), **shares), SEGMENT, seed=1 << 20)
    found = []
    for number in range(FACT_BATCHES):
        batch = mixture.batch(number, lanes)
        model(torch.from_numpy(batch["tokens"]), model.init_state(lanes, capacity=1), head=False)
        found.append(scores.take()[batch["fact"]])
    return np.median(np.concatenate(found), 0)


def read_text(
    model: TTLModel, scores: Scores, ids: np.ndarray, lanes: int, progress: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions [B, T] and scores [B, T, heads] of a text read by `lanes` readers side by side."""
    length = len(ids) // lanes
    rows = ids[: length * lanes].reshape(lanes, length)
    first = np.arange(lanes)[:, None] * length
    state = model.init_state(lanes, capacity=1)
    for start in range(0, length, SEGMENT):
        part = rows[:, start : start + SEGMENT]
        tokens = torch.from_numpy(part.astype(np.int64))
        _, state, _ = model(tokens, state, head=False)
        yield first + np.arange(start, start + part.shape[1]), scores.take()
        progress(min(start + SEGMENT, length) * lanes)


def highest(positions: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """The positions of the `count` highest scores [N], none within `APART` of a higher one."""
    order = np.argsort(-scores, kind="stable")
    taken: list[int] = []
    near: set[int] = set()
    for position in positions[order]:
        cell = int(position) // APART
        if cell not in near:
            taken.append(int(position))
            near |= {cell - 1, cell, cell + 1}
        if len(taken) == count:
            break
    return np.array(taken, np.int64)


@torch.inference_mode()
def mine(
    model: TTLModel, corpus: Path, *, tokens: int, lanes: int, per_head: int
) -> tuple[np.ndarray, np.ndarray]:
    """Share of tokens above the median fact [heads], and the positions of the highest scores."""
    scores = Scores(model)
    median = median_fact(model, scores, corpus, lanes)
    ids = np.load(corpus, mmap_mode="r", allow_pickle=False)[:tokens]
    above, read = np.zeros(len(median)), 0
    kept = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in median]

    def progress(done: int) -> None:
        print(f"\r{done:,} of {len(ids):,} tokens", end="", file=sys.stderr, flush=True)

    for positions, found in read_text(model, scores, ids, lanes, progress):
        above += (found > median).sum((0, 1))
        read += positions.size
        for head, (places, best) in enumerate(kept):
            places = np.concatenate([places, positions.ravel()])
            best = np.concatenate([best, found[..., head].ravel()])
            top = np.argsort(-best, kind="stable")[: 8 * per_head]
            kept[head] = (places[top], best[top])
    print(file=sys.stderr)
    return above / read, np.unique(np.concatenate([highest(*pair, per_head) for pair in kept]))


def main() -> None:
    """Read the command line, mine, and say how selective the model is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("corpus", type=Path, help=".npy of scripts/build_corpus.py")
    parser.add_argument("--output", type=Path, help="a .npy file for the positions")
    parser.add_argument(
        "--tokens", type=int, default=4_000_000, help="of the corpus, from its start"
    )
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--per-head", type=int, default=8_000, help="positions of each head")
    args = parser.parse_args()
    share, places = mine(
        load_model(args.model),
        args.corpus,
        tokens=args.tokens,
        lanes=args.lanes,
        per_head=args.per_head,
    )
    for head, value in enumerate(share):
        print(f"head {head}: {value:.2e} of the tokens score above the median fact")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        np.save(args.output, places)
        print(f"{args.output}: {len(places):,} places")


if __name__ == "__main__":
    main()
