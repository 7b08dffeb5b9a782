"""Read many documents side by side, one per lane, without padding one to another's length.

A lane whose document ends takes the next unread one at the next step; `reset` marks the first
step of every document, where the model must forget. Which lane reads which document follows from
the documents alone, not from timing. Steps end at multiples of the segment length since a lane's
document began, also behind one that was made shorter.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict

import numpy as np

from wakesleep.streams.documents import Document
from wakesleep.streams.errors import Refused
from wakesleep.streams.token_reader import Cursor, TokenReader
from wakesleep.streams.tokenizer import Tokenizer


class LaneStep(NamedTuple):
    """One call of the model. B lanes, T the segment length."""

    tokens: np.ndarray  # [B, T] int64; zeros from lengths[b] on
    lengths: np.ndarray  # [B] int64, 0 .. T; 0 for a lane without a document
    reset: np.ndarray  # [B] bool; the lane starts a document with this step
    documents: np.ndarray  # [B] int64, index of the lane's document, -1 for none


class LaneCursor(TypedDict):
    """A place between two steps; JSON can hold it."""

    following: int  # index of the first document that no lane has begun
    lanes: list[tuple[int, Cursor] | None]  # per lane: document, place in it


class LaneReader:
    """Iterate over the steps of `lanes` lanes; between two steps, `cursor` is the place.

    Raises:
        Refused: a document that cannot be read or changed; a cursor of other lanes.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        lanes: int,
        segment_len: int,
        tokenizer: Tokenizer,
        cursor: LaneCursor | None = None,
    ):
        if lanes < 1 or segment_len < 1:
            raise ValueError(
                f"lanes and segment_len must be at least 1, not {lanes} and {segment_len}"
            )
        self._documents = documents
        self._tokenizer = tokenizer
        self._segment_len = segment_len
        self._following = 0
        self._lanes: list[tuple[int, TokenReader] | None] = [None] * lanes
        if cursor is not None:
            self._restore(cursor)

    @property
    def cursor(self) -> LaneCursor:
        """The place behind the last step."""
        return {
            "following": self._following,
            "lanes": [lane and (lane[0], lane[1].cursor) for lane in self._lanes],
        }

    @property
    def unfinished(self) -> np.ndarray:
        """Lanes [B] bool in the middle of a document."""
        return np.array(
            [
                lane is not None and 0 < lane[1].tokens and not lane[1].finished
                for lane in self._lanes
            ]
        )

    def __iter__(self) -> Iterator[LaneStep]:
        while step := self.step():
            yield step

    def step(self, most: Sequence[int] | None = None) -> LaneStep | None:
        """The next step, None if all documents are read.

        Args:
            most: tokens of each lane, which is to stop before the grid does; not 0 for all that are
                in the middle of a document.
        """
        lanes = len(self._lanes)
        step = LaneStep(
            tokens=np.zeros((lanes, self._segment_len), dtype=np.int64),
            lengths=np.zeros(lanes, dtype=np.int64),
            reset=np.zeros(lanes, dtype=bool),
            documents=np.full(lanes, -1, dtype=np.int64),
        )
        for lane in range(lanes):
            self._refill(lane)
            if self._lanes[lane] is None:
                continue
            document, reader = self._lanes[lane]
            step.documents[lane] = document
            step.reset[lane] = reader.tokens == 0
            left = self._segment_len - reader.tokens % self._segment_len
            ids = reader.read(left if most is None else min(left, most[lane]))
            step.lengths[lane] = len(ids)
            step.tokens[lane, : len(ids)] = ids
        return step if step.lengths.any() else None

    def _refill(self, lane: int) -> None:
        """Give a lane without tokens the next document, if there is one."""
        while self._lanes[lane] is None or self._lanes[lane][1].finished:
            if self._following == len(self._documents):
                self._lanes[lane] = None
                return
            document = self._documents[self._following]
            self._lanes[lane] = (self._following, TokenReader(document, self._tokenizer))
            self._following += 1

    def _restore(self, cursor: LaneCursor) -> None:
        following, places = cursor["following"], cursor["lanes"]
        begun = [place[0] for place in places if place is not None]
        if len(places) != len(self._lanes):
            raise Refused(
                f"the saved place has {len(places)} lanes, {len(self._lanes)} are asked for",
                "",
                f"go on with lanes={len(places)}",
            )
        if not 0 <= following <= len(self._documents) or not all(
            0 <= document < following for document in begun
        ):
            raise Refused(
                f"the saved place names {max([following, *begun])} documents, "
                f"there are {len(self._documents)}",
                "",
                "give the same documents in the same order",
            )
        self._following = following
        for lane, place in enumerate(places):
            if place is not None:
                document, saved = place
                reader = TokenReader(self._documents[document], self._tokenizer, saved)
                self._lanes[lane] = (document, reader)
