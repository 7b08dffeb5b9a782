"""The keys of `wakesleep bench`: what is timed, at which sizes, how often."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

Operation = Literal[
    "memory-streaming",
    "memory-training",
    "model-streaming",
    "model-training",
    "mac-prefill",
    "mac-decode",
    "decode",
    "one-shot",
    "growth",
]
Peer = Literal["titans-pytorch", "flash-linear-attention"]
SHAPE = re.compile(r"([1-9]\d?)x([1-9]\d{0,3})")

# What --quick changes; keys that are given win.
QUICK = (
    "repeats=3",
    "warmup=1",
    "tokens=1024",
    "lanes=1",
    "train_len=512",
    "positions=[1k,4k,10M]",
    "longest=4k",
    "attention_len=4k",
    "one_shot_len=2048",
    "prefill_len=512",
    "decode_len=8",
)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    operations: tuple[Operation, ...] = get_args(Operation)
    peers: tuple[Peer, ...] = get_args(Peer)  # others' packages; rows where they are installed
    model: str | None = None  # model folder; none: the one that is shipped
    repeats: int = 11  # turns that count, of every implementation
    warmup: int = 3  # turns before them
    shapes: tuple[str, ...] = ("1x256", "4x64")  # heads x width of memory layers
    chunk: int = 64  # tokens per write of memory layers
    tokens: int = 2048  # of a turn: a call of a layer or model, a training step of a layer
    lanes: int = 8  # of a training step of a model
    train_len: int = 1024  # tokens per lane of such a step
    positions: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)  # tokens read
    longest: int = 1_000_000  # of these, what `growth` reads; beyond it is extrapolated
    attention_len: int = 100_000  # of these, the longest that full attention looks back on
    one_shot_len: int = 8192  # tokens of one long call
    prefill_len: int = 2048  # tokens of the call before decoding begins
    decode_len: int = 64  # tokens that are decoded in a turn
    threads: int | None = None  # CPU threads; none: as many as torch takes
    device: Literal["auto", "cpu"] = "auto"  # what is timed here is the CPU; scripts/gpu_check.py
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of models; layers have float32
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "repeats": (1, 1000),
            "warmup": (0, 1000),
            "chunk": (1, 4096),
            "tokens": (1, 1 << 16),
            "lanes": (1, 1024),
            "train_len": (2, 1 << 16),
            "longest": (1, 1 << 40),
            "attention_len": (1, 1 << 24),
            "one_shot_len": (2, 1 << 24),
            "prefill_len": (1, 1 << 20),
            "decode_len": (1, 1 << 16),
            "threads": (1, 1024),
            "seed": (0, 2**53),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high:,}, got {value:,}")
        for shape in self.shapes:
            if not SHAPE.fullmatch(shape):
                raise ValueError(f"shapes must be HEADSxWIDTH such as 4x64, got {shape}")
        if self.train_len % 2:
            raise ValueError(f"train_len must be even (two segments), got {self.train_len}")
        for name in ("operations", "shapes", "positions"):
            _check_list(name, getattr(self, name))
        if list(self.positions) != sorted(self.positions) or self.positions[0] < 1:
            raise ValueError(f"positions must rise from 1 on, got {list(self.positions)}")


def heads_of(shape: str) -> tuple[int, int]:
    """Heads and head width of a shape: 4x64."""
    heads, width = SHAPE.fullmatch(shape).groups()
    return int(heads), int(width)


def width_of(shape: str) -> int:
    """The width D of a layer of this shape."""
    return math.prod(heads_of(shape))


def _check_list(name: str, values: tuple[Any, ...]) -> None:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must be one or more, each once, got {list(values)}")
