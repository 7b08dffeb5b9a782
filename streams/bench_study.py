"""A whole benchmark: its folder, what is in it already, and what is left to measure."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from wakesleep.streams.bench_cases import PACKAGES, Group, groups, skipped
from wakesleep.streams.bench_config import BenchConfig, Operation
from wakesleep.streams.bench_machine import commit_of, describe
from wakesleep.streams.bench_models import OURS
from wakesleep.streams.bench_process import Processes
from wakesleep.streams.bench_rows import Row, completed
from wakesleep.streams.bench_training import training_config
from wakesleep.streams.bench_work import Told, measure
from wakesleep.streams.config import as_dict, flat
from wakesleep.streams.errors import Refused
from wakesleep.streams.language_model import load_language_model
from wakesleep.streams.snapshot import LOCK, locked
from wakesleep.ttl.config_json import parse_json
from wakesleep.ttl.files import open_regular, write_atomically

RECORD = "bench.json"
MAX_BYTES = 1 << 24
KEYS = {"operation", "group", "implementation", "case", "equal"}  # that rows are found by


class Study:
    """What is to be measured, and what was; rows are saved group by group."""

    def __init__(self, folder: Path, config: BenchConfig, *, again: bool = False) -> None:
        """Look at everything that can be refused, before a folder is made.

        Args:
            again: forget what the folder holds.

        Raises:
            Refused: no such model, or a folder that holds something else.
        """
        self.folder, self.config, self.groups = folder, config, groups(config)
        model = load_language_model(config.model, device="cpu")
        if "model-training" in config.operations:
            training_config(config, model.model.config, OURS)
        self.about = {
            "commit": commit_of(),
            "model_sha256": model.model_sha256,
            "machine": describe(config),
            "config": as_dict(config),
        }
        self.rows: list[Row] = []
        self.date = ""  # of the last measurement
        before = None if _is_free(folder) or again else _read(folder)
        if before is not None:
            _compare(folder, before, self.about)
            self.rows = [row for row in before["rows"] if not row.get("extrapolated")]
            self.date = before["date"]
        self.left = [group for group in self.groups if not self._done(group)]

    def carry_out(self, begun: Callable[[int, Group], None], told: Told) -> list[Row]:
        """Measure what is left, save it group by group, and return all rows.

        Args:
            begun: called with the number of a group and the group before it is measured.
            told: called with how it gets on, in words.

        Raises:
            Stopped: a signal came; what was measured before is saved.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):
            self._carry_out(begun, told)
        return self.results()

    def _carry_out(self, begun: Callable[[int, Group], None], told: Told) -> None:
        modules = ["wakesleep.streams.bench_study", *PACKAGES.values()]
        if "model-training" in self.config.operations:
            modules.append("wakesleep.streams.training")
        processes = Processes(modules)
        for group in self.left:
            begun(self.groups.index(group), group)
            new = measure(self.config, group, processes.run, told)
            self.date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
            self.rows = [row for row in self.rows if not _belongs(row, group)] + new
            self.rows.sort(key=lambda row: get_args(Operation).index(row["operation"]))
            self._save()

    def results(self) -> list[Row]:
        """All rows so far, with what follows from them."""
        return completed(self.rows, self.config)

    def as_data(self) -> dict[str, Any]:
        """Everything as it is saved, and as --json prints it."""
        return {"date": self.date, **self.about, "rows": self.results()}

    def _save(self) -> None:
        text = json.dumps(self.as_data(), indent=1, allow_nan=False)
        write_atomically(self.folder / RECORD, text.encode() + b"\n")

    def _done(self, group: Group) -> bool:
        """Whether all rows are there, none failed, and none was skipped that could run now."""
        rows = {(r["implementation"], r["case"]): r for r in self.rows if _belongs(r, group)}
        return all(
            (row := rows.get((entry.implementation, entry.case))) is not None
            and "failed" not in row
            and row["equal"] is not False
            and row.get("skipped") == skipped(entry)
            for entry in group.entries
        )


def _belongs(row: Row, group: Group) -> bool:
    return (row["operation"], row["group"]) == (group.operation, group.name)


def _is_free(folder: Path) -> bool:
    """Whether the folder is new or empty; it is refused if it holds something else."""
    if (folder / RECORD).exists():
        return False
    if folder.exists() and (not folder.is_dir() or set(os.listdir(folder)) - {LOCK}):
        raise Refused(f"{folder} holds something else", "", "choose another --output")
    return True


def _read(folder: Path) -> dict[str, Any]:
    with open_regular(folder / RECORD, MAX_BYTES) as file:
        found = parse_json(file.read(), RECORD)
    try:
        whole = all(KEYS <= row.keys() for row in found["rows"]) and "date" in found
    except (TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise Refused(f"{folder / RECORD} is no benchmark", "", "--again measures anew")
    return found


def _compare(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to put rows of another commit, machine or setting beside those of now.

    Other operations may be added, and rows of packages that were not installed before.
    """
    old, new = (flat({k: v for k, v in x.items() if k != "rows"}) for x in (before, now))
    for key in new:
        installed = key.startswith("machine.packages.") and None in (old.get(key), new[key])
        if old.get(key) != new[key] and not installed and key != "config.operations":
            raise Refused(
                f"{folder} was measured with {key}={old.get(key)}, now it is {new[key]}",
                "",
                "--again measures anew, or choose another --output",
            )
