"""A whole study: what may be measured, the processes that measure it, and the report."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

from wakesleep.streams.config import as_dict, flat
from wakesleep.streams.console import Console
from wakesleep.streams.errors import Refused
from wakesleep.streams.language_model import load_language_model, pick_device, pick_dtype
from wakesleep.streams.quantities import count, size
from wakesleep.streams.session import Session
from wakesleep.streams.sleeping import check_sleep
from wakesleep.streams.stopping import Stopped, StopSignals, leave_at_signals
from wakesleep.streams.tune_config import TuneConfig
from wakesleep.streams.tune_plots import draw_study
from wakesleep.streams.tune_progress import Trials, line_of
from wakesleep.streams.tune_report import Report, make_report, write_report
from wakesleep.streams.tuning import Tuning, Values, check_record
from wakesleep.ttl.flops import state_bytes


class Study:
    """Everything is tried that can be tried at once before a folder is made."""

    def __init__(self, folder: Path, config: TuneConfig, workers: int) -> None:
        """Check the settings.

        Raises:
            Refused: a setting that cannot be, or none whose state is small enough.
        """
        self.folder, self.config, self.workers = folder, config, workers
        self.results: list[dict[str, Any]] = []  # when they were last looked at
        first = config.settings()[0]
        self.language_model = load_language_model(config.stream_config(first).model)
        for seed in config.seeds:
            self._open(first, seed).prepare(config.document)
        for key, values in config.search.items():
            for value in values:
                session = self._open(first | {key: value}, config.seeds[0])
                check_sleep(session.config.sleep, self.language_model.model)
        self.allowed = self._allowed()
        if folder.exists():
            check_record(folder, config, self.language_model.model_sha256)

    @property
    def wanted(self) -> int:
        """Settings that will be measured."""
        return min(self.config.trials, len(self.allowed))

    def plan(self) -> str:
        """What will be done, in words."""
        c = self.config
        words = f"{self.wanted} of {len(self.allowed)} settings"
        if left_out := c.grid - len(self.allowed):
            words += f" ({left_out} have a state of more than {size(c.most_state_bytes)})"
        reads = f"{len(c.seeds)} x {count(c.tokens)} tokens, {c.questions} facts each"
        return f"{words}, {reads}, into {self.folder}"

    def begin(self) -> None:
        """Make the folder, or find the study in it."""
        check_record(self.folder, self.config, self.language_model.model_sha256)

    def carry_out(self, trials: Trials, *, quiet: bool = False) -> int:
        """Measure what is left, with all workers.

        Args:
            trials: shows how this process gets on; others print a line per setting unless quiet.

        Returns:
            How many settings other processes are still at; 0: `report` can be made.

        Raises:
            Stopped: a signal came; all streams are saved.
        """
        config = self.config
        if self.workers > 1 and config.stream_config(self.allowed[0]).threads is None:
            threads = max(1, (os.cpu_count() or 1) // self.workers)
            config = dataclasses.replace(config, threads=threads)
        spawn = multiprocessing.get_context("spawn")
        others = [
            spawn.Process(
                target=_help, args=(self.folder, config, self.allowed, quiet, os.getpid())
            )
            for _ in range(self.workers - 1)
        ]
        for process in others:
            process.start()
        tuning = Tuning(self.folder, config, self.allowed)
        with StopSignals() as stop:
            try:
                tuning.work(trials.told, stop, trials)
                stop.check()
                with stop.waiting():
                    for process in others:
                        process.join()
                # what a process left behind that did not come to its end
                tuning.work(trials.told, stop, trials)
            except BaseException:
                for process in others:
                    process.terminate()
                for process in others:
                    process.join()
                raise
        self.results = tuning.results()
        first = any(result["values"] == as_dict(self.allowed[0]) for result in self.results)
        return max(self.wanted - len(self.results), 0 if first else 1)

    def report(self) -> tuple[Report, list[Path]]:
        """Write what the results come to; returns it and its files."""
        report = make_report(self.config, self.results)
        files = write_report(self.folder, self.config, report)
        return report, [*files, *draw_study(self.folder, self.config, report)]

    def _open(self, values: Values, seed: int) -> Session:
        """A session that is never read, so that no folder is made."""
        options = flat(self.config.stream_config(values, seed))
        return Session.open(self.folder / "unmade", **options)

    def _allowed(self) -> list[Values]:
        """The settings whose state is small enough, the first one in front."""
        c, settings = self.config, self.config.settings()
        allowed = [values for values in settings if self._fits(values)]
        if not allowed or allowed[0] != settings[0]:
            raise Refused(
                f"most_state_bytes={c.most_state_bytes}: the first setting has a larger state",
                "",
                "it is what all others are compared with",
            )
        return allowed

    def _fits(self, values: Values) -> bool:
        options, own = self.config.stream_config(values), self.language_model.model.config
        if self.config.most_state_bytes is None:
            return True
        import torch

        parts = state_bytes(
            own,
            window=options.window or own.window,
            capacity=options.store.capacity or own.store.capacity,
            dtype=getattr(torch, pick_dtype(options.dtype, pick_device(options.device))),
        )
        return sum(part.nbytes for part in parts) <= self.config.most_state_bytes


def _help(
    folder: Path, config: TuneConfig, allowed: list[Values], quiet: bool, parent: int
) -> None:
    """Work in a study of another process, for as long as that is there."""
    leave_at_signals()
    console = Console(quiet=quiet)

    def told(result: dict[str, Any]) -> None:
        console.say(line_of(result))
        if os.getppid() != parent:  # it was killed, and nobody waits for us any more
            raise Stopped(signal.SIGTERM)

    try:
        with StopSignals() as stop:
            Tuning(folder, config, allowed).work(told, stop)
    except Stopped as stopped:
        sys.exit(128 + stopped.number)
