"""Settings of a training run: model, optimisation, data, and what is passed to Lightning.

A step reads a batch of B lanes x `sequence_len` tokens, cut into K = `segments_per_step` segments
through which the state is carried with its gradient; between steps it is carried without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from wakesleep.streams.depo import DepoConfig
from wakesleep.streams.mixture import MixtureConfig
from wakesleep.streams.mqar import MQARConfig
from wakesleep.ttl.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class AdmissionConfig:
    """How the store is used while training, and how its admission head is taught."""

    teach_tokens: float = 0  # read before the head is taught; before reads exist it only disturbs
    begin_tokens: float = 0  # read before stores select and distractors come; reads learn first
    capacities: tuple[int, ...] = ()  # places, one drawn per step; () = the model's own
    windows: tuple[int, ...] = ()  # tokens W, one drawn per step; () = the model's own
    keep_all_share: float = 0.0  # of steps without selection; these teach the admission head
    weight: float = 1.0  # of the admission loss
    threshold: float = 0.1  # a token was needed if one answer gave it more of its attention
    positive_weight: float = 20.0  # of needed tokens in the binary cross-entropy
    distractor_share: float = 0.0  # of steps with pairs and memories that other documents left
    full_share: float = 0.0  # of those with selection: only the loudest of a lane find a place
    room: tuple[float, float] = (1.5, 4.0)  # left then, in tokens per token of the lane's facts
    distractor_pool: int = 2048  # pairs per layer and head that wait to be distractors
    rank_max: int = 0  # stored distances are spread over this many; 0 = not spread

    def __post_init__(self) -> None:
        for name in ("keep_all_share", "distractor_share", "full_share"):
            _require(0 <= getattr(self, name) <= 1, name, "between 0 and 1", getattr(self, name))
        _require(all(c > 0 for c in self.capacities), "capacities", "above 0", self.capacities)
        for name in ("teach_tokens", "begin_tokens"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        _require(self.distractor_pool > 0, "distractor_pool", "above 0", self.distractor_pool)
        _require(0 < self.room[0] <= self.room[1], "room", "two increasing numbers", self.room)
        _require(self.rank_max >= 0, "rank_max", "at least 0", self.rank_max)
        _require(self.threshold > 0, "threshold", "above 0", self.threshold)
        good = 0 < self.positive_weight < math.inf
        _require(good, "positive_weight", "a number above 0", self.positive_weight)
        _require(math.isfinite(self.weight), "weight", "a finite number", self.weight)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Which rule moves which weights (see `optimizers`), and its schedule."""

    rule: Literal["adamw", "muon"] = "adamw"  # of matrices; the rest is always AdamW's
    lr: float = 2e-3  # of matrices, at the top of the schedule
    lr_rest: float = 4e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1  # of matrices only
    warmup: int = 100  # steps
    schedule: Literal["cosine", "linear", "stable"] = "cosine"
    decay: float = 0.2  # share of the steps in which a stable rate falls, at the end
    floor: float = 0.05  # of the top rate, reached at the last step
    clip: float = 1.0  # norm of the whole gradient

    def __post_init__(self) -> None:
        for name in ("lr", "lr_rest"):
            good = 0 < getattr(self, name) < math.inf
            _require(good, name, "a number above 0", getattr(self, name))
        _require(self.clip > 0, "clip", "above 0", self.clip)
        good = 0 <= self.weight_decay < math.inf
        _require(good, "weight_decay", "a number of at least 0", self.weight_decay)
        _require(all(0 <= b < 1 for b in self.betas), "betas", "at least 0, below 1", self.betas)
        _require(self.warmup >= 0, "warmup", "at least 0", self.warmup)
        for name in ("floor", "decay"):
            _require(0 <= getattr(self, name) <= 1, name, "between 0 and 1", getattr(self, name))

    def rate(self, step: int, total: int) -> float:
        """Share of the top learning rate at `step` of `total`."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = min(1.0, (step - self.warmup) / max(1, total - self.warmup))
        match self.schedule:
            case "cosine":
                left = (1 + math.cos(math.pi * done)) / 2
            case "linear":
                left = 1 - done
            case "stable":  # warm-up, stable, decay: a run can be made longer before it falls
                left = min(1.0, (1 - done) / max(self.decay, 1e-9))
        return self.floor + (1 - self.floor) * left


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What one step is, and what happens every so many of them."""

    start: str | None = None  # model folder whose weights a new run begins with, or "default", the
    # shipped one; none: random
    steps: int = 1000  # optimiser steps; trainer.max_steps wins
    lanes: int = 8  # B
    sequence_len: int = 1024  # T, tokens that each lane reads per step
    segments_per_step: int = 1  # K; the state is carried with its gradient inside a step
    save_every: int | None = None  # steps between checkpoints; None: what five minutes make
    log_every: int = 50  # steps between lines of metrics.csv
    validate_every: int = 0  # steps between validations; 0 = never
    validation_batches: int = 4
    recompute: Literal["none", "chunk", "segment"] = "none"  # in the backward pass, to save memory
    blind_share: float = 0.0  # of predictions without the window: what do the memories know?
    blind_weight: float = 1.0  # of these in the loss
    window_dropout: float = 0.0  # share of segments that a lane reads without the window
    passes: tuple[int, ...] = ()  # over a segment in which nothing is asked, one drawn per step
    evict: Literal["keep", "hard"] = "keep"  # hard: the window is emptied after these passes
    sleep_drop: float = 0.0  # share of segments before which a lane sleeps
    sleep_pairs: int = 48  # per head that such a sleep writes at most
    z_loss: float = 0.0  # weight of (log of the softmax's normaliser) squared
    bf16: bool = False  # autocast; the carried state and the weights stay float32

    def __post_init__(self) -> None:
        _require(
            self.save_every is None or self.save_every > 0, "save_every", "above 0", self.save_every
        )
        counts = ("steps", "lanes", "sequence_len", "segments_per_step", "validation_batches")
        for name in counts:
            _require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        _require(self.log_every > 0, "log_every", "above 0", self.log_every)
        _require(self.validate_every >= 0, "validate_every", "at least 0", self.validate_every)
        for name in ("z_loss", "blind_weight"):
            good = 0 <= getattr(self, name) < math.inf
            _require(good, name, "a number of at least 0", getattr(self, name))
        _require(all(1 <= n <= 64 for n in self.passes), "passes", "from 1 to 64", self.passes)
        _require(self.sleep_pairs > 0, "sleep_pairs", "above 0", self.sleep_pairs)
        for name in ("blind_share", "window_dropout", "sleep_drop"):
            _require(0 <= getattr(self, name) <= 1, name, "between 0 and 1", getattr(self, name))
        if self.sequence_len % self.segments_per_step:
            raise ValueError(
                f"sequence_len={self.sequence_len} must be a multiple of "
                f"segments_per_step={self.segments_per_step}"
            )

    @property
    def segment(self) -> int:
        """Tokens per lane and segment."""
        return self.sequence_len // self.segments_per_step


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which sequences are read; the group named like `kind` says more."""

    kind: Literal["mixture", "mqar", "depo", "text"] = "mqar"
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    mqar: MQARConfig = field(default_factory=MQARConfig)
    depo: DepoConfig = field(default_factory=DepoConfig)
    paths: tuple[str, ...] = ()  # text: files or folders
    validation_paths: tuple[str, ...] = ()  # text: documents held out
    validation_documents: int = 0  # text: in their place, so many of data.paths, the last ones
    tokenizer: str | None = None  # text: tokenizer.json of the ids; none: the one that is shipped
    workers: int = 0  # processes that make batches ahead of the model; 0: it waits for each

    def __post_init__(self) -> None:
        _require(0 <= self.workers <= 256, "workers", "from 0 to 256", self.workers)
        held = self.validation_documents
        _require(held >= 0, "validation_documents", "at least 0", held)
        if held and self.validation_paths:
            raise ValueError(
                "validation_documents and validation_paths both hold documents out: give one"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the numbers of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: StepConfig = field(default_factory=StepConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int | None = None  # CPU threads; None: as many as torch would use
    logger: Literal["csv", "wandb", "tensorboard"] = "csv"  # beside metrics.csv, see there
    trainer: dict[str, Any] = field(default_factory=dict)  # keyword arguments of lightning.Trainer

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 1 << 32, "seed", "from 0 to 4294967295", self.seed)
        _require(self.threads is None or self.threads > 0, "threads", "above 0", self.threads)
        for name in ("max_steps", "accumulate_grad_batches"):
            value = self.trainer.get(name, 1)
            good = type(value) is int and value > 0  # a bool is an int, too
            _require(good, f"trainer.{name}", "a whole number above 0", value)
        epochs = self.trainer.get("max_epochs", -1)
        good = type(epochs) is int and epochs >= -1
        _require(good, "trainer.max_epochs", "a whole number, or -1 for no limit", epochs)
        if self.train.segment % self.model.chunk:
            raise ValueError(
                f"a segment (train.sequence_len / train.segments_per_step = {self.train.segment} "
                f"tokens) must be a multiple of model.chunk={self.model.chunk}"
            )
        if any(w < 1 or w % self.model.chunk for w in self.admission.windows):
            raise ValueError(
                f"admission.windows must be multiples of model.chunk={self.model.chunk}, "
                f"got {self.admission.windows}"
            )
        if self.train.passes:
            awake = self.model.fast_layers and self.model.fast.write == "always"
            if not awake or self.model.recent != self.train.segment:
                raise ValueError(
                    "train.passes needs model.fast_layers, model.fast.write=always and "
                    f"model.recent={self.train.segment}, the tokens of a segment"
                )
            most = max(self.train.passes)
            if self.model.fast.passes != most:
                raise ValueError(f"train.passes={self.train.passes} needs model.fast.passes={most}")
            if self.data.kind == "text":
                raise ValueError("train.passes needs generated tasks, not data.kind=text")
            if self.train.evict == "hard" and self.admission.distractor_share:
                raise ValueError(
                    "train.evict=hard needs admission.distractor_share=0: distractors stand "
                    "where the window was, and hard eviction has put its own tokens there"
                )
        layers = set(self.model.fast_layers) & set(self.model.store_layers)
        if self.train.sleep_drop and not layers:
            raise ValueError("train.sleep_drop needs a layer of model.fast_layers with a store")
        if self.train.sleep_drop and self.model.fast.write == "always":
            raise ValueError("train.sleep_drop needs model.fast.write=asleep: sleep alone writes")
        if self.train.sleep_drop and self.data.kind == "text":
            raise ValueError("train.sleep_drop needs generated tasks, not data.kind=text")
        if self.data.kind == "text" and (self.admission != AdmissionConfig()):
            raise ValueError(
                "admission.* draws a new store for every document of a generated task; "
                "with data.kind=text the store is carried on: leave admission.* out"
            )

    @property
    def accumulate(self) -> int:
        """Batches per optimiser step."""
        return int(self.trainer.get("accumulate_grad_batches", 1))

    @property
    def carries(self) -> bool:
        """Whether documents go on from step to step."""
        return self.data.kind == "text"

    def tokens_before(self, number: int) -> int:
        """Tokens read before batch `number`."""
        return number * self.train.lanes * self.train.sequence_len

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return int(self.trainer.get("max_steps", self.train.steps))


def _require(holds: bool, name: str, requirement: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {requirement}, got {value}")
