"""Ask a model of `configs/depo.yaml` for nodes some hops away, after N passes over each window.

    python scripts/depo_accuracy.py runs/depo/last
    python scripts/depo_accuracy.py runs/depo/last --passes 1,2,4,8 --evict keep

Cycles have all nodes, hops are powers of two, seeds are of no training. After each window of the
context the model sleeps: N - 1 more passes over it, and with `--evict hard` it is gone then. A
guess among the nodes of a cycle is right in 1 of NODES.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from recall_rows import wilson
from torch import Tensor

from wakesleep.streams.depo import QUESTION, Depo, DepoConfig
from wakesleep.streams.training_sleep import sleep_through
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.model_io import load_model

SEED = (1 << 32) + 7_919  # training draws from seeds below, its validation from 1 << 32 on
LANES = 100


@torch.inference_mode()
def ask(
    model: TTLModel, task: Depo, sequences: int, num_passes: int, evict: str
) -> dict[int, tuple[int, int]]:
    """Right answers and answers by number of hops."""
    found: dict[int, tuple[int, int]] = {}
    for number in range(-(-sequences // LANES)):
        batch = task.batch(number, LANES)
        tokens = torch.from_numpy(batch["tokens"])
        logits = _read(model, tokens, task.config.context, num_passes, evict)
        lane, column = (torch.from_numpy(batch[f"answer_{x}"]) for x in ("lane", "start"))
        right = logits[lane, column - 1 - task.config.context].argmax(-1) == tokens[lane, column]
        hops = tokens[lane, column - QUESTION + 1]
        for hop in hops.unique().tolist():
            before, asked = found.get(hop, (0, 0))
            here = hops == hop
            found[hop] = before + int(right[here].sum()), asked + int(here.sum())
    return found


def _read(model: TTLModel, tokens: Tensor, context: int, num_passes: int, evict: str) -> Tensor:
    """Logits of all that stands behind the context, which is slept through window by window."""
    state, window = model.init_state(len(tokens)), model.config.window
    for start in range(0, context, window):
        _, state, _ = model(tokens[:, start : start + window], state, head=False)
        state = sleep_through(model, state, num_passes, evict)
    return model(tokens[:, context:], state)[0]


def rows(found: dict[int, tuple[int, int]]) -> Iterator[str]:
    """Cells of a table: the share of right answers, with its interval."""
    for right, asked in (found[hop] for hop in sorted(found)):
        low, high = wilson(right, asked)
        yield f"{right / asked:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Read the command line, ask, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--passes", default="1,2,4", help="numbers N, the reading counted")
    parser.add_argument("--evict", choices=("hard", "keep"), default="hard")
    parser.add_argument("--nodes", type=int, default=12)
    parser.add_argument("--hops", type=int, default=4, help="of the hardest question in training")
    parser.add_argument("--context", type=int, default=24, help="tokens in front of the questions")
    parser.add_argument("--queries", type=int, default=9)
    parser.add_argument("--sequences", type=int, default=1000)
    args = parser.parse_args()
    model = load_model(args.model)
    if args.context % model.config.window:
        parser.error(f"--context must be a multiple of the window {model.config.window}")
    config = DepoConfig(
        nodes=args.nodes, hops=args.hops, context=args.context, queries=args.queries
    )
    task = Depo(config, args.context + QUESTION * args.queries, SEED, longest=True)
    windows = args.context // model.config.window
    print(f"{args.nodes} nodes, {windows} windows of {model.config.window}, evict={args.evict}")
    for number, num_passes in enumerate(int(n) for n in args.passes.split(",")):
        found = ask(model, task, args.sequences, num_passes, args.evict)
        if not number:
            print("| passes | " + " | ".join(f"hops {hop}" for hop in sorted(found)) + " |")
            print("|--:|" + "--:|" * len(found))
        print(f"| {num_passes} | " + " | ".join(rows(found)) + " |", flush=True)


if __name__ == "__main__":
    main()
