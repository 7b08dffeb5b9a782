"""Training steps of whole models, ours with and without its parts, as `wakesleep bench` times them.

A step is what `wakesleep train` does with text: a forward and a backward pass over two segments of
every lane with carried state, and a step of the optimiser. The store is full before the first one.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from wakesleep.streams.bench_config import BenchConfig
from wakesleep.streams.bench_measure import Contender
from wakesleep.streams.bench_models import WITHOUT, check_cuts, fill_len
from wakesleep.streams.config import as_dict, load_config
from wakesleep.streams.language_model import load_language_model, pick_dtype
from wakesleep.streams.optimizers import make_optimizer
from wakesleep.streams.training_config import TrainConfig
from wakesleep.ttl.model import ModelConfig

SEGMENTS = 2  # of a step
STEPS = 64  # whose tokens there are; lanes go round


def training_model(config: BenchConfig, name: str) -> Contender:
    """A training step of the given model without some part, from random weights, per turn."""
    from wakesleep.streams.training import StreamModule
    from wakesleep.streams.training_text import TextLanes

    given = load_language_model(config.model, device="cpu").model.config
    recipe = training_config(config, given, name)
    module = StreamModule(recipe)
    optimizer = make_optimizer(module.model, recipe.optim)
    ids = np.random.default_rng(config.seed).integers(
        given.vocab_size, size=STEPS * config.train_len
    )
    lanes = TextLanes([ids] * config.lanes, config.lanes, recipe.train.segment, SEGMENTS, 0)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.bf16):
            return module.training_step(lanes.batch(module.cursor), 0)

    with torch.no_grad():
        for _ in range(-(-fill_len(given) // config.train_len)):
            loss()

    def turn() -> Tensor:
        optimizer.zero_grad()
        now = loss()
        now.backward()
        optimizer.step()
        return now.detach()

    def check() -> str:
        return check_cuts(module.model, config.seed, by_token=False)

    return Contender(config.lanes * config.train_len, turn, check)


def training_config(config: BenchConfig, given: ModelConfig, name: str) -> TrainConfig:
    """The settings of such a step.

    Raises:
        Refused: segments of train_len / 2 tokens do not fit the model's chunk.
    """
    model = dataclasses.replace(given, **dict.fromkeys(WITHOUT[name], ()))
    train = {"lanes": config.lanes, "sequence_len": config.train_len}
    bf16 = pick_dtype(config.dtype, torch.device("cpu")) == "bfloat16"
    train |= {"segments_per_step": SEGMENTS, "bf16": bf16}
    layer = {"model": as_dict(model), "train": train, "seed": config.seed}
    layer["data"] = {"kind": "text", "paths": ["random ids"]}
    return load_config(TrainConfig, overrides=layer)[0]
