"""What `wakesleep bench` compares with what: groups whose members are timed in turn."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

from wakesleep.streams.bench_config import BenchConfig
from wakesleep.streams.bench_layers import (
    OURS,
    PER_CHUNK,
    PER_TOKEN,
    SHORT_CALLS,
    streaming_layer,
    training_layer,
)
from wakesleep.streams.bench_measure import Contender
from wakesleep.streams.bench_models import (
    ATTENTION,
    MAC,
    WITHOUT,
    decoding_model,
    mac_model,
    one_shot_model,
    streaming_model,
)
from wakesleep.streams.bench_training import training_model
from wakesleep.streams.quantities import rounded

WINDOW_ONLY = tuple(WITHOUT)[-1]
PACKAGES = {"titans-pytorch": "titans_pytorch", "flash-linear-attention": "fla"}
FLA = "flash-linear-attention"
NEEDS_GPU = "needs a GPU, and bench runs on the CPU"
NOT_INSTALLED = "not installed: pip install wakesleep[bench]"


class Entry(NamedTuple):
    """One implementation under one condition: a row."""

    implementation: str
    case: str
    size: int = 0  # tokens read before, or of the call; what it is depends on the operation


class Group(NamedTuple):
    operation: str
    name: str
    entries: tuple[Entry, ...]
    references: tuple[Entry, ...]  # the fastest of these is what all are compared with


def groups(config: BenchConfig) -> list[Group]:
    """All groups of the chosen operations, in their order."""
    return [group for operation in config.operations for group in _groups(config, operation)]


def _groups(config: BenchConfig, operation: str) -> list[Group]:
    match operation:
        case "memory-streaming":
            names = (OURS, PER_CHUNK, SHORT_CALLS, PER_TOKEN, FLA)
            return [_layers(config, operation, s, names, names[1:3]) for s in config.shapes]
        case "memory-training":
            names = (OURS, PER_CHUNK)
            return [_layers(config, operation, s, names, names[1:]) for s in config.shapes]
        case "model-streaming":
            twins = [Entry(name, "full store") for name in WITHOUT]
            behind = [Entry(ATTENTION, f"after {rounded(n)}", n) for n in _contexts(config)]
            return [Group(operation, "full store", (*twins, *behind), (twins[-1],))]
        case "model-training":
            twins = [Entry(name, f"{config.lanes} x {config.train_len:,}") for name in WITHOUT]
            return [Group(operation, twins[0].case, tuple(twins), (twins[-1],))]
        case "mac-prefill" | "mac-decode":
            case = f"{config.prefill_len:,} tokens"
            pair = [Entry(name, case) for name in (OURS, MAC) if _wanted(config, name)]
            return [Group(operation, case, tuple(pair), tuple(pair[1:]))]
        case "decode":
            ours = [Entry(OURS, f"after {rounded(n)}", n) for n in config.positions]
            behind = [Entry(ATTENTION, f"after {rounded(n)}", n) for n in _contexts(config)]
            return [Group(operation, "token by token", (*ours, *behind), (ours[0],))]
        case "one-shot":
            names = (OURS, WINDOW_ONLY, ATTENTION)
            sizes = (config.one_shot_len // 2, config.one_shot_len)
            return [_one_shot(operation, names, size) for size in sizes]
        case "growth":
            behind = [Entry(ATTENTION, f"after {rounded(n)}", n) for n in _contexts(config)]
            ours = [Entry(OURS, f"after {rounded(n)}", n) for n in _read(config)]
            groups = [("read", tuple(ours)), ("full attention", tuple(behind))]
            return [Group(operation, name, e, e[:1]) for name, e in groups if e]


def build(config: BenchConfig, group: Group, entry: Entry) -> Contender:
    """Make an implementation ready to be timed."""
    match group.operation:
        case "memory-streaming":
            return streaming_layer(config, entry.case, entry.implementation)
        case "memory-training":
            return training_layer(config, entry.case, entry.implementation)
        case "model-streaming" | "growth":
            return streaming_model(config, entry.implementation, entry.size)
        case "model-training":
            return training_model(config, entry.implementation)
        case "mac-prefill" | "mac-decode":
            return mac_model(config, entry.implementation, group.operation == "mac-decode")
        case "decode":
            return decoding_model(config, entry.implementation, entry.size)
        case "one-shot":
            return one_shot_model(config, entry.implementation, entry.size)


def skipped(entry: Entry) -> str | None:
    """Why an implementation cannot be timed here; None if it can."""
    peer = peer_of(entry.implementation)
    if peer is None:
        return None
    if peer == FLA:
        return NEEDS_GPU
    return NOT_INSTALLED if importlib.util.find_spec(PACKAGES[peer]) is None else None


def peer_of(implementation: str) -> str | None:
    """The package of an implementation; None if it is our own."""
    return next((peer for peer in PACKAGES if implementation.startswith(peer)), None)


def _layers(config, operation: str, shape: str, names, references) -> Group:
    entries = [Entry(name, shape) for name in names if _wanted(config, name)]
    slow = [entry for entry in entries if entry.implementation in references]
    return Group(operation, shape, tuple(entries), tuple(slow))


def _one_shot(operation: str, names, size: int) -> Group:
    case = f"{size:,} tokens"
    entries = tuple(Entry(name, case, size) for name in names)
    return Group(operation, case, entries, (entries[1],))


def _wanted(config: BenchConfig, implementation: str) -> bool:
    peer = peer_of(implementation)
    return peer is None or peer in config.peers


def _contexts(config: BenchConfig) -> list[int]:
    """How far full attention looks back."""
    return [n for n in config.positions if n <= config.attention_len]


def _read(config: BenchConfig) -> list[int]:
    """How far a stream is really read."""
    return [n for n in config.positions if n <= config.longest]
