"""Read a document as tokens, from any token on.

A cursor is a small dict that JSON can hold. It names a boundary between units of the tokenizer
(a content offset at which encoding can start afresh), the tokens to skip from there, and the
SHA-256 of all content up to the token it stands at, so a document that changed since is noticed.
"""

import hashlib
from collections.abc import Iterator
from typing import TypedDict

import numpy as np

from wakesleep.streams.documents import Document
from wakesleep.streams.errors import Refused, printable
from wakesleep.streams.tokenizer import Tokenizer


class Cursor(TypedDict):
    """A place in a document, between two tokens."""

    tokens: int  # tokens of this document before the place
    bytes: int  # bytes of content before it
    sha256: str  # of those bytes
    offset: int  # bytes of content before the last safe boundary, at most `bytes`
    skip: int  # tokens from that boundary to the place


START: Cursor = {
    "tokens": 0,
    "bytes": 0,
    "sha256": hashlib.sha256().hexdigest(),
    "offset": 0,
    "skip": 0,
}


class TokenReader:
    """The tokens of one document, in order, with the cursor of every place.

    Iterating yields (ids int32, cursor behind them); `read` gives exact numbers of tokens.
    Memory does not depend on the length of the document.

    Raises:
        Refused: what `Document.text` and `Document.ids` refuse, once it is reached; a document
            whose part before the cursor changed.
    """

    def __init__(self, document: Document, tokenizer: Tokenizer, cursor: Cursor | None = None):
        self.document = document
        self._tokenizer = tokenizer
        cursor = START if cursor is None else _checked(cursor, document.name)
        self._hash = hashlib.sha256()  # of the content before the block
        self._offset = cursor["offset"]  # bytes of content before the block
        self._block = np.empty(0, dtype=np.int32)
        self._taken = 0  # tokens of the block that were read
        self.tokens = cursor["tokens"] - cursor["skip"]
        self._blocks = self._encoded(cursor["offset"])
        if cursor["bytes"]:
            self._return_to(cursor)

    def read(self, count: int) -> np.ndarray:
        """Return the next `count` ids (int32), fewer at the end of the document."""
        parts = []
        while count > 0 and not self.finished:
            part = self._block[self._taken : self._taken + count]
            parts.append(part)
            self._taken += len(part)
            self.tokens += len(part)
            count -= len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    @property
    def finished(self) -> bool:
        """Tell whether no token is left; may read on by one block to find out."""
        while self._taken == len(self._block):
            following = next(self._blocks, None)
            if following is None:
                return True
            done = self._content(self._block)
            self._hash.update(done)
            self._offset += len(done)
            self._block, self._taken = following, 0
        return False

    @property
    def cursor(self) -> Cursor:
        """The place behind the last token that was read."""
        part = self._content(self._block[: self._taken])
        sha256 = self._hash.copy()
        sha256.update(part)
        return {
            "tokens": self.tokens,
            "bytes": self._offset + len(part),
            "sha256": sha256.hexdigest(),
            "offset": self._offset,
            "skip": self._taken,
        }

    def __iter__(self) -> Iterator[tuple[np.ndarray, Cursor]]:
        while not self.finished:
            ids = self.read(len(self._block) - self._taken)
            yield ids, self.cursor

    def _encoded(self, offset: int) -> Iterator[np.ndarray]:
        content = self._content_from(offset)
        if self.document.kind == "ids":
            return (np.frombuffer(piece, dtype="<i4").astype(np.int32) for piece in content)
        return self._tokenizer.encode_stream(piece.decode("utf-8") for piece in content)

    def _content_from(self, offset: int) -> Iterator[bytes]:
        """Yield the content from `offset` on; hash what comes before."""
        for piece in self.document.content(self._tokenizer.vocab_size):
            before = piece[:offset]
            self._hash.update(before)
            offset -= len(before)
            if len(before) < len(piece):
                yield piece[len(before) :]

    def _content(self, ids: np.ndarray) -> bytes:
        if self.document.kind == "ids":
            return ids.astype("<i4").tobytes()
        return self._tokenizer.to_bytes(ids)

    def _return_to(self, cursor: Cursor) -> None:
        """Skip to the cursor; refuse a document that no longer begins as it did."""
        try:
            self.read(cursor["skip"])
            _ = self.finished  # with nothing to skip, this reads what lies before the cursor
            same = (self.cursor["bytes"], self.cursor["sha256"])
        except Refused:
            raise
        except ValueError:  # the cursor now stands inside a character
            same = None
        if same != (cursor["bytes"], cursor["sha256"]):
            raise Refused(
                f"{self.document.name} has changed since it was read",
                f"in its first {cursor['bytes']:,} bytes of text",
                "put the old text back, or read the new one in another session",
            )


def _checked(cursor: Cursor, name: str) -> Cursor:
    """Refuse a cursor that no reader made; session files may come from strangers."""
    numbers = [cursor.get(key) for key in ("tokens", "bytes", "offset", "skip")]
    if (
        not all(type(number) is int and number >= 0 for number in numbers)
        or not isinstance(cursor.get("sha256"), str)
        or cursor["skip"] > cursor["tokens"]
        or cursor["offset"] > cursor["bytes"]
    ):
        raise Refused(f"the saved place in {name} is damaged", printable(str(cursor))[:200])
    return cursor


def open_tokens(
    document: Document, tokenizer: Tokenizer, cursor: Cursor | None = None
) -> TokenReader:
    """Read a document as tokens, from its start or from a cursor."""
    return TokenReader(document, tokenizer, cursor)
