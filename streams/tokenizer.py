"""Byte-level BPE whose tokens do not depend on how a text arrives.

A text is first split into units: white space and the characters that follow it, up to the next
white space. Each unit is encoded alone, so a text can be cut, resumed and hashed at any boundary
between units, and the ids of a unit can be remembered. A run of white space or of other
characters that is longer than `MAX_RUN` is cut every `MAX_RUN` characters from its start, which
keeps the cost linear in the text and the result a function of the text alone.

Every token stands for a fixed string of bytes; a document is the concatenation of its tokens.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Engine

from wakesleep.streams.errors import Refused

SPECIAL_TOKENS = (
    "<|end|>",  # end of a document
    "<|question|>",
    "<|answer|>",
    "<|stop|>",  # end of an answer
    "<|unknown|>",  # the answer to a question about nothing
    "<|reserved5|>",
    "<|reserved6|>",
    "<|reserved7|>",
)
NUM_SPECIAL = len(SPECIAL_TOKENS)
END, QUESTION, ANSWER, STOP, UNKNOWN = range(5)

WHITE_SPACE = " \t\n\r\v\f"  # of a run; other Unicode spaces are ordinary characters
MAX_RUN = 256  # characters
BLOCK = 65_536  # characters that are encoded at a time
CACHED_UNITS = 32_768  # about 6 MB; bounded, so that memory does not grow with the stream
MAX_VOCAB = 1 << 20
MAX_FILE = 64 << 20  # bytes

# The possessive first part never gives white space back: no backtracking, hence linear time.
_UNIT = re.compile(
    rf"[{WHITE_SPACE}]{{0,{MAX_RUN}}}+[^{WHITE_SPACE}]{{1,{MAX_RUN}}}|[{WHITE_SPACE}]{{1,{MAX_RUN}}}"
)


def split_pattern() -> str:
    """Split a unit into words, single digits, runs of signs and runs of white space."""
    space = "".join(f"\\x{ord(c):02x}" for c in WHITE_SPACE)
    return "|".join(
        (
            "['\u2019]" r"(?:[sdmt]|ll|ve|re)(?!\p{L})",
            r" ?\p{L}[\p{L}\p{M}]*",
            r"\p{N}",
            rf" ?[^\p{{L}}\p{{N}}{space}]+",
            rf"[{space}]*[\r\n]+",
            rf"[{space}]+(?![^{space}])",
            rf"[{space}]+",
        )
    )


def new_engine(
    vocab: dict[str, int] | None = None, merges: list[tuple[str, str]] | None = None
) -> Engine:
    """Build a byte-level BPE over our split; without a vocabulary, one to be trained."""
    engine = Engine(models.BPE(vocab, merges))
    split = pre_tokenizers.Split(Regex(split_pattern()), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    engine.decoder = decoders.ByteLevel()
    return engine


class Tokenizer:
    """Turn text into ids and back; ids below `NUM_SPECIAL` never come from text.

    Raises:
        Refused: the JSON is not a tokenizer that scripts/train_tokenizer.py wrote.
    """

    def __init__(self, content: bytes):
        self.json = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        vocab, merges = _read_model(content)
        self._bytes = _token_bytes(vocab)
        self._lengths = np.array([len(token) for token in self._bytes], dtype=np.int64)
        self._engine = new_engine(vocab, merges)
        self._cache: dict[str, bytes] = {}  # unit -> its ids as int32

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json.

        Raises:
            Refused: there is none, or what it holds is no tokenizer of ours.
        """
        try:
            with open(path, "rb") as file:
                content = file.read(MAX_FILE + 1)
        except OSError as error:
            raise Refused(f"{path}: no tokenizer can be read there ({error.strerror})") from error
        if len(content) > MAX_FILE:
            raise Refused(f"{path}: a tokenizer holds at most {MAX_FILE:,} bytes")
        return cls(content)

    @property
    def vocab_size(self) -> int:
        """Count all ids, the special ones included."""
        return len(self._bytes)

    @property
    def lengths(self) -> np.ndarray:
        """UTF-8 bytes that every id stands for, [V] int64; special ids stand for none."""
        return self._lengths

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens written in it are ordinary text."""
        return [i for ids in self.encode_stream([text]) for i in ids.tolist()]

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids (int32) of a text that arrives in pieces, about 20 thousand at a time.

        Ids and their order do not depend on where the pieces are cut: the last unit of what has
        arrived is held back until its end is known. No array splits a unit.
        """
        held: list[str] = []
        size = 0
        for part in _slices(pieces):
            held.append(part)
            size += len(part)
            if size >= BLOCK:
                *units, rest = _UNIT.findall("".join(held))
                held, size = [rest], len(rest)
                if units:
                    yield self._encode_units(units)
        if size:
            yield self._encode_units(_UNIT.findall("".join(held)))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids; special ids stand for nothing, broken UTF-8 becomes U+FFFD."""
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def to_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the UTF-8 bytes that ids stand for; special ids stand for none."""
        return b"".join(map(self._bytes.__getitem__, self._checked(ids).tolist()))

    def num_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """Count the UTF-8 bytes that ids stand for."""
        return int(self._lengths[self._checked(ids)].sum())

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, dtype=np.int64)
        outside = (ids < 0) | (ids >= self.vocab_size)
        if outside.any():
            where = int(np.flatnonzero(outside)[0])
            raise ValueError(
                f"ids must lie in 0 .. {self.vocab_size - 1}; position {where} holds "
                f"{ids.flat[where]}: they come from another tokenizer"
            )
        return ids

    def _encode_units(self, units: list[str]) -> np.ndarray:
        cache = self._cache
        missing = set(units).difference(cache)
        _refuse_surrogates(missing)
        if len(cache) + len(missing) > CACHED_UNITS:
            cache.clear()
            missing = set(units)
        for unit in missing:
            cache[unit] = np.array(self._engine.encode(unit).ids, dtype=np.int32).tobytes()
        # A bytearray, because arrays over bytes are read-only.
        return np.frombuffer(bytearray().join(map(cache.__getitem__, units)), dtype=np.int32)


def _refuse_surrogates(units: Iterable[str]) -> None:
    try:
        "".join(units).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text must be valid Unicode; it holds the lone surrogate "
            f"U+{ord(error.object[error.start]):04X}: decode its source with errors='replace'"
        ) from None


def _slices(pieces: Iterable[str]) -> Iterator[str]:
    """Cut long pieces, so that memory stays bounded whatever arrives."""
    for piece in pieces:
        for start in range(0, len(piece), BLOCK):
            yield piece[start : start + BLOCK]


def _read_model(content: bytes) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of a tokenizer.json; refuse what we would read otherwise."""
    try:
        tree = json.loads(content)
        vocab = tree["model"]["vocab"]
        merges = [(left, right) for left, right in tree["model"]["merges"]]
        split = tree["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        problems = {
            "its split of text into words": split != split_pattern(),
            "its normalizer": tree["normalizer"] is not None,
            "its added tokens": tree["added_tokens"] != [],
            "its ids": len(vocab) > MAX_VOCAB or not _counts_up(vocab.values()),
            "its special tokens": [vocab.get(t) for t in SPECIAL_TOKENS] != [*range(NUM_SPECIAL)],
            "its merges": not all(
                {a, b, a + b} <= vocab.keys() and a + b not in SPECIAL_TOKENS for a, b in merges
            ),
            "its bytes": not _ALPHABET.keys() <= vocab.keys(),
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        problems = {f"its form ({type(error).__name__})": True}
    if wrong := [name for name, bad in problems.items() if bad]:
        raise Refused(
            "this is not a tokenizer of ours",
            f"what differs: {', '.join(wrong)}",
            "use one that scripts/train_tokenizer.py wrote",
        )
    return vocab, merges


def _counts_up(ids: Iterable[int]) -> bool:
    ids = list(ids)
    return all(type(i) is int for i in ids) and sorted(ids) == [*range(len(ids))]


def _token_bytes(vocab: dict[str, int]) -> list[bytes]:
    """Return the bytes that each id stands for, none for special ids."""
    names = sorted(vocab, key=vocab.__getitem__)
    try:
        return [b""] * NUM_SPECIAL + [
            bytes(map(_ALPHABET.__getitem__, name)) for name in names[NUM_SPECIAL:]
        ]
    except KeyError as error:
        raise Refused(f"a token of this tokenizer holds {error}, which is not a byte") from error


def _byte_alphabet() -> dict[str, int]:
    """Map each character of a token's name to its byte, as byte-level BPE files spell them.

    Visible Latin-1 characters stand for themselves, the other bytes for U+0100 onwards, in order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    names = visible + [0x100 + index for index in range(len(hidden))]
    return {chr(name): byte for name, byte in zip(names, visible + hidden, strict=True)}


_ALPHABET = _byte_alphabet()
