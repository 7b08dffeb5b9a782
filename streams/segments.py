"""Cut a document into segments on an absolute grid, with what is planted put in.

Segments end at multiples of `segment_len` tokens since the document's start, wherever reading
began: a stream that was stopped and resumed makes the same calls as one that was not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from wakesleep.streams.token_reader import Cursor, TokenReader
from wakesleep.streams.tokenizer import NUM_SPECIAL


class Insert(NamedTuple):
    """Tokens that are not the document's own."""

    position: int  # tokens of the document before them, inserted ones included
    ids: Sequence[int]


class Segment(NamedTuple):
    """What one call of the model reads; T is at most the segment length."""

    ids: np.ndarray  # [T] int64
    text: np.ndarray  # [T] bool: of the document's text, neither inserted nor special


class SegmentReader:
    """The segments of one document, from any place on.

    Args:
        reader: the document's own tokens, standing where they go on.
        inserts: by position; they are cut like the rest.
        tokens, inserted: how many were read before, and how many of these were inserted.
        limit: tokens after which reading stops, inserted ones included.
    """

    def __init__(
        self,
        reader: TokenReader,
        inserts: Sequence[Insert],
        segment_len: int,
        *,
        tokens: int = 0,
        inserted: int = 0,
        limit: float = float("inf"),
    ) -> None:
        self._reader, self._inserts = reader, inserts
        self._segment_len, self._limit = segment_len, limit
        self._ends = list(accumulate(len(insert.ids) for insert in inserts))
        self.tokens, self.inserted = tokens, inserted

    @property
    def cursor(self) -> Cursor:
        """Where the document's own tokens go on."""
        return self._reader.cursor

    @property
    def ended(self) -> bool:
        """Tell whether no token is left; what was to be inserted later on is dropped."""
        return not self._due() and self._reader.finished

    def read(self, most: float = float("inf")) -> Segment | None:
        """Return the next segment, or None at the document's end or at the limit.

        Args:
            most: tokens of a segment that is to end before the grid does.
        """
        end = (self.tokens // self._segment_len + 1) * self._segment_len
        end = int(min(end, self._limit, self.tokens + most))
        ids, own = [], []
        while self.tokens < end:
            if due := self._due():
                part = np.asarray(due[: end - self.tokens], dtype=np.int32)
                self.inserted += len(part)
            elif self._reader.finished:
                break
            else:
                pending = self._pending()
                stop = min(end, pending.position) if pending else end
                part = self._reader.read(stop - self.tokens)
            self.tokens += len(part)
            ids.append(part)
            own.append(np.full(len(part), not due))
        if not ids:
            return None
        tokens = np.concatenate(ids).astype(np.int64)
        return Segment(tokens, np.concatenate(own) & (tokens >= NUM_SPECIAL))

    def _due(self) -> Sequence[int]:
        """The inserted ids that belong to this very place; empty for the document's own."""
        pending = self._pending()
        return pending.ids if pending and pending.position <= self.tokens else ()

    def _pending(self) -> Insert | None:
        """The first insert, or what is left of it, that was not read."""
        index = bisect_right(self._ends, self.inserted)
        if index == len(self._inserts):
            return None
        insert = self._inserts[index]
        left = self._ends[index] - self.inserted
        return Insert(insert.position, insert.ids[len(insert.ids) - left :])
