"""What a run left behind, read before it goes on: settings, run.json, metrics.csv, checkpoint."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import torch

from wakesleep.streams.config import flat
from wakesleep.streams.errors import Refused
from wakesleep.streams.training_config import TrainConfig
from wakesleep.ttl.config_json import parse_json

# may change on resume
FREE = ("train.save_every", "train.log_every", "threads", "device", "logger", "data.workers")
# and how far, where and how visibly Lightning trains
FREE_TRAINER = (
    *("max_steps", "max_epochs", "max_time", "min_steps", "min_epochs", "fast_dev_run"),
    *("accelerator", "devices", "num_nodes", "strategy"),
    *("logger", "enable_progress_bar", "log_every_n_steps", "profiler", "detect_anomaly"),
)
# what Lightning reads of a checkpoint
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step")


def compare_settings(old: TrainConfig, new: TrainConfig, folder: Path) -> None:
    """Refuse settings that would make another run of it, by the first key that differs."""
    before, now = flat(old), flat(new)
    free = {*FREE, "trainer", *(f"trainer.{name}" for name in FREE_TRAINER)}
    for key in sorted((before.keys() | now.keys()) - free):
        a, b = before.get(key), now.get(key)
        if a == b:
            continue
        if key == "train.steps" and b > a:  # a run may be made longer
            continue
        raise Refused(
            f"{key} is {a} in the run and {b} now",
            str(folder),
            "Resume with the run's value, or choose another --output.",
        )


def read_record(path: Path) -> dict[str, Any]:
    """What run.json says; of a run that has none, what it says at first."""
    if not path.exists():
        return {"resumed_at": []}
    record = parse_json(path.read_bytes(), str(path))
    if type(record) is not dict or type(record.get("resumed_at")) is not list:
        raise Refused(f"{path} has no list resumed_at", "", "move the file away")
    run_id = record.get("run_id", "")
    if type(run_id) is not str or not re.fullmatch("[0-9a-f]{0,64}", run_id):
        raise Refused(f"{path} has a run_id that is none", "", "move the file away")
    return record


def read_lines(path: Path) -> list[dict[str, str]]:
    """The lines of metrics.csv, each with a whole number of steps; none where there is no file."""
    if not path.exists():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        for line in lines:
            int(line["step"])
    except (KeyError, TypeError, ValueError, OSError, csv.Error) as error:
        raise Refused(f"{path} is not what this program writes", "", "move it away") from error
    return lines


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of Lightning's, mapped and not yet read.

    Raises:
        Refused: it is cut off, damaged, or another program's.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = [part for part in PARTS if part not in saved]
    except Exception as error:  # whatever a damaged file makes torch say, in its own words
        raise unusable(path, "it is damaged, or another program's file") from error
    if missing:
        raise unusable(path, f"it has no {', '.join(missing)}")
    return saved


def unusable(path: Path, why: str) -> Refused:
    """The refusal of a checkpoint."""
    remedy = "Put back a copy of it; or move it away, and --resume begins again."
    return Refused(f"{path} is no checkpoint of this run", why, remedy)
