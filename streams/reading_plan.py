"""Decide what a call of `stream` has to do: go on, append, or nothing at all.

A document is known by its content: one whose first bytes are those that a session has read is the
document that was read, whatever its name and date.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
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
    known = _known_as(documents, records, vocab_size)
    if not again:
        _refuse_changed(records, documents, known)
    if unfinished_file(records) and last not in known:
        _refuse_unfinished(records[last])
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


def _known_as(
    documents: Sequence[Document], records: Sequence[DocumentRecord], vocab_size: int
) -> list[int | None]:
    """The record of each document; no two have the same, though their texts may be equal.

    Documents that were read as a whole come first, in their order. Then the last record, if its end
    was not reached: it is that of the first document left that begins so, or else of one that was
    read before and once more. Then whatever else begins as some document did.
    """
    matches = [_matches(document, records, vocab_size) for document in documents]
    last = len(records) - 1
    known: list[int | None] = [None] * len(documents)
    for number, (whole, _) in enumerate(matches):
        known[number] = next((index for index in whole if index not in known), None)
    if records and not records[-1].ended and records[-1].source is not None:
        begun = [n for n, (_, part) in enumerate(matches) if last in part]
        left = [n for n in begun if known[n] is None]
        for number in left[:1] or begun[-1:]:
            known[number] = last
    for number, (_, part) in enumerate(matches):
        if known[number] is None:
            known[number] = next((i for i in reversed(part) if i not in known), None)
    return known


def _matches(
    document: Document, records: Sequence[DocumentRecord], vocab_size: int
) -> tuple[list[int], list[int]]:
    """Records of all of a document, and records of its beginning that can be gone on with."""
    if not document.resumable or not records:
        return [], []
    begins = _beginning(document, {record.bytes_done for record in records}, vocab_size)
    whole, part = [], []
    for index, record in enumerate(records):
        latest = index == len(records) - 1
        if not record.bytes_done:  # nothing of it was read, so nothing tells it from others
            same = latest and record.name == document.name
        else:
            same = begins.sha256.get(record.bytes_done) == record.sha256
        if same and record.ended and begins.length == record.bytes_done:
            whole.append(index)
        # One that ended and has grown since can be gone on with as long as nothing came after it.
        elif same and (latest or not record.ended):
            part.append(index)
    return whole, part


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


def _refuse_changed(
    records: Sequence[DocumentRecord],
    documents: Sequence[Document],
    known: Sequence[int | None],
) -> None:
    """Refuse a document that is where one was read, but does not begin as that did."""
    strangers: dict[str, list[Document]] = {}
    for document, index in zip(documents, known, strict=True):
        if index is None:
            strangers.setdefault(document.name, []).append(document)
    for index, record in enumerate(records):
        # One that is gone on with lies elsewhere now, under its old content.
        if record.source is None or not record.bytes_done or index in known:
            continue
        if any(_is_at(document, record) for document in strangers.get(record.name, ())):
            way = "--again reads it as a new one" if record.ended else "put the old text back"
            raise Refused(
                f"{record.name} has changed since it was read",
                f"in its first {record.bytes_done:,} bytes of text",
                f"{way}, or read the new text in another --session",
            )


def _is_at(document: Document, record: DocumentRecord) -> bool:
    """Whether a document is where that of the record, of the same name, was."""
    if document.path is None:
        return False
    path = Path(os.path.abspath(document.path))
    return Path(record.source) in (path, *path.parents)


def _refuse_unfinished(record: DocumentRecord) -> None:
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
