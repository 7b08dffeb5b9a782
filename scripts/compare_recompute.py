"""Measure what memory training takes, by the length of a step and by what is computed again.

    python scripts/compare_recompute.py
    python scripts/compare_recompute.py lengths=[2k,8k] tokens=8k threads=1 --output runs/memory

Every row is a run of `wakesleep train` of its own: the model of a recipe reads random ids in lanes
of `length` tokens per step, as many as make `tokens`, in segments of `segment` tokens whose state
is carried; the store is full. Peak memory is that of the whole process; a run that needs more than
the machine has free is a row without numbers. OUTPUT (runs/recompute) gets the table as
`recompute.json`, and what is in it is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wakesleep.streams.allocator import restart_with_tuned_malloc
from wakesleep.streams.config import as_dict, load_config, to_yaml
from wakesleep.streams.console import Console
from wakesleep.streams.errors import Refused
from wakesleep.streams.quantities import count, size
from wakesleep.streams.train_command import find_recipe
from wakesleep.streams.training_config import TrainConfig
from wakesleep.ttl.files import write_atomically

TRAIN = "import sys; from wakesleep.streams.cli import main; sys.exit(main())"
HOW = ("none", "chunk", "segment")


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    recipe: str = "configs/default.yaml"  # whose model is trained
    lengths: tuple[int, ...] = (2048, 8192, 32_768)  # tokens per lane and step
    tokens: int = 32_768  # per step, in all lanes
    segment: int = 512  # tokens between two carried states
    steps: int = 4  # of each run; the first one only warms up
    threads: int | None = None  # CPU threads; none: as many as torch takes

    def __post_init__(self) -> None:
        for length in self.lengths:
            if self.tokens % length or length % self.segment:
                raise ValueError(
                    f"lengths must divide tokens={self.tokens} and be multiples of "
                    f"segment={self.segment}, got {length}"
                )
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}")


def recipe_of(config: RecomputeConfig, length: int, recompute: str, ids: Path) -> TrainConfig:
    """A short run with one line of metrics per step."""
    model = load_config(TrainConfig, find_recipe(config.recipe))[0].model
    train = {"steps": config.steps, "log_every": 1, "save_every": config.steps, "bf16": True}
    train |= {"lanes": config.tokens // length, "sequence_len": length, "recompute": recompute}
    train["segments_per_step"] = length // config.segment
    keys = {"model": as_dict(model), "train": train, "optim": {"warmup": 0}}
    keys |= {"data": {"kind": "text", "paths": [str(ids)]}, "threads": config.threads}
    return load_config(TrainConfig, overrides=keys)[0]


def measure(recipe: TrainConfig, folder: Path) -> dict[str, Any]:
    """Train in a process of its own: its peak memory and speed, None where it did not fit.

    Raises:
        Refused: it failed for another reason than memory.
    """
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    words = [sys.executable, "-c", TRAIN, "train", str(path), "--output", str(folder / "run")]
    with open(folder / "errors", "w+", encoding="utf-8") as errors:
        child = subprocess.Popen(words, stderr=errors, preexec_fn=_keep_to_free_memory)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read().strip().splitlines()[-3:]  # the error; before it, the progress
    if child.returncode:
        if any("memory" in line for line in said):
            return {"peak_bytes": None, "tokens_per_second": None}
        raise Refused(*said) if said else Refused(f"exit code {child.returncode}")
    with open(folder / "run" / "metrics.csv", encoding="utf-8", newline="") as file:
        speeds = [float(row["tokens_per_second"]) for row in csv.DictReader(file)]
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "peak_bytes": used.ru_maxrss * unit,
        "tokens_per_second": statistics.median(speeds[1:]),
    }


def _keep_to_free_memory() -> None:
    """Fail with an error where the system would end some other process."""
    import resource

    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (free, free))


def run(config: RecomputeConfig, output: Path, console: Console) -> list[dict[str, Any]]:
    """Measure all rows that are not in `output` yet."""
    path = output / "recompute.json"
    made_of = as_dict(config)
    saved = json.loads(path.read_text("utf-8")) if path.exists() else {}
    rows = saved["rows"] if saved.get("made_of") == made_of else []
    settings = [(length, how) for length in config.lengths for how in HOW]
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        ids, draw = Path(scratch) / "ids.npy", np.random.default_rng(0)
        vocab = recipe_of(config, config.lengths[0], HOW[0], ids).model.vocab_size
        np.save(ids, draw.integers(vocab, size=config.tokens * (config.steps + 1)))
        for number, (length, how) in enumerate(settings[len(rows) :], len(rows)):
            console.say(f"{number + 1} of {len(settings)}: {count(length)} tokens, {how}")
            recipe = recipe_of(config, length, how, ids)
            measured = measure(recipe, Path(scratch) / str(number))
            rows.append({"length": length, "recompute": how, **measured})
            data = json.dumps({"made_of": made_of, "rows": rows}, indent=1)
            write_atomically(path, data.encode() + b"\n")
    return rows


def table(rows: list[dict[str, Any]], tokens: int) -> str:
    """The rows in Markdown."""
    lines = ["| tokens per lane | lanes | computed again | peak memory | tokens per second |"]
    lines.append("|--:|--:|---|--:|--:|")
    for row in rows:
        cells = [f"{row['length']:,}", str(tokens // row["length"]), row["recompute"]]
        if row["peak_bytes"] is None:
            cells += ["more than is free", ""]
        else:
            cells += [size(row["peak_bytes"]), f"{row['tokens_per_second']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("keys", nargs="*", help="recipe=YAML lengths=[2k,8k] tokens=8k ...")
    parser.add_argument("--output", default=Path("runs/recompute"), type=Path, help="folder")
    args = parser.parse_args()
    try:
        config, _ = load_config(RecomputeConfig, overrides=args.keys)
        rows = run(config, args.output, Console())
    except Refused as refusal:
        parser.exit(2, f"{refusal}\n")
    print(table(rows, config.tokens))


if __name__ == "__main__":
    restart_with_tuned_malloc()
    main()
