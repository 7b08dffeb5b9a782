"""Promises of reading by tokens: from any place on, the same tokens; a changed text is noticed."""

import json
import lzma
import random
import tracemalloc
from importlib.resources import files

import numpy as np
import pytest

from wakesleep.streams import decompress, tokenizer
from wakesleep.streams import documents as documents_module
from wakesleep.streams.documents import open_document
from wakesleep.streams.errors import Refused
from wakesleep.streams.token_reader import START, open_tokens

TEXT = (
    "\ufeffThe pass code of the amber gate is 48291.\r\n\r\n  “Né à Zürich” — 漢字漢字 😀👩‍👧\t"
    + "x" * 700
    + " " * 600
    + "end <|end|> \n"
) * 3


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.Tokenizer.load(
        files("wakesleep.streams") / "data" / "default" / "tokenizer.json"
    )


@pytest.fixture(params=["text", "xz", "ids", "replaced"])
def document(request, tmp_path, bpe, monkeypatch):
    """One document of each kind, cut into small pieces, blocks and steps of decompression."""
    monkeypatch.setattr(decompress, "PIECE", 97)
    monkeypatch.setattr(documents_module, "IDS_PER_PIECE", 31)
    monkeypatch.setattr(tokenizer, "BLOCK", 150)
    raw = TEXT.encode()
    match request.param:
        case "text":
            (tmp_path / "a.txt").write_bytes(raw)
            return open_document(tmp_path / "a.txt")
        case "xz":
            (tmp_path / "a.txt.xz").write_bytes(lzma.compress(raw))
            return open_document(tmp_path / "a.txt.xz")
        case "replaced":
            (tmp_path / "a.txt").write_bytes(raw[:900] + b"\xff\0\xe6\xbc" + raw[900:])
            return open_document(tmp_path / "a.txt", errors="replace")
        case "ids":
            np.save(tmp_path / "a.npy", np.array([*bpe.encode(TEXT)[:200], 0, 4095, 7]))
            return open_document(tmp_path / "a.npy")


def saved(cursor):
    return json.loads(json.dumps(cursor))


def test_reading_goes_on_from_every_place_as_if_uninterrupted(document, bpe):
    whole = open_tokens(document, bpe).read(1 << 30)
    last = open_tokens(document, bpe)
    for place in range(len(whole) + 1):
        assert last.tokens == last.cursor["tokens"] == place
        resumed = open_tokens(document, bpe, saved(last.cursor))
        assert resumed.tokens == place
        assert resumed.cursor["sha256"] == last.cursor["sha256"]
        assert np.array_equal(resumed.read(40), whole[place : place + 40])
        # Looking ahead may move the safe boundary, never the place.
        assert last.finished == (place == len(whole))
        resumed = open_tokens(document, bpe, saved(last.cursor))
        assert np.array_equal(resumed.read(40), whole[place : place + 40])
        assert np.array_equal(last.read(1), whole[place : place + 1])
    assert last.finished


def test_resuming_again_and_again_ends_at_the_same_cursor(document, bpe):
    draw = random.Random(0)
    whole = open_tokens(document, bpe)
    expected = whole.read(1 << 30)
    parts, cursor = [], None
    while True:
        reader = open_tokens(document, bpe, cursor)
        if reader.finished:
            break
        parts.append(reader.read(draw.randint(1, 60)))
        cursor = saved(reader.cursor)
    assert np.array_equal(np.concatenate(parts), expected)
    done = ("tokens", "bytes", "sha256")
    assert [cursor[key] for key in done] == [whole.cursor[key] for key in done]


def test_iterating_yields_every_token_and_the_cursor_behind_it(document, bpe):
    whole = open_tokens(document, bpe).read(1 << 30)
    count = 0
    for ids, cursor in open_tokens(document, bpe):
        assert ids.dtype == np.int32 and len(ids)
        assert np.array_equal(ids, whole[count : count + len(ids)])
        count += len(ids)
        assert cursor["tokens"] == count
        assert np.array_equal(open_tokens(document, bpe, cursor).read(9), whole[count : count + 9])
    assert count == len(whole)


def test_the_cursor_counts_and_hashes_the_content_that_was_read(document, bpe):
    reader = open_tokens(document, bpe)
    for step in (0, 1, 77, 1 << 30):
        reader.read(step)
        cursor = reader.cursor
        assert cursor["sha256"] == document.fingerprint(4096, cursor["bytes"]).sha256
    assert document.fingerprint(4096) == (cursor["sha256"], cursor["bytes"])


def test_tokens_are_those_of_the_whole_text(document, bpe):
    if document.kind == "text":
        text = "".join(document.text())
        assert open_tokens(document, bpe).read(1 << 30).tolist() == bpe.encode(text)


def test_a_change_before_the_place_is_refused_and_one_behind_it_is_not(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(tokenizer, "BLOCK", 150)
    path = tmp_path / "a.txt"
    raw = TEXT.removeprefix("\ufeff").encode()
    path.write_bytes(raw)
    reader = open_tokens(open_document(path), bpe)
    reader.read(160)
    cursor = saved(reader.cursor)
    size = cursor["bytes"]
    following = reader.read(5).tolist()
    path.write_bytes(raw[: size + 99])
    assert open_tokens(open_document(path), bpe, cursor).read(5).tolist() == following
    for changed in (
        b"x" + raw[1:],
        raw[: size - 1] + b"#" + raw[size:],
        raw[: size - 1],
        raw[1:],
        *("x" * shift + "😀" * 2000 for shift in range(4)),  # the place inside a character
        b"short",
    ):
        path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
        with pytest.raises(Refused, match=r"a\.txt has changed since it was read"):
            open_tokens(open_document(path), bpe, cursor)


def test_a_change_is_noticed_in_blocks_already_done(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(tokenizer, "BLOCK", 150)
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    for tokens in (40, 100, 1 << 30):
        reader = open_tokens(open_document(path), bpe)
        reader.read(tokens)
        path.write_text(TEXT.replace("amber", "azure", 1))
        with pytest.raises(Refused, match="has changed"):
            open_tokens(open_document(path), bpe, reader.cursor)
        path.write_text(TEXT)


@pytest.mark.parametrize(
    "damage",
    [
        {"tokens": -1},
        {"bytes": 1.5},
        {"offset": "0"},
        {"skip": True},
        {"skip": 10**9},
        {"offset": 10**9},
        {"sha256": None},
    ],
)
def test_a_damaged_cursor_is_refused(tmp_path, bpe, damage):
    (tmp_path / "a.txt").write_text(TEXT)
    reader = open_tokens(open_document(tmp_path / "a.txt"), bpe)
    reader.read(50)
    with pytest.raises(Refused, match="damaged"):
        open_tokens(open_document(tmp_path / "a.txt"), bpe, reader.cursor | damage)


def test_an_untouched_document_starts_at_start(tmp_path, bpe):
    (tmp_path / "a.txt").write_text("x")
    assert open_tokens(open_document(tmp_path / "a.txt"), bpe).cursor == START


def test_a_late_fault_surfaces_while_reading_and_can_be_mended(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(decompress, "PIECE", 4096)
    monkeypatch.setattr(tokenizer, "BLOCK", 1000)
    path = tmp_path / "a.txt"
    text = "A quiet line.\n" * 2000
    path.write_bytes(text.encode() + b"\xff the rest")
    reader = open_tokens(open_document(path), bpe)
    parts = []
    with pytest.raises(Refused, match="offset 28,000"):
        while True:
            parts.append(reader.read(64))
            cursor = saved(reader.cursor)
    path.write_bytes(text.encode() + b"- the rest")
    parts.append(open_tokens(open_document(path), bpe, cursor).read(1 << 30))
    assert np.concatenate(parts).tolist() == bpe.encode(text + "- the rest")


def test_memory_does_not_grow_with_the_document(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(decompress, "PIECE", 1 << 16)
    monkeypatch.setattr(tokenizer, "BLOCK", 1 << 14)
    path = tmp_path / "a.txt.xz"
    peaks = []
    for lines in (30_000, 90_000):
        path.write_bytes(lzma.compress(b"A quiet line of text.\n" * lines, preset=0))
        reader = open_tokens(open_document(path, max_ratio=1e6), bpe)
        tracemalloc.start()
        while len(reader.read(512)):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.02 + 50_000
