"""Documents: where text or token ids come from, and what is refused.

A document is a file, standard input (`-`) or one file of a folder. Its *content* is its text as
UTF-8, without a byte-order mark and decompressed, or the ids of a .npy file as little-endian
int32: offsets and hashes elsewhere count content bytes, so a document is the same document
under any name, date or compression.
"""

import hashlib
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from wakesleep.streams.decoding import check_encoding, decode
from wakesleep.streams.decompress import COMPRESSIONS, PIECE, read_pieces
from wakesleep.streams.errors import Refused, printable

KNOWN_SUFFIXES = (".txt", ".md", ".npy", *COMPRESSIONS)
CHECKED = 8 << 20  # bytes of content that are looked at before anything is started
IDS_PER_PIECE = 1 << 18


class Fingerprint(NamedTuple):
    """What makes two documents the same one."""

    sha256: str  # of the content
    bytes: int  # of content


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document; `open_document` and `open_documents` make it.

    Raises:
        Refused: an option that cannot be used.
    """

    path: Path | None  # None: standard input
    errors: Literal["strict", "replace"] = "strict"  # replace: broken bytes and NUL become U+FFFD
    encoding: str = "utf-8"
    max_ratio: float = 1000.0  # decompressed bytes per compressed byte
    name: str = field(init=False)  # printable file name

    def __post_init__(self):
        name = "stdin" if self.path is None else printable(self.path.name)
        object.__setattr__(self, "name", name)
        check_encoding(self.encoding)
        if self.errors not in ("strict", "replace"):
            raise Refused(f"errors must be strict or replace, not {self.errors}")
        if not self.max_ratio >= 1:
            raise Refused(f"max_ratio must be at least 1 (or inf), not {self.max_ratio}")

    @property
    def kind(self) -> Literal["text", "ids"]:
        """Tell a .npy of token ids from text."""
        return "ids" if self.path is not None and self.path.suffix.lower() == ".npy" else "text"

    @property
    def resumable(self) -> bool:
        """Tell whether the document can be read a second time; standard input cannot."""
        return self.path is not None

    @property
    def size(self) -> int | None:
        """Bytes on disk, None for standard input; a compressed file's content is larger."""
        return None if self.path is None else self.path.stat().st_size

    @property
    def num_ids(self) -> int:
        """Ids that the header of a .npy file announces.

        Raises:
            Refused: the file is no list of integers.
        """
        return _npy_header(self.path)[1]

    def text(self) -> Iterator[str]:
        """Yield the text in pieces, line ends as they are.

        Raises:
            Refused: NUL, bytes that are not in the encoding, a damaged or exploding file.
        """
        chunks = _stdin_pieces() if self.path is None else read_pieces(self.path, self.max_ratio)
        return decode(chunks, self.name, self.errors, self.encoding)

    def ids(self, vocab_size: int) -> Iterator[np.ndarray]:
        """Yield the token ids of a .npy file in pieces (int32).

        Raises:
            Refused: not a list of integers, or an id outside 0 .. vocab_size - 1.
        """
        dtype, count, offset = _npy_header(self.path)
        position = 0
        with open(self.path, "rb") as file:
            file.seek(offset)
            while position < count:
                ids = np.fromfile(file, dtype, min(IDS_PER_PIECE, count - position))
                if not len(ids):
                    raise Refused(f"{self.name} became shorter while it was read")
                outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
                if len(outside):
                    raise Refused(
                        f"{self.name} holds the id {ids[outside[0]]}, "
                        f"the vocabulary is 0 .. {vocab_size - 1}",
                        f"at position {position + outside[0]:,}",
                        "make the ids with the tokenizer of the model in use",
                    )
                yield ids.astype(np.int32)
                position += len(ids)

    def content(self, vocab_size: int) -> Iterator[bytes]:
        """Yield the content in pieces that split no character and no id; see the top of the file.

        Raises:
            Refused: as `text` and `ids`; a document without content.
        """
        if self.kind == "ids":
            pieces = (ids.astype("<i4").tobytes() for ids in self.ids(vocab_size))
        else:
            pieces = (text.encode("utf-8") for text in self.text())
        blank = True
        for piece in pieces:
            blank = False
            yield piece
        if blank:
            raise Refused(f"{self.name} is empty", "", "name a document with text in it")

    def fingerprint(self, vocab_size: int, limit: int | None = None) -> Fingerprint:
        """Hash all content, or its first `limit` bytes; reads that much of the document."""
        sha256, count = hashlib.sha256(), 0
        for piece in self.content(vocab_size):
            piece = piece if limit is None else piece[: limit - count]
            sha256.update(piece)
            count += len(piece)
            if count == limit:
                break
        return Fingerprint(sha256.hexdigest(), count)

    def check(self, vocab_size: int) -> None:
        """Refuse now what the first 8 MiB of content show; a later fault shows while reading.

        Standard input is not touched: it can be read only once.
        """
        if self.path is None:
            return
        seen = 0
        for piece in self.content(vocab_size):
            seen += len(piece)
            if seen >= CHECKED:
                break


class Folder(NamedTuple):
    documents: list[Document]
    skipped: Counter[str]  # reason -> files


def open_document(path: str | Path, **options) -> Document:
    """Open a file or `-`; options are those of `Document`.

    Raises:
        Refused: there is no such file, it is a folder, or not a regular file.
    """
    if str(path) == "-":
        return Document(path=None, **options)
    path = Path(path)
    try:
        mode = path.stat().st_mode
        readable = os.access(path, os.R_OK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise Refused(f"cannot read {path}: {reason}", "", "name an existing text") from None
    if stat.S_ISDIR(mode):
        raise Refused(f"{path} is a folder; one document is expected here")
    if not stat.S_ISREG(mode):
        raise Refused(f"{path} is not a regular file", "", "pipe it in and name - as the document")
    if not readable:
        raise Refused(f"cannot read {path}: permission denied")
    return Document(path=path, **options)


def open_documents(path: str | Path, **options) -> Folder:
    """Open a file, `-`, or every known file of a folder, in byte order of the names.

    Hidden files, links, folders, empty files and other suffixes are skipped and counted.

    Raises:
        Refused: as `open_document`, or a folder without a readable document.
    """
    if str(path) == "-" or not os.path.isdir(path):
        return Folder([open_document(path, **options)], Counter())
    documents, skipped = [], Counter()
    try:
        entries = sorted(os.scandir(path), key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise Refused(f"cannot read the folder {path}: {error.strerror}") from None
    for entry in entries:
        if reason := _reason_to_skip(entry):
            skipped[reason] += 1
        else:
            documents.append(open_document(entry.path, **options))
    if not documents:
        seen = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise Refused(
            f"the folder {path} holds no document",
            f"skipped: {seen or 'nothing, it is empty'}",
            f"known are {' '.join(KNOWN_SUFFIXES)}",
        )
    return Folder(documents, skipped)


def _reason_to_skip(entry: os.DirEntry) -> str | None:
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_symlink():
        return "link"
    if not entry.is_file(follow_symlinks=False):
        return "not a file"
    if not entry.name.lower().endswith(KNOWN_SUFFIXES):
        return "other suffix"
    return "empty" if entry.stat(follow_symlinks=False).st_size == 0 else None


def _stdin_pieces() -> Iterator[bytes]:
    if sys.stdin is None:
        raise Refused("standard input is closed", "", "pipe a text in, or name a file")
    while piece := sys.stdin.buffer.read1(PIECE):
        yield piece


def _npy_header(path: Path) -> tuple[np.dtype, int, int]:
    """Return dtype, number of ids and offset of the data; the map is closed again at once."""
    try:
        mapped = np.lib.format.open_memmap(path, mode="r")
        dtype, shape, offset = mapped.dtype, mapped.shape, mapped.offset
    except (ValueError, OverflowError, OSError, EOFError, TypeError, MemoryError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refused(
            f"{path.name} cannot be read as a .npy file of ids",
            why,
            "save a list of integers with numpy.save",
        ) from error
    if dtype.kind not in "iu" or len(shape) != 1:
        raise Refused(
            f"{path.name} holds {dtype} of shape {shape}, not a list of integers",
            "",
            "save the ids as one row of integers with numpy.save",
        )
    return dtype, shape[0], offset
