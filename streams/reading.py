"""Read documents into a session: segment by segment, with metrics, questions and snapshots.

What is done when depends on token counts alone, so that a stream that was killed and resumed does
the same at the same places. Nothing here grows with the stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from wakesleep.consolidation.sleep_config import SleepConfig
from wakesleep.streams.manifest import DocumentRecord, Manifest
from wakesleep.streams.planting import ask_facts, inserts_of, sample_of
from wakesleep.streams.reading_plan import ReadingPlan, Task
from wakesleep.streams.recorder import IDS, METRICS, SLEEPS, Recorder
from wakesleep.streams.runner import Carried, StreamRunner
from wakesleep.streams.segments import Insert, SegmentReader
from wakesleep.streams.sleeping import Sleeper
from wakesleep.streams.snapshot import write_manifest, write_snapshot
from wakesleep.streams.stopping import Stopped, StopSignals
from wakesleep.streams.token_reader import TokenReader, open_tokens
from wakesleep.streams.tokenizer import END

METRICS_EVERY = 8_192  # tokens between two lines of metrics.jsonl
ASKED_AT = (100_000, 1_000_000, 10_000_000)  # tokens after which some planted facts are asked
ASKED = 4  # of them

Fetched = TypeVar("Fetched")


class Watch(Protocol):
    """Who wants to see how it goes."""

    def metrics(self, line: Mapping[str, Any]) -> None:
        """A line was added to metrics.jsonl."""

    def answers(self, tokens: int, facts: Sequence[Mapping[str, Any]]) -> None:
        """Planted facts were asked after `tokens` tokens."""

    def sleeping(self, tokens: int) -> None:
        """A sleep begins after `tokens` tokens."""

    def slept(self, line: Mapping[str, Any]) -> None:
        """A sleep has ended; a line was added to sleeps.jsonl."""

    def sleepless(self, why: str) -> None:
        """Sleep is wanted, and its budget can never pay for it; told once."""


class Reading:
    """One call of `stream`: carry out a plan and keep the folder up to date."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        runner: StreamRunner,
        recorder: Recorder,
        stop: StopSignals,
        watch: Watch | None = None,
        saved: Carried | None = None,
    ) -> None:
        """saved: what the manifest's state file holds, if that is the runner's."""
        self.folder, self.manifest, self.runner, self.saved = folder, manifest, runner, saved
        self._recorder, self._stop, self._watch = recorder, stop, watch
        self._told_why = False  # nothing sleeps
        config, self._sleeper = manifest.config, None
        if config.sleep.rule != "none":
            self._sleeper = Sleeper(config.sleep, config.seed, runner)

    def carry_out(self, plan: ReadingPlan, source: str | None, first: TokenReader) -> None:
        """Read all tasks of `plan`; the last snapshot is that of the end.

        Args:
            source: where the documents are: a file, a folder, or None for standard input.
            first: the first task's document, opened where it goes on.

        Raises:
            Stopped: a signal came; everything read is saved.
            RuntimeError: a document turned out to be unreadable; what was read is saved.
            OSError: a file could not be written; the last snapshot counts.
        """
        used, tokens = plan.used, first
        self.runner.start_clock()
        for task in plan.tasks:
            left = self.manifest.config.limit_tokens - used
            if left <= 0:
                break
            new = task.index is None
            task = task._replace(index=self._begin(task, source))
            if new and tokens is first:
                self.save()  # from now on the folder knows what it is reading, whatever happens
            tokens = tokens or open_tokens(task.document, self.runner.language_model.tokenizer)
            used += self._read_document(task.index, tokens, left)
            tokens = None
        self.sleep_if_due(idle=True)
        self.finish()

    def finish(self) -> None:
        """Write the last line of metrics and the last snapshot."""
        if self.runner.meters.line.tokens:
            self._write_metrics()
        self.runner.stop_clock()
        self.save()

    def rest(self, config: SleepConfig, grant: int) -> list[dict[str, Any]]:
        """Sleep with nothing to read, until nothing is gained or `grant` FLOPs are spent.

        Returns:
            What was recorded of each sleep.

        Raises:
            Stopped: a signal came; the sleeps before it are saved.
        """
        sleeper, lines, left = Sleeper(config, self.manifest.config.seed, self.runner), [], grant
        while not config.does_nothing and left >= sleeper.least:
            line = self._sleep(sleeper, "idle", left)
            if line is None:
                break
            lines.append(line)
            left -= line["sleep_flops"] + line["gate_flops"] + line["wasted_flops"]
            if not line["accepted"] or not config.replays:  # the same passes again would not help
                break
        self.save()
        if self._stop:
            raise Stopped(self._stop.number)
        return lines

    def save(self) -> None:
        """Write a snapshot of this place."""
        lengths = self._recorder.sync()
        self.manifest = dataclasses.replace(
            self.manifest,
            tokens=self.runner.tokens,
            meters=self.runner.meters,
            metrics_bytes=lengths[METRICS],
            ids_bytes=lengths.get(IDS, 0),
            sleeps_bytes=lengths.get(SLEEPS, self.manifest.sleeps_bytes),
        )
        if self.saved is self.runner.carried:
            write_manifest(self.folder, self.manifest)
        else:
            self.manifest = write_snapshot(self.folder, self.manifest, self.runner.carried)
            self.saved = self.runner.carried

    def _read_document(self, index: int, tokens: TokenReader, limit: float) -> int:
        """Read a document that was begun to its end or `limit` tokens of it; return its tokens."""
        record = self.manifest.documents[index]
        reader = SegmentReader(
            tokens,
            self._inserts(index),
            self.manifest.config.segment_len,
            tokens=record.tokens,
            inserted=record.inserted,
            limit=limit,
        )
        self.sleep_if_due()  # a signal may have come in the middle of a sleep
        # a document that begins inside a chunk has no segment that ends at a boundary by itself
        while segment := self.fetch(lambda: reader.read(*(self.reach() or []))):
            before = self.runner.tokens
            self.runner.read(segment)
            self._recorder.ids(segment.ids)
            self._set_record(index, record.at(reader.cursor, reader.tokens, reader.inserted))
            self.after_segment(before)
        record = self.manifest.documents[index]
        self._set_record(index, dataclasses.replace(record, finished=True, ended=reader.ended))
        return record.tokens

    def fetch(self, read: Callable[[], Fetched]) -> Fetched:
        """Call `read`; a fault of the document ends the reading, not what was read.

        A signal ends it too, at once: standard input may have nothing to say for hours.
        """
        try:
            with self._stop.waiting():
                return read()
        except Stopped:
            self.save()
            raise
        except ValueError as error:
            self.save()
            what, *rest = str(error).splitlines()
            what = f"{what}; the {self.runner.tokens:,} tokens before are saved"
            raise RuntimeError("\n".join([what, *rest])) from error

    def after_segment(self, before: int) -> None:
        """Do what is due between `before` and the tokens that are read now."""
        now = self.runner.tokens
        if self._sleeper is not None:
            self._sleeper.observe()
        if now // METRICS_EVERY > before // METRICS_EVERY:
            self._write_metrics()
        if self._watch is not None and any(before < asked <= now for asked in ASKED_AT):
            facts = sample_of(self.manifest.facts, now, ASKED)
            if facts:
                rows = ask_facts(self.runner.language_model, self.runner.state, facts, now)
                self._watch.answers(now, rows)
        self.sleep_if_due()  # after all that is due once at this place: it may be begun again
        save_every = self.manifest.config.save_every
        stopping = bool(self._stop)  # a signal may come at any moment: look once
        if stopping or now // save_every > before // save_every:
            self.save()
        if stopping:
            raise Stopped(self._stop.number)

    def sleep_if_due(self, *, idle: bool = False) -> None:
        """Sleep, if it is wanted here.

        Raises:
            Stopped: a signal came in the middle; nothing of the sleep has happened, and everything
                before it is saved.
        """
        if self._sleeper is None or self._stop:
            return
        trigger = self._sleeper.due(idle=idle)
        if trigger is None and self._watch is not None and not self._told_why:
            if why := self._sleeper.unpaid(ever=True):
                self._watch.sleepless(why)
                self._told_why = True
        if trigger is not None and self._sleep(self._sleeper, trigger) is None:
            self.save()
            raise Stopped(self._stop.number)

    def reach(self) -> list[int] | None:
        """Tokens of every lane's next segment at most, None if sleep does not mind."""
        return None if self._sleeper is None else self._sleeper.reach()

    def go_on_with(self, lanes: np.ndarray | None) -> None:
        """Sleep only in these lanes [B] bool from now on, None = in all: the others forget."""
        if self._sleeper is not None:
            self._sleeper.lanes = lanes

    def _sleep(self, sleeper: Sleeper, trigger: str, grant: int | None = None) -> dict | None:
        """Sleep once and record it; None if a signal came, and nothing has happened."""
        if self._watch is not None:
            self._watch.sleeping(self.runner.tokens)
        line = sleeper.sleep(trigger, lambda: bool(self._stop), grant)
        if line is not None:
            self._recorder.slept(line)
            if self._watch is not None:
                self._watch.slept(line)
        return line

    def _write_metrics(self) -> None:
        line = self.runner.metrics_line()
        self._recorder.metrics(line)
        if self._watch is not None:
            self._watch.metrics(line)

    def _begin(self, task: Task, source: str | None) -> int:
        """The number of a task's document, whose record is unfinished from now on."""
        records = self.manifest.documents
        if task.index is None:
            record = DocumentRecord(name=task.document.name, source=source)
            # Of standard input nothing can follow once the process has ended.
            records = tuple(dataclasses.replace(r, finished=True) for r in records)
            self.manifest = dataclasses.replace(self.manifest, documents=(*records, record))
            return len(records)
        record = records[task.index]
        if record.tokens:
            self.runner.meters.resumed_at.append(self.runner.tokens)
        record = dataclasses.replace(record, name=task.document.name, source=source, finished=False)
        self._set_record(task.index, record)
        return task.index

    def _set_record(self, index: int, record: DocumentRecord) -> None:
        records = list(self.manifest.documents)
        records[index] = record
        self.manifest = dataclasses.replace(self.manifest, documents=tuple(records))

    def _inserts(self, index: int) -> list[Insert]:
        """What is put into a document: an end before all but the first, facts where they belong."""
        before = sum(record.tokens for record in self.manifest.documents[:index])
        facts = inserts_of(self.manifest.facts, self.runner.language_model.tokenizer, before)
        return [Insert(0, [END])] * (index > 0) + facts
