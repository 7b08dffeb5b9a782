"""Decide what a call of `stream` has to do: go on, append, or nothing at all.

A document is known by its content: one whose first bytes are those that a session has read is the
document that was read, whatever its name and date.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

from wakesleep.streams.documents import Document
from wakesleep.streams.errors import Refused
from wakesleep.streams.manifest import DocumentRecord


class Task(NamedTuple):
    """One document to read."""

    document: Document
    index: int | None  # of its record, which is gone on with; None: it is appended


class ReadingPlan(NamedTuple):
    tasks: list[Task]  # in order; none if everything was read before
    known: frozenset[int]  # records of the documents that were asked for
    used: int  # tokens of those that are no task


def plan_reading(
    records: Sequence[DocumentRecord],
    documents: Sequence[Document],
    *,
    vocab_size: int,
    limit: float,
    again: bool = False,
) -> ReadingPlan:
    """Say what is to be read of `documents`, given what the session has read.

    Args:
        limit: tokens of all `documents` together, those that were read before included.
        again: read what was finished once more.

    Raises:
        Refused: another document is unfinished, or this one changed since.
    """
    last = len(records) - 1
    known = [_known_as(document, records, vocab_size) for document in documents]
    if unfinished_file(records) and last not in known:
        _refuse_unfinished(records[last], documents)
    if again and not unfinished_file(records):
        known = [None] * len(documents)
    done = {index for index in known if index is not None}
    if not unfinished_file(records) and sum(records[i].tokens for i in done) >= limit:
        return ReadingPlan([], frozenset(done), 0)
    tasks = []
    for document, index in zip(documents, known, strict=True):
        if index is None or not _is_complete(document, records[index], vocab_size):
            tasks.append(Task(document, index))
        if index is not None and index != last and tasks and tasks[-1].index == index:
            _refuse_overtaken(records[index], records[last])
    used = sum(records[index].tokens for index in done - {task.index for task in tasks})
    return ReadingPlan(tasks, frozenset(done), used)


def unfinished_file(records: Sequence[DocumentRecord]) -> bool:
    """Tell whether the last document can be gone on with; standard input is gone for good."""
    return bool(records) and not records[-1].finished and records[-1].source is not None


class _Beginning(NamedTuple):
    """What one pass over a document tells about it."""

    sha256: dict[int, str]  # number of bytes -> hash of that many first ones
    length: float  # bytes of content, inf if there are more than was looked at


def _known_as(document: Document, records: Sequence[DocumentRecord], vocab_size: int) -> int | None:
    """The record of this document, the latest if there are several."""
    if not document.resumable or not records:
        return None
    begins = _beginning(document, {record.bytes_done for record in records}, vocab_size)
    for index in reversed(range(len(records))):
        record = records[index]
        latest = index == len(records) - 1
        if not record.bytes_done:  # nothing of it was read, so nothing tells it from others
            same = latest and record.name == document.name
        else:
            same = begins.sha256.get(record.bytes_done) == record.sha256
        # One that ended and has grown since can be gone on with as long as nothing came after it.
        if same and (not record.ended or latest or begins.length == record.bytes_done):
            return index
    return None


def _is_complete(document: Document, record: DocumentRecord, vocab_size: int) -> bool:
    if not record.ended:
        return False
    return _beginning(document, {record.bytes_done}, vocab_size).length == record.bytes_done


def _beginning(document: Document, lengths: set[int], vocab_size: int) -> _Beginning:
    """Hash the first bytes of a document, as many as each of `lengths` says, in one pass."""
    digest, count, found = hashlib.sha256(), 0, {}
    following = sorted(lengths)
    for piece in document.content(vocab_size):
        while following and following[0] <= count + len(piece):
            cut = following.pop(0) - count
            digest.update(piece[:cut])
            piece, count = piece[cut:], count + cut
            found[count] = digest.hexdigest()
        if piece and not following:
            return _Beginning(found, math.inf)
        digest.update(piece)
        count += len(piece)
    return _Beginning(found, count)


def _refuse_unfinished(record: DocumentRecord, documents: Sequence[Document]) -> None:
    if any(document.name == record.name for document in documents):
        raise Refused(
            f"{record.name} has changed since it was read",
            f"in its first {record.bytes_done:,} bytes of text",
            "put the old text back, or read the new one in another --session",
        )
    raise Refused(
        f"the session has not finished {record.name}: {record.tokens:,} tokens are read",
        f"in {record.source}",
        "finish it first (stream --session DIR, without a document), or use another --session",
    )


def _refuse_overtaken(record: DocumentRecord, last: DocumentRecord) -> None:
    raise Refused(
        f"{record.name} was read up to {record.tokens:,} tokens, and {last.name} after it",
        "so it cannot be gone on with",
        "--again reads it from its start, another --session keeps it apart",
    )
