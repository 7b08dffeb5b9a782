"""Time training steps: our memory layer against titans-pytorch's, models with and without parts.

    pip install titans-pytorch==0.5.5    # no dependency: into an environment for this alone
    python scripts/compare_training.py

A step is a forward and a backward pass. The layers (see compare_memory.py for what is the same in
both) read 2,048 tokens in float32, in chunks of 64 after which the weights change; ours also with
the work of each chunk done again in the backward pass instead of kept (`recompute`). They take
turns, each time in a process of its own, whose peak memory is counted above what it has before its
first step. Models are those of a recipe, with a full store and their optimiser; they take turns in
one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from compare_memory import SHAPES, Theirs, check_ours, cpu_name, our_memory, our_step
from torch import nn

from wakesleep.streams.allocator import allocator, restart_with_tuned_malloc
from wakesleep.streams.config import as_dict, load_config
from wakesleep.streams.meters import peak_rss_bytes
from wakesleep.streams.optimizers import make_optimizer
from wakesleep.streams.quantities import size
from wakesleep.streams.train_command import find_recipe
from wakesleep.streams.training import StreamModule
from wakesleep.streams.training_config import TrainConfig
from wakesleep.streams.training_text import TextLanes

CHUNK = 64
LAYERS = ("ours", "ours, recompute", "titans-pytorch")
ROUNDS = 3  # processes of each layer
PARTS = {  # of a model: what is taken out
    "full": {},
    "no store": {"store_layers": ()},
    "no memory": {"memory_layers": ()},
    "window only": {"store_layers": (), "memory_layers": ()},
}
LANES, LENGTH, SEGMENTS = 8, 1024, 2  # of a model's step


class Timed(NamedTuple):
    name: str
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def layer_step(name: str, shape: tuple[int, int], tokens: int) -> Callable[[], None]:
    """A training step of a memory layer."""
    ours = name in LAYERS[:2]
    layer = our_memory(*shape, CHUNK) if ours else Theirs(*shape, CHUNK, CHUNK)
    forward: nn.Module | Callable = our_step(layer, name == LAYERS[1]) if ours else layer
    x = torch.randn(1, tokens, math.prod(shape), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        y, _ = forward(x, None)
        y.square().mean().backward()

    return step


def model_step(config: TrainConfig, ids: np.ndarray) -> Callable[[], None]:
    """A training step of a model that carries its state on."""
    torch.manual_seed(0)
    module = StreamModule(config)
    optimizer = make_optimizer(module.model, config.optim)
    lanes = TextLanes([ids] * LANES, LANES, LENGTH // SEGMENTS, SEGMENTS, 0)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.training_step(lanes.batch(module.cursor), 0)
        loss.backward()
        optimizer.step()

    return step


def in_turn(steps: dict[str, Callable[[], None]], warmup: int, repeats: int) -> list[Timed]:
    """Let everyone take a step in turn, `repeats` times after `warmup` rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + repeats):
        _tell(turn, warmup + repeats)
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return [Timed(*row) for row in seconds.items()]


def _tell(turn: int, turns: int) -> None:
    end = "" if turn + 1 < turns else "\r"
    print(f"\rround {turn + 1} of {turns} ", end=end, file=sys.stderr, flush=True)


def measure_layer(name: str, shape: tuple[int, int], *numbers: int) -> tuple[list[float], int]:
    """Seconds and peak memory of training steps, in a process of their own.

    Args:
        numbers: tokens, threads, steps before those that count, steps that count.
    """
    words = [sys.executable, __file__, "--layer", name, *map(str, (*shape, *numbers))]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return tuple(json.loads(done.stdout))


def print_layer(
    name: str, heads: int, width: int, tokens: int, threads: int, warmup: int, repeats: int
) -> None:
    """What `measure_layer` reads."""
    torch.set_num_threads(threads)
    layer_step(name, (heads, width), CHUNK)()  # what is loaded at the first step
    step = layer_step(name, (heads, width), tokens)
    before, seconds = _resident(), []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps([seconds[warmup:], peak_rss_bytes() - before]))


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def recipes(recipe: str, threads: int) -> dict[str, TrainConfig]:
    """The model of a recipe without some of its parts, trained on text."""
    whole = load_config(TrainConfig, find_recipe(recipe))[0].model
    train = {"lanes": LANES, "sequence_len": LENGTH, "segments_per_step": SEGMENTS, "bf16": True}
    found = {}
    for name, keys in PARTS.items():
        layer = {"model": as_dict(replace(whole, **keys)), "train": train, "threads": threads}
        layer["data"] = {"kind": "text", "paths": ["random ids"]}
        found[name] = load_config(TrainConfig, overrides=layer)[0]
    return found


def compare_layers(args: argparse.Namespace) -> None:
    """A table of the memory layers."""
    print("| heads | layer | seconds a step | times as fast | peak memory | of titans-pytorch |")
    print("|---|---|--:|--:|--:|--:|")
    numbers = args.tokens, args.threads, args.warmup, args.repeats
    for shape in SHAPES:
        check_ours(our_memory(*shape, CHUNK), seed=1)
        seconds, peaks = {name: [] for name in LAYERS}, {}
        for turn in range(ROUNDS):
            _tell(turn, ROUNDS)
            for name in LAYERS:
                taken, peaks[name] = measure_layer(name, shape, *numbers)
                seconds[name] += taken
        theirs, most = statistics.median(seconds[LAYERS[-1]]), peaks[LAYERS[-1]]
        for name in LAYERS:
            median, peak = statistics.median(seconds[name]), peaks[name]
            cells = [f"{shape[0]} x {shape[1]}", name, f"{median:.3f}", f"{theirs / median:.2f}"]
            print(f"| {' | '.join([*cells, size(peak), f'{peak / most:.2f}'])} |", flush=True)


def compare_models(args: argparse.Namespace) -> None:
    """A table of the models."""
    configs = recipes(args.recipe, args.threads)
    vocab = configs["full"].model.vocab_size
    ids = np.random.default_rng(0).integers(vocab, size=LENGTH * 1_000)
    steps = {name: model_step(config, ids) for name, config in configs.items()}
    full = -(-(configs["full"].model.store.capacity + 512) // LENGTH)  # steps that fill the store
    timed = in_turn(steps, max(full, args.warmup), args.repeats)
    print("\n| model | tokens per second | x window only |")
    print("|---|--:|--:|")
    for row in timed:
        rate = LANES * LENGTH / row.median
        print(f"| {row.name} | {rate:,.0f} | {timed[-1].median / row.median:.2f} |")


def main() -> int:
    """Read the command line, time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="configs/default.yaml", help="whose model is timed")
    parser.add_argument("--tokens", type=int, default=2048, help="of a layer's step")
    parser.add_argument("--warmup", type=int, default=2, help="steps that do not count")
    parser.add_argument("--repeats", type=int, default=7, help="steps that count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layer", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.layer:
        print_layer(args.layer[0], *map(int, args.layer[1:]))
        return 0
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{cpu_name()}, threads: {args.threads}, {allocator(os.environ)}")
    print(f"torch {torch.__version__}, by turns; medians of {args.repeats} steps")
    print(f"(models), or of {ROUNDS} processes with so many each (layers)\n")
    if importlib.util.find_spec("titans_pytorch") is None:
        print("titans-pytorch is not installed: no layers. pip install titans-pytorch==0.5.5")
    else:
        compare_layers(args)
    compare_models(args)
    return 0


if __name__ == "__main__":
    restart_with_tuned_malloc()
    sys.exit(main())
