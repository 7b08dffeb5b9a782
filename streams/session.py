"""A session: what a model has read, in a folder that survives the process.

session = Session.open("runs/book", store={"capacity": 512})
session.read("book.txt")
print(session.ask("What is the pass code of the amber gate?").answer)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from wakesleep.consolidation.sleep import least_cost
from wakesleep.consolidation.sleep_config import SleepConfig
from wakesleep.streams.ask import Answer, ask
from wakesleep.streams.config import to_yaml
from wakesleep.streams.errors import Refused
from wakesleep.streams.lane_reading import open_lanes, read_lanes
from wakesleep.streams.language_model import LanguageModel
from wakesleep.streams.manifest import Manifest, PlantedFact
from wakesleep.streams.planting import ask_facts
from wakesleep.streams.preparing import Prepared, prepare_reading, with_fact_count
from wakesleep.streams.reading import Reading, Watch
from wakesleep.streams.reading_plan import ReadingPlan
from wakesleep.streams.recorder import (
    IDS,
    METRICS,
    SLEEPS,
    Recorder,
    check_length,
    check_space,
)
from wakesleep.streams.runner import Carried, StreamRunner
from wakesleep.streams.session_loading import Loaded, environment_of, load_session
from wakesleep.streams.sleeping import Sleeper, check_sleep
from wakesleep.streams.snapshot import (
    holds_session,
    locked,
    read_manifest,
    remove_leftovers,
    write_snapshot,
)
from wakesleep.streams.stopping import Stopped, StopSignals
from wakesleep.streams.stream_config import StreamConfig
from wakesleep.streams.summary import read_sleeps, read_summary, summarise, write_summary
from wakesleep.streams.token_reader import TokenReader, open_tokens
from wakesleep.ttl.files import write_atomically

TRIES = 5  # of a reader whose snapshot is replaced while it opens it
STATES = 3  # that are on the disk while a snapshot is written


class Session:
    """One stream and its folder. `open` is for one writer, `load` for any number of readers."""

    def __init__(self, folder: Path, loaded: Loaded, lock: contextlib.ExitStack | None) -> None:
        self.folder = folder
        self.config: StreamConfig = loaded.config
        self.manifest: Manifest | None = loaded.manifest  # None until the folder is made
        self.language_model: LanguageModel = loaded.language_model
        self.runner: StreamRunner = loaded.runner
        self.notes: list[str] = loaded.notes  # lines that people should see
        self._saved: Carried | None = loaded.saved  # what is on the disk
        self._lock = lock  # None: a reader
        self._failed = False

    @classmethod
    def open(
        cls, folder: str | Path, model: str | Path | LanguageModel | None = None, **options: Any
    ) -> Session:
        """Open a session to read more; a new one makes its folder when reading begins.

        Args:
            model: a model folder, or a model that is loaded; None: the session's, or the shipped.
            options: keys of StreamConfig, nested or dotted; those left out are the session's.

        Raises:
            Refused: an impossible option, another writer, a damaged folder, another model.
        """
        folder = Path(folder)
        with contextlib.ExitStack() as lock:
            manifest = None
            if holds_session(folder):
                lock.enter_context(locked(folder))
                manifest = read_manifest(folder)
                check_length(folder / METRICS, manifest.metrics_bytes)
                check_length(folder / IDS, manifest.ids_bytes)
                check_length(folder / SLEEPS, manifest.sleeps_bytes)
                read_sleeps(folder, manifest.sleeps_bytes)  # at the end it would be too late
            loaded = load_session(folder, manifest, options, model)
            return cls(folder, loaded, lock.pop_all())

    @classmethod
    def load(cls, folder: str | Path, options: Mapping[str, Any] | Iterable[str] = ()) -> Session:
        """Load the last snapshot to ask it; takes no lock, writes nothing, lets writers write.

        Raises:
            Refused: there is no session, or it is damaged.
        """
        folder = Path(folder)
        for attempt in range(TRIES):
            manifest = read_manifest(folder)
            try:
                return cls(folder, load_session(folder, manifest, options), None)
            except Refused:
                # A writer may have replaced the snapshot between the two reads: take the new one.
                if attempt == TRIES - 1 or read_manifest(folder).state == manifest.state:
                    raise
        raise AssertionError("the loop above returns or raises")

    @property
    def tokens(self) -> int:
        """Tokens that were read, planted ones and ends of documents included."""
        return self.runner.tokens

    def prepare(self, document: str | Path | None = None, *, again: bool = False) -> Prepared:
        """Find out what `read` would do with the same arguments; changes nothing.

        Raises:
            Refused: as `read`.
        """
        prepared = prepare_reading(
            self.config, self.manifest, self.language_model.tokenizer, document, again=again
        )
        self.notes += prepared.notes
        if prepared.plan.tasks:
            if self.manifest is not None and not os.access(self.folder, os.W_OK):
                raise Refused(f"{self.folder} cannot be written", "", "use another --session")
            self._make_room(prepared)
        if self.manifest is None:
            self._refuse_others()
        return prepared

    def read(
        self,
        document: str | Path | Prepared | None = None,
        *,
        again: bool = False,
        watch: Watch | None = None,
    ) -> dict[str, Any]:
        """Read a document, or go on with it, and return the session's summary.

        Args:
            document: a file, a folder, `-` for standard input, or what `prepare` gave. None: the
                session's unfinished document, or the bundled one if the session is new.
            again: read once more what was finished.

        Raises:
            Refused: another document is unfinished, this one changed, no room; nothing was changed.
            Stopped: Ctrl-C or SIGTERM; everything is saved.
            OSError, RuntimeError: failed while reading; what the last snapshot holds counts.
        """
        self._check_writable()
        prepared = document
        if not isinstance(prepared, Prepared):
            prepared = self.prepare(document, again=again)
        if not prepared.plan.tasks:
            return self._old_summary()
        several = self.config.lanes > 1
        first = None if several else self._open_first(prepared.plan)
        if self.manifest is None:
            self._create(prepared.config, prepared.facts)
        self._adopt_config(self.config)
        with self._reading(watch) as reading:
            if several:
                tokenizer = self.language_model.tokenizer
                lanes = open_lanes(self.manifest, prepared.documents, tokenizer)
                read_lanes(reading, lanes, prepared.documents, prepared.source)
            else:
                reading.carry_out(prepared.plan, prepared.source, first)
        return self._new_summary()

    def ask(self, question: str) -> Answer:
        """Answer a question from what was read; the session does not change.

        Raises:
            Refused: the question is empty or longer than the window, or there are several lanes.
        """
        if self.config.lanes > 1:
            raise Refused(
                "a session of several lanes forgets every document at its end: ask one lane"
            )
        return ask(self.language_model, self.runner.state, question)

    def sleep(self, grant: int, *, watch: Watch | None = None) -> list[dict[str, Any]]:
        """Sleep over what was read, with nothing to read; returns a row per sleep.

        Without a rule of its own the session sleeps by replay, here and nowhere else. The keys of
        sleep count for this call, all others are the session's from now on.

        Args:
            grant: FLOPs that may be spent, beside what `sleep.offline_ratio` allows.

        Raises:
            Refused: nothing was read, a negative grant, or a model that cannot sleep.
            Stopped: Ctrl-C or SIGTERM; the sleeps that were finished are saved, with a summary.
        """
        self._check_writable()
        self.check_rest(grant)
        config = self.rest_config
        self._adopt_config(dataclasses.replace(self.config, sleep=self.manifest.config.sleep))
        try:
            with self._reading(watch, sleeps=True) as reading:
                rows = reading.rest(config, grant)
        except Stopped:
            self._new_summary()
            raise
        self._new_summary()
        return rows

    def check_rest(self, grant: int) -> None:
        """Refuse what `sleep` would refuse.

        Raises:
            Refused: why.
        """
        if self.manifest is None or not self.tokens:
            raise Refused(f"there is nothing to sleep over in {self.folder}")
        if grant < 0:
            raise Refused(f"sleep.budget={grant}: expected FLOPs, at least 0")
        check_sleep(self.rest_config, self.language_model.model)

    @property
    def rest_config(self) -> SleepConfig:
        """How it sleeps at rest."""
        config = self.config.sleep
        return dataclasses.replace(config, rule="replay") if config.rule == "none" else config

    def least_budget(self) -> int:
        """FLOPs below which a sleep would not begin."""
        return least_cost(self.language_model.model, self.runner.state, self.rest_config)

    def unpaid_sleep(self) -> str | None:
        """Why a stream that should have slept never did, in words; None if it did, or need not."""
        if self.runner.meters.sleeps:
            return None
        return Sleeper(self.config.sleep, self.config.seed, self.runner).unpaid()

    def save(self) -> None:
        """Write a snapshot now; `read` does so by itself.

        Raises:
            OSError: it could not be written; the one before counts.
        """
        self._check_writable()
        if self.manifest is None:
            self._create(with_fact_count(self.config, 0), ())
        self._adopt_config(self.config)
        with self._reading(None) as reading:
            reading.save()

    def close(self) -> None:
        """Let others write to the folder. What was read since the last snapshot is not saved."""
        if self._lock is not None:
            self._lock.close()
        self._failed = True

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_first(self, plan: ReadingPlan) -> TokenReader:
        """Open what is read first and fetch its beginning: a refusal must come before a folder."""
        document, index = plan.tasks[0]
        record = None if index is None else self.manifest.documents[index]
        try:
            cursor = None if record is None else record.cursor
            reader = open_tokens(document, self.language_model.tokenizer, cursor)
        except Refused as error:
            if record is None or not record.ended:
                raise
            raise Refused(
                f"{record.name} has grown inside what was its last token",
                f"{record.tokens:,} tokens of it are read",
                "--again reads it from its start",
            ) from error
        _ = reader.finished
        return reader

    def _make_room(self, prepared: Prepared) -> None:
        new = prepared.total_tokens - self.tokens
        ids = int(min(new, 1e12)) * self._id_bytes if self.config.keep_ids else 0
        known = ids if new != float("inf") else 0
        check_space(self.folder, known + STATES * self.runner.state_bytes)

    @property
    def _id_bytes(self) -> int:
        return 2 if self.language_model.tokenizer.vocab_size <= 1 << 16 else 4

    def _create(self, config: StreamConfig, facts: tuple[PlantedFact, ...]) -> None:
        """Make the folder and the first snapshot, of nothing read."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"{self.folder} cannot be made: {error.strerror}") from error
        self._lock.enter_context(locked(self.folder))
        if holds_session(self.folder):
            raise Refused(f"another process has just made a session in {self.folder}")
        self._refuse_others()
        language_model = self.language_model
        manifest = Manifest(
            config=config,
            model_sha256=language_model.model_sha256,
            tokenizer_sha256=language_model.tokenizer.sha256,
            threads=torch.get_num_threads(),
            environment=environment_of(language_model),
            facts=facts,
            ids_dtype=f"uint{8 * self._id_bytes}",
        )
        self.config = config
        self.manifest = write_snapshot(self.folder, manifest, self.runner.carried)
        self._saved = self.runner.carried

    def _refuse_others(self) -> None:
        """Files of the same names that are no session's are not ours to write over."""
        for name in (IDS, METRICS, SLEEPS):
            if os.path.lexists(self.folder / name):
                raise Refused(
                    f"{self.folder} holds {name} but no session.json",
                    "",
                    "move that file away, or use another --session",
                )

    def _adopt_config(self, config: StreamConfig) -> None:
        """Make the options of this call the session's; session.json follows with a snapshot."""
        meters, before = self.runner.meters, self.manifest.config.sleep.bucket
        meters.ledger = config.sleep.bucket.taken_over(meters.ledger, before)
        path, text = self.folder / "config.yaml", to_yaml(config).encode()
        if not path.is_file() or path.read_bytes() != text:
            write_atomically(path, text)
        self.manifest = dataclasses.replace(
            self.manifest,
            config=config,
            threads=torch.get_num_threads(),
            environment=environment_of(self.language_model),
        )

    @contextlib.contextmanager
    def _reading(self, watch: Watch | None, sleeps: bool = False):
        """A Reading with the folder's files open; what it saved is the session's afterwards."""
        remove_leftovers(self.folder)
        lengths = {METRICS: self.manifest.metrics_bytes}
        if self.config.keep_ids:
            lengths[IDS] = self.manifest.ids_bytes
        if sleeps or self.config.sleep.rule != "none" or self.manifest.sleeps_bytes:
            lengths[SLEEPS] = self.manifest.sleeps_bytes
        stop = StopSignals()
        main = threading.current_thread() is threading.main_thread()
        with (
            Recorder(self.folder, lengths, self.manifest.ids_dtype) as recorder,
            stop if main else contextlib.nullcontext(),
        ):
            reading = Reading(
                self.folder, self.manifest, self.runner, recorder, stop, watch, self._saved
            )
            try:
                yield reading
            finally:
                self.manifest, self._saved = reading.manifest, reading.saved
                # Memory is ahead of the disk: only opening it anew makes them agree.
                self._failed = self._saved is not self.runner.carried

    def _new_summary(self) -> dict[str, Any]:
        """Ask all planted facts and write summary.json."""
        facts = [fact for fact in self.manifest.facts if fact.positions[-1] < self.tokens]
        rows = ask_facts(self.language_model, self.runner.state, facts, self.tokens)
        sleeps = read_sleeps(self.folder, self.manifest.sleeps_bytes)
        summary = summarise(self.manifest, self.runner.state_bytes, rows, sleeps)
        write_summary(self.folder, summary)
        return summary

    def _old_summary(self) -> dict[str, Any]:
        """The summary of what was read before; made once more if its file is gone."""
        return read_summary(self.folder, self.manifest) or self._new_summary()

    def _check_writable(self) -> None:
        if self._lock is None:
            raise Refused("a session that was loaded to ask cannot write: Session.open opens it")
        if self._failed:
            raise Refused("this session is closed or its last write failed: open it again")
