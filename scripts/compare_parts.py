"""Time a model against the same model without its store, its memory, and both (window only).

    python scripts/compare_parts.py
    python scripts/compare_parts.py model=DIR threads=1 repeats=21

All read the bundled document as `wakesleep stream` does, a segment each in turn, the head and the
loss included; one process, one dtype. Weights of the models without a part are random: speed does
not depend on them. What is timed comes behind `warmup` tokens, so that every store is full.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from wakesleep.streams.allocator import restart_with_tuned_malloc
from wakesleep.streams.config import load_config
from wakesleep.streams.console import Console
from wakesleep.streams.documents import open_document
from wakesleep.streams.errors import Refused
from wakesleep.streams.language_model import LanguageModel, load_language_model, pick_dtype
from wakesleep.streams.planting import BUNDLED
from wakesleep.streams.runner import StreamRunner
from wakesleep.streams.segments import Segment
from wakesleep.streams.stream_config import StreamConfig
from wakesleep.streams.token_reader import open_tokens
from wakesleep.streams.tokenizer import NUM_SPECIAL
from wakesleep.ttl.flops import wake_flops
from wakesleep.ttl.model import ModelConfig, TTLModel

SEGMENT_LEN = StreamConfig().segment_len
NOTE_EVERY = 5.0  # seconds
WITHOUT = {  # the last one is what all are compared with
    "full": (),
    "no store": ("store_layers",),
    "no memory": ("memory_layers",),
    "window only": ("memory_layers", "store_layers"),
}


@dataclass(frozen=True, kw_only=True)
class PartsConfig:
    model: str | None = None  # model folder; none: the one that is shipped
    document: str = str(BUNDLED)  # a text, or a .npy of ids
    warmup: int = 16_384  # tokens that every model reads first
    repeats: int = 21  # segments that count, of each model
    dtype: str = "auto"  # as `wakesleep stream` picks it
    threads: int | None = None  # CPU threads; none: as many as torch takes

    def __post_init__(self) -> None:
        for name in ("warmup", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Row(NamedTuple):
    name: str
    mflop: float  # per token, with a full store
    rates: list[float]  # tokens per second, of each segment


def without(language_model: LanguageModel, keys: Sequence[str]) -> LanguageModel:
    """The same model if there are no `keys`, else a random one whose lists of layers are empty."""
    given = language_model.model
    if not keys:
        return language_model
    config = dataclasses.replace(given.config, **dict.fromkeys(keys, ()))
    weight = given.embedding.weight
    model = TTLModel(config).to(weight.device, weight.dtype).eval()
    return language_model._replace(model=model.requires_grad_(False))


def mflop_per_token(config: ModelConfig) -> float:
    """Of a segment behind a full window and a full store."""
    full = SEGMENT_LEN * -(-(config.window + config.store.capacity) // SEGMENT_LEN)
    return wake_flops(config, full, SEGMENT_LEN) / SEGMENT_LEN / 1e6


def measure(language_model: LanguageModel, ids: np.ndarray, warmup: int) -> list[Row]:
    """Let every model read the segments of ids [N] in turn; those behind `warmup` tokens count."""
    models = {name: without(language_model, keys) for name, keys in WITHOUT.items()}
    runners = {name: StreamRunner(model) for name, model in models.items()}
    rates: dict[str, list[float]] = {name: [] for name in models}
    due = time.monotonic() + NOTE_EVERY
    for start in range(0, len(ids), SEGMENT_LEN):
        part = ids[start : start + SEGMENT_LEN]
        segment = Segment(part, part >= NUM_SPECIAL)
        if time.monotonic() > due:
            Console().say(f"{start:,} of {len(ids):,} tokens")
            due = time.monotonic() + NOTE_EVERY
        for name, runner in runners.items():
            begin = time.perf_counter()
            runner.read(segment)
            seconds = time.perf_counter() - begin
            if start >= warmup:
                rates[name].append(len(part) / seconds)
    configs = {name: model.model.config for name, model in models.items()}
    return [Row(name, mflop_per_token(configs[name]), rates[name]) for name in models]


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown; ratios are medians of the ratios of segments read one after another."""
    lines = ["| model | MFLOP per token | tokens per second | spread | x window only |"]
    lines.append("|---|--:|--:|--:|--:|")
    for row in rows:
        ratio = statistics.median(a / b for a, b in zip(row.rates, rows[-1].rates, strict=True))
        spread = f"{min(row.rates):,.0f} to {max(row.rates):,.0f}"
        cells = [row.name, f"{row.mflop:.2f}", f"{statistics.median(row.rates):,.0f}", spread]
        lines.append(f"| {' | '.join([*cells, f'{ratio:.2f}'])} |")
    return "\n".join(lines)


def run(config: PartsConfig) -> list[Row]:
    """Load, read and time.

    Raises:
        Refused: no such model or document, or the document is too short.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    dtype = pick_dtype(config.dtype, torch.device("cpu"))
    language_model = load_language_model(config.model, dtype=dtype, device="cpu")
    reader = open_tokens(open_document(config.document), language_model.tokenizer)
    warmup = SEGMENT_LEN * -(-config.warmup // SEGMENT_LEN)
    ids = reader.read(warmup + config.repeats * SEGMENT_LEN).astype(np.int64)
    if len(ids) < warmup + config.repeats * SEGMENT_LEN:
        raise Refused(f"{config.document} has {len(ids):,} tokens", "", "ask for fewer: repeats=N")
    threads = torch.get_num_threads()
    text = f"{dtype}, threads: {threads}, median of {config.repeats} segments of {SEGMENT_LEN:,}"
    Console().say(text)
    return measure(language_model, ids, warmup)


def main() -> None:
    """Read the command line, time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("keys", nargs="*", help="model=DIR repeats=21 threads=N dtype=float32 ...")
    args = parser.parse_args()
    try:
        config, _ = load_config(PartsConfig, overrides=args.keys)
        rows = run(config)
    except Refused as refusal:
        parser.exit(2, f"{refusal}\n")
    print(table(rows))


if __name__ == "__main__":
    restart_with_tuned_malloc()
    main()
