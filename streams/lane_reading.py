"""Read the documents of a folder side by side, one per lane, each from a fresh state.

This is for measuring over many documents, not for remembering them: a lane forgets at the end of
its document. Which documents a session has begun, and how far, is in its records, in their order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from wakesleep.streams.documents import Document
from wakesleep.streams.errors import Refused
from wakesleep.streams.lanes import LaneCursor, LaneReader, LaneStep
from wakesleep.streams.manifest import DocumentRecord, Manifest
from wakesleep.streams.reading import Reading
from wakesleep.streams.reading_plan import ReadingPlan, Task
from wakesleep.streams.stream_config import StreamConfig
from wakesleep.streams.tokenizer import NUM_SPECIAL, Tokenizer


def plan_lanes(
    config: StreamConfig,
    records: Sequence[DocumentRecord],
    documents: Sequence[Document],
    vocab_size: int,
) -> ReadingPlan:
    """Say which documents are to be read; those that a session has begun come first.

    Raises:
        Refused: the documents that were begun are not the first ones any more, or a key that
            several lanes do not go with.
    """
    odd = {
        "limit_tokens": config.limit_tokens != float("inf"),
        "facts.count": bool(config.facts.count),
        "keep_ids": config.keep_ids,
    }
    for key, given in odd.items():
        if given:
            free = {"limit_tokens": "inf", "facts.count": "0", "keep_ids": "false"}[key]
            raise Refused(f"lanes={config.lanes} needs {key}={free}")
    for index, record in enumerate(records):
        same = index < len(documents) and (
            documents[index].fingerprint(vocab_size, record.bytes_done).sha256 == record.sha256
        )
        if not same:
            raise Refused(
                f"{record.name} was read, and is not the document number {index + 1} any more",
                "",
                "lanes need the same documents in the same order; use another --session",
            )
    begun = [Task(documents[i], i) for i, record in enumerate(records) if not record.finished]
    new = [Task(document, None) for document in documents[len(records) :]]
    return ReadingPlan(begun + new, frozenset(range(len(records))), 0)


def open_lanes(
    manifest: Manifest, documents: Sequence[Document], tokenizer: Tokenizer
) -> LaneReader:
    """A reader of all documents that stands where the session does."""
    cursor: LaneCursor = {
        "following": len(manifest.documents),
        "lanes": [
            None if index is None else (index, manifest.documents[index].cursor)
            for index in manifest.lane_documents or [None] * manifest.config.lanes
        ],
    }
    config = manifest.config
    return LaneReader(documents, config.lanes, config.segment_len, tokenizer, cursor)


def read_lanes(
    reading: Reading, reader: LaneReader, documents: Sequence[Document], source: str
) -> None:
    """Read all documents to their ends.

    Raises:
        Stopped, RuntimeError, OSError: as `Reading.carry_out`.
    """
    if reading.runner.tokens:
        reading.runner.meters.resumed_at.append(reading.runner.tokens)
    reading.runner.start_clock()
    reading.go_on_with(reader.unfinished)
    reading.sleep_if_due()  # a signal may have come in the middle of a sleep
    while step := reading.fetch(lambda: reader.step(reading.reach())):
        before = reading.runner.tokens
        reading.runner.read_lanes(step.tokens, _text(step), step.lengths, step.reset)
        _note_places(reading, reader.cursor, documents, source)
        reading.go_on_with(reader.unfinished)
        reading.after_segment(before)
    reading.go_on_with(None)
    reading.sleep_if_due(idle=True)
    records = reading.manifest.documents
    done = tuple(dataclasses.replace(r, finished=True, ended=True) for r in records)
    reading.manifest = dataclasses.replace(reading.manifest, documents=done, lane_documents=())
    reading.finish()


def _text(step: LaneStep) -> np.ndarray:
    """[B, T] bool: inside the lane's length, and no special token."""
    inside = np.arange(step.tokens.shape[1]) < step.lengths[:, None]
    return inside & (step.tokens >= NUM_SPECIAL)


def _note_places(
    reading: Reading, cursor: LaneCursor, documents: Sequence[Document], source: str
) -> None:
    """Put where every lane stands into the records."""
    records = list(reading.manifest.documents)
    begun = documents[len(records) : cursor["following"]]
    records += [DocumentRecord(name=document.name, source=source) for document in begun]
    lanes = [None if lane is None else lane[0] for lane in cursor["lanes"]]
    for lane in cursor["lanes"]:
        if lane is not None:
            index, place = lane
            records[index] = records[index].at(place, place["tokens"], 0)
    for index, record in enumerate(records):
        if index not in lanes and not record.finished:
            records[index] = dataclasses.replace(record, finished=True, ended=True)
    reading.manifest = dataclasses.replace(
        reading.manifest, documents=tuple(records), lane_documents=tuple(lanes)
    )
