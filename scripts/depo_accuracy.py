"""Ask a model of `configs/depo.yaml` for nodes some hops away, after N passes over each window.

    python scripts/depo_accuracy.py runs/depo/last
    python scripts/depo_accuracy.py runs/depo/last --passes 1,2,4,8 --evict keep
    python scripts/depo_accuracy.py runs/depo/last --passes 2,4 --sleep refreshed,frozen,reset

Cycles have all nodes, hops are powers of two, seeds are of no training. After each window of the
context the model sleeps: N - 1 more passes over it, and with `--evict hard` it is gone then. A
guess among the nodes of a cycle is right in 1 of NODES. What a pass is (`--sleep`):

    refreshed   the blocks go on from the hidden states of the pass before, as in training
    frozen      keys, values and gates of the reading are written once more, nothing is made anew
    reset       refreshed, but each pass writes into the fast weights as they were before the window
    cross       nothing behind a window; behind all of them N - 1 rounds over every one, from the
                embeddings on, as `sleep.rule=cross` passes over spans: as many passes in all
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from recall_rows import wilson
from torch import Tensor

from wakesleep.streams.depo import QUESTION, Depo, DepoConfig
from wakesleep.streams.training_sleep import sleep_through
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.model_io import load_model
from wakesleep.ttl.state import RecentState, StreamState

SLEEPS = ("refreshed", "frozen", "reset", "cross")
SEED = (1 << 32) + 7_919  # training draws from seeds below, its validation from 1 << 32 on
LANES = 100


@torch.inference_mode()
def ask(
    model: TTLModel, task: Depo, sequences: int, num_passes: int, evict: str, sleep: str
) -> dict[int, tuple[int, int]]:
    """Right answers and answers by number of hops."""
    found: dict[int, tuple[int, int]] = {}
    for number in range(-(-sequences // LANES)):
        batch = task.batch(number, LANES)
        tokens = torch.from_numpy(batch["tokens"])
        state = _context(model, tokens[:, : task.config.context], num_passes, evict, sleep)
        logits = model(tokens[:, task.config.context :], state)[0]
        lane, column = (torch.from_numpy(batch[f"answer_{x}"]) for x in ("lane", "start"))
        right = logits[lane, column - 1 - task.config.context].argmax(-1) == tokens[lane, column]
        hops = tokens[lane, column - QUESTION + 1]
        for hop in hops.unique().tolist():
            before, asked = found.get(hop, (0, 0))
            here = hops == hop
            found[hop] = before + int(right[here].sum()), asked + int(here.sum())
    return dict(sorted(found.items()))


def _context(
    model: TTLModel, tokens: Tensor, num_passes: int, evict: str, sleep: str
) -> StreamState:
    """The state behind the context, which is slept through window by window."""
    state, rows = model.init_state(len(tokens)), []
    for window in tokens.split(model.config.window, 1):
        before = state
        with _arguments(model, wanted=sleep == "frozen") as seen:
            _, state, _ = model(window, state, head=False)
        if sleep == "cross":
            rows.append(_from_the_start(model, state))
        controls = num_passes - 1 if sleep != "refreshed" else 0
        for _ in range(controls):
            match sleep:
                case "frozen":
                    state = _written_again(model, state, seen)
                case "reset":
                    state = model.sleep_pass(_with_fast(state, before))
        state = sleep_through(model, state, num_passes - controls, evict)
    for _ in range(num_passes - 1 if sleep == "cross" else 0):
        recent = state.recent
        for index, row in enumerate(rows):
            state = model.sleep_pass(state, over=row)
            rows[index] = state.recent
        state = state._replace(recent=recent)
    return state


def _from_the_start(model: TTLModel, state: StreamState) -> RecentState:
    """The last tokens, with their embeddings for hidden states."""
    recent = state.recent
    return recent._replace(hidden=model.embedding(recent.ids) * model.config.dim**0.5)


@contextlib.contextmanager
def _arguments(model: TTLModel, wanted: bool) -> Iterator[dict[int, tuple]]:
    """What the fast weights of each layer are given by the next call."""
    seen: dict[int, tuple] = {}

    def remember(layer: int):
        return lambda module, given: seen.__setitem__(layer, given)

    with contextlib.ExitStack() as hooks:
        for layer in model.config.fast_layers if wanted else ():
            fast = model.blocks[layer].attention.fast
            hook = fast.register_forward_pre_hook(remember(layer))
            hooks.callback(hook.remove)
        yield seen


def _written_again(model: TTLModel, state: StreamState, seen: dict[int, tuple]) -> StreamState:
    """Keys, values and gates of the reading, written into what the fast weights are by now."""
    blocks = list(state.blocks)
    for layer, (x, q, k, v, live, before, grid, *_) in seen.items():
        fast = before._replace(s=blocks[layer].fast.s)
        _, after = model.blocks[layer].attention.fast(x, q, k, v, live, fast, grid, 0.0)
        blocks[layer] = blocks[layer]._replace(fast=blocks[layer].fast._replace(s=after.s))
    return state._replace(blocks=tuple(blocks))


def _with_fast(state: StreamState, other: StreamState) -> StreamState:
    """`state` with the fast weights of the other."""
    blocks = (a._replace(fast=b.fast) for a, b in zip(state.blocks, other.blocks, strict=True))
    return state._replace(blocks=tuple(blocks))


def rows(found: dict[int, tuple[int, int]]) -> Iterator[str]:
    """Cells of a table: the share of right answers, with its interval."""
    for right, asked in found.values():
        low, high = wilson(right, asked)
        yield f"{right / asked:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Read the command line, ask, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--passes", default="1,2,4", help="numbers N, the reading counted")
    parser.add_argument("--evict", choices=("hard", "keep"), default="hard")
    parser.add_argument("--sleep", default=SLEEPS[0], help=f"of {', '.join(SLEEPS)}, with commas")
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
    if unknown := [name for name in args.sleep.split(",") if name not in SLEEPS]:
        parser.error(f"--sleep {unknown[0]}: what there is: {', '.join(SLEEPS)}")
    windows, shown = args.context // model.config.window, False
    print(f"{args.nodes} nodes, {windows} windows of {model.config.window}, evict={args.evict}")
    for sleep in args.sleep.split(","):
        for num_passes in map(int, args.passes.split(",")):
            found = ask(model, task, args.sequences, num_passes, args.evict, sleep)
            if not shown:
                print("| sleep | passes | " + " | ".join(f"hops {hop}" for hop in found) + " |")
                print("|---|--:|" + "--:|" * len(found))
            shown = True
            print(f"| {sleep} | {num_passes} | " + " | ".join(rows(found)) + " |", flush=True)


if __name__ == "__main__":
    main()
