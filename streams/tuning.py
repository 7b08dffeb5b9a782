"""A study: settings are drawn by a sampler, measured, and kept where others can go on.

Everything is in the folder: `tune.json` says what is studied, `study.log` is Optuna's journal, and
`trials/` holds a folder per setting. Any number of processes may work in it, on one machine or on
several that share the disk. A setting belongs to the process that holds the lock of its folder; the
system frees the lock of a process that was killed, and whoever comes next goes on with its streams.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wakesleep.streams.config import as_dict, flat
from wakesleep.streams.errors import Refused
from wakesleep.streams.reading import Watch
from wakesleep.streams.snapshot import locked
from wakesleep.streams.stopping import StopSignals
from wakesleep.streams.tune_config import TuneConfig
from wakesleep.streams.tune_trial import measure, read_result
from wakesleep.ttl.config_json import parse_json
from wakesleep.ttl.files import open_regular, write_atomically

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

STUDY, TRIALS, RECORD = "study.log", "trials", "tune.json"
MAX_BYTES = 1 << 20
PATIENCE = 10  # settings that are known already, in a row, before one that is not is drawn

Values = dict[str, Any]


class Tuning:
    """One process's part in a study."""

    def __init__(self, folder: Path, config: TuneConfig, allowed: list[Values]) -> None:
        """Open the study in the folder, or begin it.

        Args:
            allowed: the settings that may be measured; the first one is the one to compare with.
        """
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder, self.config, self.allowed = folder, config, allowed
        self._optuna = optuna
        (folder / TRIALS).mkdir(parents=True, exist_ok=True)
        self.study: Study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / STUDY))),
            sampler=optuna.samplers.TPESampler(seed=config.seed),
            study_name="wakesleep",
            directions=["maximize", "minimize"],
            load_if_exists=True,
        )
        rest = allowed[1:]
        random.Random(config.seed).shuffle(rest)
        whole = len(allowed) <= config.trials
        for values in [allowed[0], *(rest if whole else [])]:
            self.study.enqueue_trial(self._indices(values), skip_if_exists=True)

    @property
    def wanted(self) -> int:
        """Settings that will be measured in all."""
        return min(self.config.trials, len(self.allowed))

    def results(self) -> list[dict[str, Any]]:
        """What was measured so far, in the order of the settings."""
        found = (read_result(self._place(values)) for values in self.allowed)
        return [result for result in found if result is not None]

    def work(
        self,
        told: Callable[[dict[str, Any]], None],
        stop: StopSignals,
        watch: Watch | None = None,
    ) -> None:
        """Measure settings until there are as many as were wanted, others' included.

        Args:
            told: called with the result of every setting that this process measured.
            stop: looked at before every stream.

        Raises:
            Stopped: a signal came; all streams are saved.
        """
        known = 0
        while len(self.results()) < self.wanted:
            stop.check()
            trial = self._abandoned()
            if trial is None:
                if self._all_taken():
                    return  # others are at the last ones
                if known >= PATIENCE:
                    self._draw_unknown()
                trial = self._ask()
            values = self._values(trial.params)
            fresh = values in self.allowed and read_result(self._place(values)) is None
            if values in self.allowed:
                self._measure(trial.number, values, told if fresh else None, stop, watch)
            else:
                self.study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
            known = 0 if fresh else known + 1

    def _measure(self, number: int, values: Values, told, stop: StopSignals, watch) -> None:
        """Measure one setting and tell the study; nothing if another process is at it."""
        place = self._place(values)
        place.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(place))
            except Refused:
                return  # whoever finishes it leaves a result, and this trial is told then
            result = measure(place, self.config, values, stop, watch)
        cost = result["wake_flops"] + result["sleep_flops"]
        self.study.tell(number, [goal_of(self.config, result), cost], skip_if_finished=True)
        if told is not None:
            told(result)

    def _ask(self) -> FrozenTrial:
        trial = self.study.ask()
        for key, choices in self._choices().items():
            trial.suggest_int(key, 0, len(choices) - 1)
        return trial

    def _abandoned(self) -> FrozenTrial | None:
        """A setting that a process began which is no more, or that another one has measured."""
        running = self._optuna.trial.TrialState.RUNNING
        for trial in self.study.get_trials(deepcopy=False, states=(running,)):
            if set(trial.params) != set(self.config.search):
                continue  # it was killed before it knew what to measure
            place = self._place(self._values(trial.params))
            with contextlib.suppress(Refused, FileNotFoundError), locked(place):
                return trial
        return None

    def _draw_unknown(self) -> None:
        """Let the next trial be a setting that nobody has measured."""
        unknown = [v for v in self.allowed if not self._place(v).exists()]
        if unknown:
            number = len(self.study.get_trials(deepcopy=False))
            chosen = random.Random(self.config.seed * 1_000_003 + number).choice(unknown)
            self.study.enqueue_trial(self._indices(chosen))

    def _all_taken(self) -> bool:
        return sum(self._place(v).exists() for v in self.allowed) >= self.wanted

    def _choices(self) -> dict[str, list[Any]]:
        """Values of every key, numbers in their order: near ones are near for the sampler."""

        def ordered(values: list[Any]) -> list[Any]:
            numbers = all(type(value) in (int, float) for value in values)
            return sorted(values) if numbers else values

        return {key: ordered(values) for key, values in self.config.search.items()}

    def _values(self, indices: Mapping[str, int]) -> Values:
        choices = self._choices()
        return {key: choices[key][indices[key]] for key in self.config.search}

    def _indices(self, values: Values) -> dict[str, int]:
        return {key: choices.index(values[key]) for key, choices in self._choices().items()}

    def _place(self, values: Values) -> Path:
        """The folder of a setting."""
        name = hashlib.sha256(json.dumps(as_dict(values), sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / TRIALS / name


def goal_of(config: TuneConfig, result: Mapping[str, Any]) -> float:
    """What is made as large as it can be: the share of facts known, or bits per byte, negated."""
    if config.goal == "bits_per_byte":
        if result["bits_per_byte"] is None:
            raise Refused("goal=bits_per_byte: the document is no text", "", "goal=recall")
        return -result["bits_per_byte"]
    right, asked = result["recall"]
    return right / asked


def check_record(folder: Path, config: TuneConfig, model_sha256: str) -> None:
    """Write what is studied into a new folder, or compare it with what is there.

    Raises:
        Refused: the folder holds another study, or something else.
    """
    now = {"model_sha256": model_sha256, "config": as_dict(config)}
    path = folder / RECORD
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or _holds_others(folder)):
            raise Refused(f"{folder} holds something else", "", "choose another --output")
        folder.mkdir(parents=True, exist_ok=True)
        _write_first(path, json.dumps(now, indent=1).encode() + b"\n")
    before = _read_record(path)
    if before.get("model_sha256") != model_sha256:
        raise Refused(f"{folder} is a study of another model", "", "choose another --output")
    old, new = flat(before["config"]), flat(now["config"])
    for key in sorted(old.keys() | new.keys()):
        if key != "trials" and old.get(key) != new.get(key):
            raise Refused(
                f"{folder} is a study with {key}={old.get(key)}, now it is {new.get(key)}",
                "",
                "choose another --output, or the settings as they were",
            )


def _holds_others(folder: Path) -> bool:
    """Whether there is anything but a record, or one that another process is just writing."""
    others = [path for path in folder.iterdir() if RECORD not in path.name]
    return bool(others) and not (folder / RECORD).exists()


def _write_first(path: Path, data: bytes) -> None:
    """Write a whole file, unless another process has been first."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    write_atomically(scratch, data)
    with contextlib.suppress(FileExistsError):
        os.link(scratch, path)
    scratch.unlink()


def _read_record(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path, MAX_BYTES) as file:
            record = parse_json(file.read(), RECORD)
        if type(record) is not dict or type(record.get("config")) is not dict:
            raise ValueError(f"{RECORD} has no config")
    except ValueError as error:
        what = str(error).splitlines()[0]
        raise Refused(f"{path} is no record of a study", what, "choose another --output") from error
    return record
