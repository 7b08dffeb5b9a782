"""Tokenise texts into one array of ids, for training: `data.paths=`, `data.mixture.corpus=`.

    python scripts/build_corpus.py data/novels/train data/eb4_v09.txt.xz ... --output train.npy

Texts are files or folders, .txt .md .gz .xz .bz2, of any size. Writes a uint16 .npy and beside it a
.json with the tokenizer's sha256 and each document's place; every document is followed by an
end-of-document id. The same command again goes on where one was stopped, in the middle of a
document too.
"""

import argparse
import json
import os
import sys
import time
from importlib import resources
from pathlib import Path
from typing import BinaryIO

import numpy as np

from wakesleep.streams.documents import Document, open_documents
from wakesleep.streams.errors import Refused
from wakesleep.streams.quantities import duration
from wakesleep.streams.token_reader import TokenReader
from wakesleep.streams.tokenizer import END, Tokenizer
from wakesleep.ttl.files import write_atomically

HEADER_BYTES = 128  # of a .npy of one dimension, whatever its length
BLOCK = 1 << 16  # tokens that are written at a time
SAVE_EVERY = 1 << 21  # tokens between two places to go on from
SAY_EVERY = 2.0  # seconds


class Corpus:
    """The array as far as it is written; a place to go on from is saved beside it.

    Raises:
        ValueError: the vocabulary does not fit into 16 bits.
        Refused: what is there was begun with other texts or settings.
    """

    def __init__(
        self, documents: list[Document], tokenizer: Tokenizer, output: Path, limit: int | None
    ) -> None:
        if tokenizer.vocab_size > 1 << 16:
            raise ValueError(f"vocab_size must be at most 65536, not {tokenizer.vocab_size}")
        self.documents, self.tokenizer = documents, tokenizer
        self.output, self.limit = output, limit
        self.part = output.with_name(f"{output.name}.part")
        self.journal = output.with_name(f"{output.name}.part.json")
        self.settings = {
            "tokenizer_sha256": tokenizer.sha256,
            "limit": limit,
            "files": [[document.name, document.size] for document in documents],
        }
        self.done: list[dict] = []  # documents that are closed
        self.tokens = 0  # written, ends of documents included
        self.cursor: dict | None = None  # in the document that is open
        self.resumed = self._restore()

    def build(self) -> None:
        """Write what is missing; leave the array and its index."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        progress = _Progress(len(self.documents))
        with open(self.part, "r+b" if self.resumed else "wb") as file:
            file.truncate(HEADER_BYTES + 2 * self.tokens)
            file.seek(0, os.SEEK_END)
            for document in self.documents[len(self.done) :]:
                self._append(file, document, progress)
            file.seek(0)
            header = {"descr": "<u2", "fortran_order": False, "shape": (self.tokens,)}
            np.lib.format.write_array_header_1_0(file, header)
            assert file.tell() == HEADER_BYTES
            file.flush()
            os.fsync(file.fileno())
        index = {"tokenizer_sha256": self.tokenizer.sha256, "tokens": self.tokens}
        index["documents"] = self.done
        text = json.dumps(index, indent=1) + "\n"
        write_atomically(self.output.with_suffix(".json"), text.encode())
        os.replace(self.part, self.output)
        self.journal.unlink(missing_ok=True)
        progress.end()

    def _append(self, file: BinaryIO, document: Document, progress: "_Progress") -> None:
        """Write one document from where it stands, and close it."""
        reader = TokenReader(document, self.tokenizer, self.cursor)
        start = self.tokens - reader.tokens
        saved = self.tokens
        while not reader.finished:
            left = BLOCK if self.limit is None else min(BLOCK, self.limit - reader.tokens)
            if left <= 0:
                break
            ids = reader.read(left)
            file.write(ids.astype("<u2").tobytes())
            self.tokens += len(ids)
            progress.show(document.name, len(self.done), self.tokens, ids, self.tokenizer)
            if self.tokens - saved >= SAVE_EVERY:
                self.cursor, saved = reader.cursor, self.tokens
                self._save(file)
        file.write(np.array([END], "<u2").tobytes())
        self.tokens += 1
        self.done.append({"name": document.name, "start": start, "tokens": reader.tokens})
        self.cursor = None
        self._save(file)

    def _save(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        place = {"documents": self.done, "tokens": self.tokens, "cursor": self.cursor}
        write_atomically(self.journal, json.dumps({**self.settings, **place}).encode())

    def _restore(self) -> bool:
        if not (self.part.exists() and self.journal.exists()):
            return False
        saved = json.loads(self.journal.read_text(encoding="utf-8"))
        for name, value in self.settings.items():
            if saved[name] != value:
                raise Refused(
                    f"{self.part} was begun with other {name}",
                    "",
                    "Give the same texts and settings, or remove it to begin again.",
                )
        self.done, self.tokens = saved["documents"], saved["tokens"]
        self.cursor = saved["cursor"]
        return True


class _Progress:
    """A line on stderr every other second."""

    def __init__(self, documents: int) -> None:
        self.documents = documents
        self.begun = self.shown = time.monotonic()
        self.bytes = 0  # of text since the start of this call

    def show(
        self, name: str, closed: int, tokens: int, ids: np.ndarray, tokenizer: Tokenizer
    ) -> None:
        self.bytes += tokenizer.num_bytes(ids)
        now = time.monotonic()
        if now - self.shown < SAY_EVERY:
            return
        self.shown = now
        speed = self.bytes / (now - self.begun) / 1e6
        line = f"document {closed + 1:,} of {self.documents:,}  {tokens / 1e6:,.1f}M tokens"
        self._say(f"{line}  {speed:.1f} MB/s  {duration(now - self.begun)}  {name}")

    def end(self) -> None:
        if sys.stderr.isatty():
            self._say("")

    def _say(self, line: str) -> None:
        ends = {"end": "", "flush": True} if sys.stderr.isatty() else {}
        print(f"\r\x1b[K{line}" if ends else line, file=sys.stderr, **ends)


def main() -> int:
    """Read the command line, tokenise and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", type=Path, help="files and folders")
    shipped = resources.files("wakesleep.streams") / "data" / "default" / "tokenizer.json"
    parser.add_argument("--tokenizer", type=Path, default=Path(str(shipped)))
    parser.add_argument("--limit", type=int, help="tokens kept of each file")
    parser.add_argument("--output", required=True, type=Path, help="a .npy file")
    args = parser.parse_args()
    if args.output.suffix != ".npy":
        parser.error("--output must end in .npy")
    try:
        documents = [d for text in args.texts for d in open_documents(text).documents]
        corpus = Corpus(documents, Tokenizer.load(args.tokenizer), args.output, args.limit)
        if corpus.resumed:
            print(f"going on behind {corpus.tokens:,} tokens", file=sys.stderr)
        corpus.build()
    except ValueError as error:
        print(f"build_corpus: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    print(f"{args.output}: {corpus.tokens:,} tokens of {len(corpus.done)} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())
