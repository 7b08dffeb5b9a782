"""Promises of lanes: every document whole, in one lane, from its reset to its end."""

import json
import random
from importlib.resources import files
from itertools import pairwise

import numpy as np
import pytest

from wakesleep.streams.documents import open_documents
from wakesleep.streams.errors import Refused
from wakesleep.streams.lanes import LaneReader
from wakesleep.streams.token_reader import open_tokens
from wakesleep.streams.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.load(files("wakesleep.streams") / "data" / "default" / "tokenizer.json")


@pytest.fixture
def documents(tmp_path):
    """Nine texts of very different lengths, a .npy of exactly two segments among them."""
    draw = random.Random(0)
    for index in range(8):
        words = draw.choices("the quick brown fox — jumps 42 times".split(), k=draw.randint(1, 90))
        (tmp_path / f"{index}.txt").write_text(" ".join(words))
    np.save(tmp_path / "4exact.npy", np.arange(32))
    return open_documents(tmp_path).documents


def collect(reader, into=None):
    """Return the tokens of each document; check that padding is zero and lanes are whole."""
    texts = {} if into is None else into
    for step in reader:
        assert step.lengths.max() > 0
        for lane, (length, document) in enumerate(zip(step.lengths, step.documents, strict=True)):
            assert not step.tokens[lane, length:].any()
            assert (length == 0) == (document == -1)
            if document >= 0:
                assert step.reset[lane] == (document not in texts)
                texts.setdefault(int(document), []).extend(step.tokens[lane, :length].tolist())
    return texts


@pytest.mark.parametrize("segment_len", [1, 16, 1000])
@pytest.mark.parametrize("lanes", [1, 2, 5, 12])
def test_each_document_is_read_whole_in_one_lane(documents, bpe, lanes, segment_len):
    whole = [open_tokens(d, bpe).read(1 << 30).tolist() for d in documents]
    texts = collect(LaneReader(documents, lanes, segment_len, bpe))
    assert [texts[index] for index in range(len(documents))] == whole


def test_a_step_that_was_made_shorter_is_followed_by_one_to_the_grid(documents, bpe):
    reader = LaneReader(documents, 2, 16, bpe)
    lengths = [reader.step(most).lengths.tolist() for most in (None, [5, 0], None, [20, 3])]
    assert lengths == [[16, 16], [5, 0], [11, 16], [16, 3]] and reader.unfinished.all()
    texts = collect(LaneReader(documents, 2, 16, bpe, reader.cursor), {0: [], 1: []})
    whole = [len(open_tokens(d, bpe).read(1 << 30)) for d in documents]
    assert [len(texts[i]) for i in range(len(whole))] == [whole[0] - 48, whole[1] - 35, *whole[2:]]


def test_a_lane_takes_the_next_document_at_the_step_after_its_end(documents, bpe):
    steps = list(LaneReader(documents, 2, 16, bpe))
    assert len(steps) > 3
    for before, after in pairwise(steps):
        for lane in range(2):
            if before.lengths[lane] < 16 and before.documents.max() < len(documents) - 1:
                assert after.reset[lane] and after.lengths[lane] > 0


def test_reading_goes_on_after_every_step(documents, bpe):
    steps = list(LaneReader(documents, 3, 16, bpe))
    reader = LaneReader(documents, 3, 16, bpe)
    for place, _ in enumerate(reader):
        saved = json.loads(json.dumps(reader.cursor))
        rest = list(LaneReader(documents, 3, 16, bpe, saved))
        assert len(rest) == len(steps) - place - 1
        for one, other in zip(rest, steps[place + 1 :], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_cursor_of_other_lanes_or_documents_is_refused(documents, bpe):
    reader = LaneReader(documents, 3, 16, bpe)
    next(iter(reader))
    for lanes, given, reason in (
        (2, documents, "has 3 lanes, 2 are asked for"),
        (3, documents[:1], "names 3 documents, there are 1"),
        (3, documents[1:], "has changed"),
    ):
        with pytest.raises(Refused, match=reason):
            LaneReader(given, lanes, 16, bpe, reader.cursor)


def test_no_lanes_or_no_segment_is_refused(documents, bpe):
    for lanes, segment_len in ((0, 16), (2, 0)):
        with pytest.raises(ValueError, match=f"not {lanes} and {segment_len}"):
            LaneReader(documents, lanes, segment_len, bpe)
