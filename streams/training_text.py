"""Text for training: every lane reads whole documents in order, one after the other, for ever.

A document is a `.npy` file of token ids, or a part of one that `scripts/build_corpus.py` wrote: the
index beside it says where its documents are. Each pass over the documents deals them anew,
shuffled, to the lanes that are least far. A document starts with a segment of its own and its last
segment is short, so that a lane is reset between two calls of the model and nowhere else.

Shapes: B lanes, K segments of S tokens, T = K * S.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from wakesleep.streams.errors import Refused
from wakesleep.streams.id_files import fingerprint, ids_sha256, map_ids
from wakesleep.streams.training_batch import Answers, Batch
from wakesleep.ttl.config_json import parse_json


class TextLanes:
    """Documents dealt to lanes; batch number and seed decide everything."""

    kinds: tuple[str, ...] = ()

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        lanes: int,
        segment: int,
        segments: int,
        seed: int,
        held_out: bool = False,
    ) -> None:
        self.documents = documents
        self.held_out = held_out  # then batches tell how long ago a target was last read
        self._since = [since_repeat(ids) for ids in self.documents] if held_out else []
        self.lanes, self.segment, self.segments, self.seed = lanes, segment, segments, seed
        self._order: list[list[int]] = [[] for _ in range(lanes)]  # document numbers
        self._ends: list[list[int]] = [[] for _ in range(lanes)]  # segments up to their ends
        self._passes = 0

    @property
    def highest_id(self) -> int:
        """Largest token id of all documents."""
        return max(int(ids.max()) for ids in self.documents)

    @property
    def fingerprint(self) -> str:
        """One for all documents, in their order."""
        return fingerprint(map(ids_sha256, self.documents))

    def batch(self, number: int) -> Batch:
        """Batch `number` of the run."""
        B, K, S = self.lanes, self.segments, self.segment
        tokens = np.zeros((B, K, S), np.int64)
        targets = np.zeros((B, K, S), np.int64)
        weight = np.zeros((B, K, S), np.float32)
        repeat = np.zeros((B, K, S), np.int64)
        lengths = np.zeros((B, K), np.int64)
        reset = np.zeros((B, K), bool)
        for lane in range(B):
            for k in range(K):
                document, piece = self._find(lane, number * K + k)
                ids = self.documents[document]
                here = ids[piece * S : (piece + 1) * S + 1]
                n = min(S, len(here))
                tokens[lane, k, :n] = here[:n]
                targets[lane, k, : len(here) - 1] = here[1:]
                weight[lane, k, : len(here) - 1] = 1.0
                if self.held_out:
                    since = self._since[document][piece * S + 1 : (piece + 1) * S + 1]
                    repeat[lane, k, : len(since)] = since
                lengths[lane, k], reset[lane, k] = n, piece == 0
        rows = (torch.from_numpy(x.reshape(B, K * S)) for x in (tokens, targets, weight))
        nothing = torch.zeros(0, dtype=torch.int64)
        return Batch(
            *rows,
            asked=torch.zeros(B, K * S),
            recalled=torch.zeros(B, K * S),
            fact=torch.zeros(B, K * S, dtype=torch.bool),
            value=torch.zeros(B, K * S, dtype=torch.bool),
            stale=torch.full((B, K * S), -1),
            repeat=torch.from_numpy(repeat.reshape(B, K * S)),
            lengths=torch.from_numpy(lengths),
            reset=torch.from_numpy(reset),
            answers=Answers(*(nothing,) * 5),
            cursor=number,
        )

    def _find(self, lane: int, segment: int) -> tuple[int, int]:
        """The document that a lane reads in its `segment`-th segment, and which piece of it."""
        while not self._ends[lane] or self._ends[lane][-1] <= segment:
            self._deal()
        index = bisect_right(self._ends[lane], segment)
        first = self._ends[lane][index - 1] if index else 0
        return self._order[lane][index], segment - first

    def _deal(self) -> None:
        """One more pass: each document goes to the lane with the fewest segments so far."""
        rng = np.random.default_rng((self.seed, self._passes))
        for document in rng.permutation(len(self.documents)):
            lane = min(range(self.lanes), key=lambda b: (self._ends[b] or [0])[-1])
            pieces = -(-len(self.documents[document]) // self.segment)
            self._order[lane].append(int(document))
            self._ends[lane].append((self._ends[lane] or [0])[-1] + pieces)
        self._passes += 1


def since_repeat(ids: np.ndarray) -> np.ndarray:
    """Tokens since each id was last read behind the same two ids: [N] int32, 0 = never."""
    ids = np.asarray(ids, dtype=np.int64)
    since = np.zeros(len(ids), np.int32)
    base = int(ids.max()) + 1
    if len(ids) < 4 or base > 1 << 20:  # three larger ids do not fit into one number
        return since
    triples = (ids[:-2] * base + ids[1:-1]) * base + ids[2:]
    order = np.argsort(triples, kind="stable")
    again = triples[order[1:]] == triples[order[:-1]]
    since[order[1:][again] + 2] = (order[1:] - order[:-1])[again]
    return since


class Text(NamedTuple):
    name: str  # for people: its file, and which of those in it
    ids: np.ndarray


def open_texts(
    paths: tuple[str, ...], key: str = "data.paths", tokenizer_sha256: str | None = None
) -> list[Text]:
    """Every document in the files that `paths` name; of a folder, those that end in .npy.

    Args:
        key: the setting that names them.
        tokenizer_sha256: of the tokenizer that an index must name, if it names one.

    Raises:
        ValueError: there are no files, one that holds no document, or an index that does not fit.
    """
    files = _files(paths, key)
    texts = [text for path in files for text in _parts(path, key, tokenizer_sha256)]
    if not texts:
        raise Refused(f"{key}={list(paths)} holds no document with a token")
    return texts


def check_apart(training: list[Text], held_out: list[Text]) -> None:
    """Refuse a document that is in both, wherever it was read from.

    Raises:
        Refused: there is one.
    """
    lengths = {len(text.ids) for text in held_out}  # only what is as long is compared
    known = {ids_sha256(t.ids): t.name for t in training if len(t.ids) in lengths}
    lengths &= {len(text.ids) for text in training}
    for text in held_out:
        if len(text.ids) in lengths and (other := known.get(ids_sha256(text.ids))):
            where = "" if other == text.name else f"There it is {other}."
            remedy = "Leave it out of one of the two."
            raise Refused(f"{text.name} is held out, and in data.paths too", where, remedy)


def _files(paths: tuple[str, ...], key: str) -> list[Path]:
    found = []
    for path in map(Path, paths):
        found += sorted(path.glob("*.npy")) if path.is_dir() else [path]
    if not found:
        raise ValueError(f"{key}: no documents: expected .npy files of token ids in {list(paths)}")
    return [path.resolve() for path in found]


def _parts(path: Path, key: str, tokenizer_sha256: str | None) -> list[Text]:
    ids, beside = _open(path, key), path.with_suffix(".json")
    if not beside.is_file():
        return [Text(str(path), ids)]
    index = parse_json(beside.read_bytes(), str(beside))
    try:
        spans = [(part["start"], part["start"] + part["tokens"] + 1) for part in index["documents"]]
        whole = all(type(place) is int for span in spans for place in span)
        if not whole or not all(0 <= start < stop <= len(ids) for start, stop in spans):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        message = f"{beside} is no index of {path.name}; remove it or build both again"
        raise ValueError(message) from None
    if tokenizer_sha256 and index.get("tokenizer_sha256", tokenizer_sha256) != tokenizer_sha256:
        remedy = "Name its tokenizer.json by data.tokenizer, or build the ids with this one."
        raise Refused(f"{key}: {path} is of another tokenizer", "", remedy)
    return [
        Text(f"{path}, document {number}", ids[start:stop])
        for number, (start, stop) in enumerate(spans, 1)
        if stop - start > 1
    ]


def _open(path: Path, key: str) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {key} names .npy files or folders of them")
    ids = map_ids(path, key)
    if len(ids) < 2 or int(ids.min()) < 0:
        raise ValueError(f"{key}: {path}: expected at least two ids from 0 on, got {len(ids):,}")
    return ids
