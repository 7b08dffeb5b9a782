"""Find the places of a text that an admission head takes for facts.

    python scripts/mine_negatives.py MODEL train.npy --output hard.npy    (then data.mixture.hard=)
    python scripts/mine_negatives.py MODEL valid.npy                      (how selective it is)

Says for each head of each store which share of the tokens scores above the median token of a fact
in training sequences, and above the weakest tenth of them: a store keeps the best of everything, so
this share of ten million tokens stands between it and a fact. With --output, the highest scores of
every head are written as positions (int64 .npy): passages around them are the noise that teaches
most.
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
FACT_BATCHES = 16  # of training sequences, for the scores of facts
LEVELS = (0.5, 0.1)  # of the scores of facts
APART = 64  # tokens between two places of one head


class Scores:
    """Scores of every token of a call, from the admission heads of all stores: [B, T, heads].

    They are caught as long as the context is open.
    """

    def __init__(self, model: TTLModel) -> None:
        self._found: list[Tensor] = []
        self._heads = [b.attention.store.head for b in model.blocks if b.attention.store]
        if not self._heads:
            raise ValueError("the model has no store with a learned admission head")

    def __enter__(self) -> "Scores":
        def catch(_module, _inputs, out: Tensor) -> None:
            self._found.append(out)

        self._hooks = [head.register_forward_hook(catch) for head in self._heads]
        return self

    def __exit__(self, *_exception) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> np.ndarray:
        scores = torch.cat(self._found, -1).float().numpy()
        self._found = []
        return scores


def fact_scores(model: TTLModel, scores: Scores, corpus: Path, lanes: int) -> np.ndarray:
    """[N, heads] scores of the tokens that are facts in sequences with facts in text."""
    shares = {sort: (float(sort == "recall"),) for sort in SORTS}
    mixture = Mixture(MixtureConfig(corpus=str(corpus), **shares), SEGMENT, seed=1 << 20)
    found = []
    for number in range(FACT_BATCHES):
        batch = mixture.batch(number, lanes)
        model(torch.from_numpy(batch["tokens"]), model.init_state(lanes, capacity=1), head=False)
        found.append(scores.take()[batch["fact"]])
    return np.concatenate(found)


def read_text(
    model: TTLModel,
    scores: Scores,
    ids: np.ndarray,
    tokens: int,
    lanes: int,
    progress: Callable[[int], None],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions [B, T] and scores [B, T, heads] of a text that `lanes` readers share.

    They begin at equal distances and read `tokens` together, so a part of a corpus is from all of
    its documents.
    """
    first = np.arange(lanes)[:, None] * (len(ids) // lanes)
    length = min(tokens, len(ids)) // lanes
    rows = np.stack([ids[start : start + length] for start in first[:, 0]])
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
    """Share of tokens above the `LEVELS` of facts [levels, heads]; where the highest scores are."""
    ids = np.load(corpus, mmap_mode="r", allow_pickle=False)
    tokens = min(tokens, len(ids))

    def progress(done: int) -> None:
        print(f"\r{done:,} of {tokens:,} tokens", end="", file=sys.stderr, flush=True)

    with Scores(model) as scores:
        levels = np.quantile(fact_scores(model, scores, corpus, lanes), LEVELS, axis=0)
        above, read = np.zeros_like(levels), 0
        kept = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in levels[0]]
        for positions, found in read_text(model, scores, ids, tokens, lanes, progress):
            above += (found > levels[:, None, None]).sum((1, 2))
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
    parser.add_argument("--tokens", type=int, default=4_000_000, help="to read, of all the corpus")
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--per-head", type=int, default=8_000, help="positions of each head")
    args = parser.parse_args()
    share, places = mine(
        load_model(args.model),
        args.corpus,
        tokens=args.tokens,
        lanes=args.lanes,
        per_head=args.per_head,
    )
    for head, (median, weak) in enumerate(share.T):
        print(
            f"head {head}: {median:.2e} of the tokens score above the median fact, "
            f"{weak:.2e} above the weakest tenth"
        )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        np.save(args.output, places)
        print(f"{args.output}: {len(places):,} places")


if __name__ == "__main__":
    main()
