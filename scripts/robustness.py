"""Feed a model what no text is, and see whether it stays finite and reads text as before.

    python scripts/robustness.py
    python scripts/robustness.py model=DIR tokens=100k threads=1 --output runs/small

Every input is streamed from a fresh state, through the runner of `wakesleep stream` in its default
segments, into the model's own window and store:

    text        the bundled document, to compare with
    noise       ids drawn uniformly from the whole vocabulary, special ones included
    constant    one ordinary token, " the", over and over
    zeros       the id 0, which is <|end|>, the end of a document, over and over
    nonfinite   the document with 1 token in 100 replaced by a reserved id (5 to 7, no text has
                them), read by a copy of the model in which the embeddings of these ids are NaN,
                +inf and -inf: so many inputs of the first block are not finite, each to be counted

Then the sound model reads the next `clean_tokens` of the document, once from the state that is left
and once from a fresh one. OUTPUT (runs/robustness) gets the table as `robustness.json`; an input
that is in it is not streamed again. The exit code is 1 if a state was not finite, or a row was not
counted.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wakesleep.streams.config import load_config
from wakesleep.streams.console import Console
from wakesleep.streams.documents import open_document
from wakesleep.streams.errors import Refused
from wakesleep.streams.language_model import LanguageModel, load_language_model, pick_dtype
from wakesleep.streams.planting import BUNDLED
from wakesleep.streams.progress import Progress
from wakesleep.streams.reading import METRICS_EVERY
from wakesleep.streams.runner import Carried, StreamRunner, fresh
from wakesleep.streams.segments import Segment
from wakesleep.streams.stream_config import StreamConfig
from wakesleep.streams.token_reader import open_tokens
from wakesleep.streams.tokenizer import END, NUM_SPECIAL
from wakesleep.ttl.files import write_atomically
from wakesleep.ttl.state import StreamState, named_tensors

INPUTS = ("text", "noise", "constant", "zeros", "nonfinite")
BROKEN = {5: math.nan, 6: math.inf, 7: -math.inf}  # reserved ids and their embeddings
BROKEN_SHARE = 0.01  # of the tokens of `nonfinite`
SEGMENT_LEN = StreamConfig().segment_len  # tokens of one call


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig:
    model: str | None = None  # model folder; none: the one that is shipped
    document: str = str(BUNDLED)  # a text, or a .npy of ids
    tokens: int = 1_000_000  # of each input
    clean_tokens: int = 50_000  # of text afterwards
    seed: int = 0
    threads: int | None = None  # CPU threads; none: as many as torch takes
    dtype: str = "auto"  # as `wakesleep stream` picks it

    def __post_init__(self) -> None:
        for name in ("tokens", "clean_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def make_input(name: str, text: np.ndarray, language_model: LanguageModel, seed: int) -> np.ndarray:
    """As many ids as `text` [N] int64 has, of one of INPUTS."""
    draw = np.random.default_rng(seed)
    match name:
        case "text":
            return text
        case "noise":
            return draw.integers(0, language_model.model.config.vocab_size, len(text))
        case "constant":
            return np.full(len(text), language_model.tokenizer.encode(" the")[0])
        case "zeros":
            return np.full(len(text), END)
        case "nonfinite":
            broken = draw.choice(list(BROKEN), len(text))
            return np.where(draw.random(len(text)) < BROKEN_SHARE, broken, text)
    raise ValueError(f"input must be one of {', '.join(INPUTS)}, not {name}")


def broken_copy(language_model: LanguageModel) -> LanguageModel:
    """The same model with embeddings that are not finite; its predictions are not, either."""
    model = copy.deepcopy(language_model.model)
    with torch.no_grad():
        for token, value in BROKEN.items():
            model.embedding.weight[token] = value
    return language_model._replace(model=model)


def stream(runner: StreamRunner, ids: np.ndarray) -> Iterator[StreamState]:
    """Read ids [N] segment by segment, and yield the state after each."""
    for start in range(0, len(ids), SEGMENT_LEN):
        part = ids[start : start + SEGMENT_LEN]
        runner.read(Segment(part, part >= NUM_SPECIAL))
        yield runner.state


def count_bad(state: StreamState) -> int:
    """Numbers of a state that are not finite, but for the score -inf that marks an empty place."""
    floats = (t for _, t in named_tensors(state) if t.is_floating_point())
    bad = sum(int((~t.isfinite()).sum()) for t in floats)
    for block in state.blocks:
        if block.store is not None:
            empty = (block.store.position < 0) & (block.store.score == -torch.inf)
            bad -= int(empty.sum())
    return bad


def memory_norm(state: StreamState) -> float:
    """The largest Frobenius norm of a head's fast weights, as they are in the state.

    That is what was learned on top of the initial weights; of the delta rule, the weights.
    """
    memories = [block.memory for block in state.blocks if block.memory is not None]
    norms = [w.flatten(2).norm(dim=2) for memory in memories for w in memory.weights]
    return max((float(norm.nan_to_num(math.inf).max()) for norm in norms), default=0.0)


def bits_per_byte(language_model: LanguageModel, state: StreamState | None, text) -> float:
    """The loss of a model on text [N] after a state; None: after nothing."""
    carried = fresh(language_model)
    carried = carried if state is None else Carried(state, carried.logits)
    runner = StreamRunner(language_model, carried)
    for _ in stream(runner, text):
        pass
    return runner.meters.total.bits_per_byte


def measure(
    name: str,
    text: np.ndarray,
    following: np.ndarray,
    language_model: LanguageModel,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Stream one input and read `following` [N] after it: a row of the table.

    The state is looked at after every segment: `bad_numbers` is the largest count, `max_norm` the
    largest norm of all these.
    """
    ids = make_input(name, text, language_model, seed)
    broken = name == "nonfinite"
    runner = StreamRunner(broken_copy(language_model) if broken else language_model)
    runner.start_clock()
    bad, norm, shown = 0, 0.0, 0
    for state in stream(runner, ids):
        bad, norm = max(bad, count_bad(state)), max(norm, memory_norm(state))
        if runner.tokens // METRICS_EVERY > shown:
            shown = runner.tokens // METRICS_EVERY
            progress.metrics(runner.metrics_line())
    return {
        "input": name,
        "tokens": runner.tokens,
        "finite": bad == 0,
        "bad_numbers": bad,
        "max_norm": norm if math.isfinite(norm) else None,
        "nonfinite_rows": runner.meters.nonfinite_rows,
        "expected_rows": int(np.isin(ids, list(BROKEN)).sum()) if broken else 0,
        "bits_per_byte_after": bits_per_byte(language_model, runner.state, following),
        "bits_per_byte_fresh": bits_per_byte(language_model, None, following),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    names = ("input", "tokens", "state", "largest norm", "rows counted", "of", "after", "fresh")
    lines = [f"| {' | '.join(names)} |", "|---|---:|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        state = "finite" if row["finite"] else f"{row['bad_numbers']:,} numbers are not finite"
        norm = "not finite" if row["max_norm"] is None else f"{row['max_norm']:.3g}"
        cells = [row["input"], f"{row['tokens']:,}", state, norm]
        cells += [f"{row[name]:,}" for name in ("nonfinite_rows", "expected_rows")]
        cells += [f"{row[f'bits_per_byte_{when}']:.4f}" for when in ("after", "fresh")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Norm: of a head's fast weights. Rows: block inputs that were not finite. After,"]
    lines += ["fresh: bits per byte of the same text, after the input and after nothing."]
    return "\n".join(lines)


def earlier_rows(path: Path, made_of: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that an earlier call wrote for the same model and settings."""
    saved = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return saved["rows"] if saved.get("made_of") == made_of else []


def run(config: RobustnessConfig, output: Path, console: Console) -> list[dict[str, Any]]:
    """Measure all inputs that are not in `output` yet.

    Raises:
        Refused: no such model or document, or the document is too short.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dtype = pick_dtype(config.dtype, torch.device("cpu"))
    language_model = load_language_model(config.model, dtype=dtype, device="cpu")
    reader = open_tokens(open_document(config.document), language_model.tokenizer)
    ids = reader.read(config.tokens + config.clean_tokens).astype(np.int64)
    if len(ids) < config.tokens + config.clean_tokens:
        raise Refused(f"{config.document} has {len(ids):,} tokens", "", "ask for fewer: tokens=N")
    text, following = np.split(ids, [config.tokens])
    made_of = {
        "model_sha256": language_model.model_sha256,
        "ids_sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        "tokens": config.tokens,
        "clean_tokens": config.clean_tokens,
        "seed": config.seed,
        "dtype": dtype,
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / "robustness.json"
    rows = earlier_rows(path, made_of)
    for name in INPUTS[len(rows) :]:
        console.say(f"{name}: {config.tokens:,} tokens")
        with Progress(console, config.tokens) as progress:
            row = measure(name, text, following, language_model, config.seed, progress)
        rows.append(row)
        data = json.dumps({"made_of": made_of, "rows": rows}, indent=1)
        write_atomically(path, data.encode() + b"\n")
    return rows


def main() -> None:
    """Read the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("keys", nargs="*", help="model=DIR tokens=1M dtype=float32 threads=N ...")
    parser.add_argument("--output", default=Path("runs/robustness"), type=Path, help="folder")
    args = parser.parse_args()
    try:
        config, _ = load_config(RobustnessConfig, overrides=args.keys)
        rows = run(config, args.output, Console())
    except Refused as refusal:
        parser.exit(2, f"{refusal}\n")
    print(table(rows))
    counted = all(row["nonfinite_rows"] == row["expected_rows"] for row in rows)
    sys.exit(0 if counted and all(row["finite"] for row in rows) else 1)


if __name__ == "__main__":
    main()
