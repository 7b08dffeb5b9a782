"""Promises of documents: what may come in, what is refused, with which words."""

import bz2
import gzip
import io
import lzma
import os
import random
import socket
import sys
import tracemalloc
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from wakesleep.streams import documents as module
from wakesleep.streams.decoding import decode
from wakesleep.streams.documents import Document, open_document, open_documents
from wakesleep.streams.errors import Refused, printable

VOCAB = 4096
TEXT = "\ttwo\r\nlines\r\rœuvre 漢字 😀\n" * 50
PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, **options) -> str:
    return "".join(open_document(path, **options).text())


def refusal(path: Path, **options) -> str:
    """Return the message of a refusal by the check, which must have at most three lines."""
    with pytest.raises(Refused) as caught:
        open_document(path, **options).check(VOCAB)
    message = str(caught.value)
    assert message.count("\n") < 3
    assert message.isprintable() or message.replace("\n", "").isprintable()
    return message


def test_text_comes_in_unchanged_whatever_its_packing(tmp_path):
    for name in ("a.txt", "a.md", "a", "a.log"):
        assert read(write(tmp_path, name, TEXT)) == TEXT
    for suffix, pack in PACK.items():
        for name in (f"a.txt{suffix}", f"a{suffix}", f"A.TXT{suffix.upper()}"):
            assert read(write(tmp_path, name, pack(TEXT.encode()))) == TEXT


def test_joined_and_padded_archives_are_read_to_the_end(tmp_path):
    for suffix, pack in PACK.items():
        parts = [pack(TEXT[:70].encode()), bytes(8), pack(b""), pack(TEXT[70:].encode()), bytes(4)]
        assert read(write(tmp_path, f"a{suffix}", b"".join(parts))) == TEXT


def test_a_byte_order_mark_is_dropped_once(tmp_path):
    mark = "\ufeff".encode()
    assert read(write(tmp_path, "a.txt", mark + mark + b"x")) == "\ufeffx"
    assert read(write(tmp_path, "a.txt", "é".encode("utf-16")), encoding="utf-16") == "é"
    assert "".join(decode([b"text", mark, b"y"], "n", "strict", "utf-8")) == "text\ufeffy"
    big = b"\xfe\xff" + "é".encode("utf-16-be")
    assert read(write(tmp_path, "a.txt", big), encoding="utf-16-be") == "é"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32-be", "shift_jis", "latin-1"])
def test_characters_may_straddle_pieces(encoding):
    text = {"shift_jis": "漢字x", "latin-1": "éx"}.get(encoding, "é漢😀\r\n") * 9
    raw = text.encode(encoding)
    for size in (1, 2, 3, 5, 7, 1000):
        chunks = [raw[i : i + size] for i in range(0, len(raw), size)]
        assert "".join(decode(chunks, "n", "strict", encoding)) == text
        assert "".join(decode(chunks, "n", "replace", encoding)) == text


@pytest.mark.parametrize("size", [3, 64, 10_000])
@pytest.mark.parametrize(("encoding", "bad"), [("utf-16", 202), ("utf-16-le", 200)])
def test_a_nul_has_its_offset_in_other_encodings_too(size, encoding, bad):
    """With a mark at the start, and none in the later pieces."""
    raw = ("x" * 100 + "\0").encode(encoding)
    with pytest.raises(Refused, match=f"NUL byte\nat byte offset {bad}\n"):
        list(decode([raw[i : i + size] for i in range(0, len(raw), size)], "n", "strict", encoding))


@pytest.mark.parametrize("size", [1, 3, 64, 10_000])
@pytest.mark.parametrize("place", [0, 1, 5, 2999, 3001])
def test_a_bad_byte_is_refused_with_its_offset(place, size):
    good = ("é漢" * 1000).encode()
    bad = {0: 0, 1: 2, 5: 5, 2999: 2997, 3001: 3000}[place]  # a character's first byte
    raw = good[:bad] + b"\xff" + good[bad:]
    chunks = [raw[i : i + size] for i in range(0, len(raw), size)]
    with pytest.raises(Refused, match=f"offset {bad:,}\n"):
        list(decode(chunks, "n", "strict", "utf-8"))
    raw = good[:bad] + b"\0" + good[bad:]
    chunks = [raw[i : i + size] for i in range(0, len(raw), size)]
    with pytest.raises(Refused, match=f"NUL byte\nat byte offset {bad:,}\n"):
        list(decode(chunks, "n", "strict", "utf-8"))


def test_refusals_name_the_way_out_and_the_way_out_works(tmp_path):
    path = write(tmp_path, "bad.txt", b"caf\xe9 \0 end\xc3")
    message = refusal(path)
    for part in ("bad.txt", "0xe9", "offset 3", "errors=replace", "encoding="):
        assert part in message
    assert read(path, errors="replace") == "caf\ufffd \ufffd end\ufffd"
    assert read(write(tmp_path, "l.txt", b"caf\xe9"), encoding="latin-1") == "café"
    assert "offset 9" in refusal(write(tmp_path, "cut.txt", b"an end in\xe6\xbc"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_and_32_are_refused_until_they_are_named(tmp_path, encoding):
    path = write(tmp_path, "u.txt", "Ann lives in Rome.".encode(encoding))
    message = refusal(path)
    if encoding in ("utf-16", "utf-32"):  # these begin with a mark
        assert f"offset 0\nread it with encoding={encoding}" in message
    else:
        assert "NUL" in message and "utf-16" in message
    assert read(path, encoding=encoding) == "Ann lives in Rome."


def test_a_mark_is_seen_in_single_bytes_too():
    for byte_order_mark in (b"\xff\xfe", b"\xfe\xff"):
        chunks = [bytes([byte]) for byte in byte_order_mark + b"A\0B\0"]
        with pytest.raises(Refused, match="encoding=utf-16"):
            list(decode(chunks, "n", "replace", "utf-8"))


def test_options_that_cannot_be_used_are_refused(tmp_path):
    path = write(tmp_path, "a.txt", "x")
    for encoding in ("nonsense", "rot13", "zlib", "hex", "a\0b"):
        assert "encoding" in refusal(path, encoding=encoding)
    assert "errors" in refusal(path, errors="ignore")
    for ratio in (0, -1, float("nan")):
        assert "max_ratio" in refusal(path, max_ratio=ratio)


def test_encodings_that_yield_half_characters_are_refused(tmp_path):
    assert "half" in refusal(write(tmp_path, "a.txt", r"\ud83d"), encoding="unicode_escape")


@contextmanager
def at_most(size: int):
    """Fail if more than `size` bytes are held at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", PACK)
def test_a_small_file_that_explodes_is_refused_at_once(tmp_path, suffix):
    path = write(tmp_path, f"bomb.txt{suffix}", PACK[suffix](b"a" * (40 << 20)))
    limit = 500 if suffix == ".gz" else 1000  # gzip cannot do more than 1,032 : 1
    with at_most(20 << 20):
        message = refusal(path, max_ratio=limit)
    assert f"more than {limit:,} times" in message and "max_ratio" in message
    open_document(path, max_ratio=float("inf")).check(VOCAB)


def test_the_ratio_holds_for_short_files_too(tmp_path):
    packed = bz2.compress(b" " * 200_000)
    path = write(tmp_path, "a.bz2", packed)
    ratio = 200_000 / len(packed)
    assert "times" in refusal(path, max_ratio=ratio - 1)
    assert len(read(path, max_ratio=ratio + 1)) == 200_000


def test_reading_holds_a_few_pieces_only(tmp_path):
    noise = random.Random(0).randbytes(1 << 12).hex().encode()
    path = write(tmp_path, "a.txt.gz", gzip.compress(noise * 3000, 1))
    with at_most(8 << 20):
        assert sum(map(len, open_document(path).text())) == len(noise) * 3000


@pytest.mark.parametrize("suffix", PACK)
def test_damaged_archives_are_refused(tmp_path, suffix):
    packed = PACK[suffix](random.Random(0).randbytes(20_000).hex().encode())
    assert "in the middle" in refusal(write(tmp_path, f"cut{suffix}", packed[:-9]))
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 255
    assert f"cannot be read as {suffix[1:]}" in refusal(write(tmp_path, f"x{suffix}", flipped))
    assert "cannot be read" in refusal(write(tmp_path, f"t{suffix}", "just text"))
    assert "cannot be read" in refusal(write(tmp_path, f"j{suffix}", packed + b"rubbish behind"))


def test_an_archive_that_wants_too_much_memory_is_refused(tmp_path):
    packed = bytearray(lzma.compress(b"text", format=lzma.FORMAT_ALONE))
    packed[1:5] = (1 << 30).to_bytes(4, "little")  # the dictionary it asks for
    assert "128 MiB" in refusal(write(tmp_path, "a.xz", packed))


@pytest.mark.parametrize("name", ["a.txt", "a.gz", "a.xz", "a.bz2", "a.npy"])
def test_an_empty_document_is_refused(tmp_path, name):
    assert name in refusal(write(tmp_path, name, b""))
    suffix = Path(name).suffix
    if suffix in PACK:
        assert "empty" in refusal(write(tmp_path, name, PACK[suffix](b"")))
    if suffix == ".npy":
        np.save(tmp_path / name, np.array([], dtype=np.int32))
        assert name in refusal(tmp_path / name)
    assert "empty" in refusal(write(tmp_path, "mark.txt", "\ufeff"))


def test_what_is_not_a_readable_file_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "nothere.txt")
    assert "folder" in refusal(tmp_path)
    assert refusal("nul\0name")
    assert "too long" in refusal("x" * 5000)
    os.mkfifo(tmp_path / "pipe")
    assert "regular" in refusal(tmp_path / "pipe")
    with pytest.raises(Refused, match="cannot read"):
        open_documents(tmp_path / "nothere")


def test_a_file_name_cannot_forge_output(tmp_path):
    path = write(tmp_path, "evil\n\x1b[31m\u2028name.txt", b"\xff")
    assert "evil\\n\\x1b[31m\\u2028name.txt" in refusal(path)
    assert open_document(path).name == "evil\\n\\x1b[31m\\u2028name.txt"
    assert printable("a\udcff") == "a\\udcff"


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<i4", ">i4", "<i8", ">u8"])
def test_ids_come_in_from_any_integer_type(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(module, "IDS_PER_PIECE", 7)
    ids = np.arange(100, dtype=dtype)
    np.save(tmp_path / "a.npy", ids)
    document = open_document(tmp_path / "a.npy")
    assert document.num_ids == len(ids)
    pieces = list(document.ids(VOCAB))
    assert len(pieces) == 15 and all(piece.dtype == np.int32 for piece in pieces)
    assert np.concatenate(pieces).tolist() == ids.tolist()


@pytest.mark.parametrize("bad", [-1, VOCAB, 10**9, 2**40])
def test_an_id_outside_the_vocabulary_is_refused_with_its_position(tmp_path, monkeypatch, bad):
    monkeypatch.setattr(module, "IDS_PER_PIECE", 10)
    np.save(tmp_path / "far.npy", np.array([1] * 25 + [bad] + [2] * 9))
    message = refusal(tmp_path / "far.npy")
    assert f"id {bad}," in message and "position 25" in message and "0 .. 4095" in message


@pytest.mark.parametrize(
    "array",
    [
        np.array([{}], dtype=object),
        np.zeros((2, 3), dtype=np.int32),
        np.zeros(3, dtype=np.float32),
        np.array(7),
        np.array([True, False]),
        np.zeros(3, dtype=[("a", "i4")]),
        np.array(["1", "2"]),
    ],
)
def test_an_array_that_is_no_list_of_ids_is_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    assert "a.npy" in refusal(tmp_path / "a.npy")


def test_a_damaged_npy_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(1000))
    raw = (tmp_path / "a.npy").read_bytes()
    huge = raw.replace(b"(1000,)", b"(1e3, )")
    for content in (raw[:-8], raw[:40], b"hello", b"\x93NUMPY\x09\x00", huge, b"PK\x03\x04zip"):
        assert "cannot be read as a .npy" in refusal(write(tmp_path, "b.npy", content))


def test_the_check_reads_a_bounded_part(tmp_path, monkeypatch):
    """A fault beyond 8 MiB is left to the reading, which refuses it at its place."""
    bad = 9 << 20
    path = write(tmp_path, "a.txt", b"x" * bad + b"\xff")
    open_document(path).check(VOCAB)
    with pytest.raises(Refused, match=f"offset {bad:,}"):
        read(path)
    assert "offset 7,340,032" in refusal(write(tmp_path, "b.txt", b"x" * (7 << 20) + b"\xff"))


def stdin_of(chunks: list[bytes]):
    class Pipe(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            chunk = chunks.pop(0) if chunks else b""
            buffer[: len(chunk)] = chunk
            return len(chunk)

    return types.SimpleNamespace(buffer=io.BufferedReader(Pipe()))


def test_standard_input_is_read_as_it_arrives(monkeypatch):
    raw = TEXT.encode()
    monkeypatch.setattr(sys, "stdin", stdin_of([raw[:1], raw[1:31], raw[31:]]))
    document = open_document("-")
    assert (document.name, document.size, document.resumable) == ("stdin", None, False)
    document.check(VOCAB)  # leaves it untouched
    assert "".join(document.text()) == TEXT
    monkeypatch.setattr(sys, "stdin", stdin_of([]))
    with pytest.raises(Refused, match="stdin is empty"):
        list(open_document("-").content(VOCAB))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(Refused, match="closed"):
        list(open_document("-").text())


def test_a_folder_is_read_in_byte_order_and_the_rest_is_counted(tmp_path, monkeypatch):
    for name in (
        "b.txt",
        "a.md",
        "B.txt",
        "é.txt",
        "z.txt.gz",
        ".hidden.txt",
        "notes.pdf",
        "0.TXT",
    ):
        write(tmp_path, name, "x")
    np.save(tmp_path / "ids.npy", np.array([9]))
    write(tmp_path, "nothing.txt", "")
    (tmp_path / "inner.txt").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # the path of a socket must be short
        listener.bind("s.txt")
    documents, skipped = open_documents(tmp_path, errors="replace")
    names = ["0.TXT", "B.txt", "a.md", "b.txt", "ids.npy", "z.txt.gz", "é.txt"]
    assert [document.name for document in documents] == names
    assert skipped == {"hidden": 1, "other suffix": 1, "empty": 1, "link": 1, "not a file": 2}
    assert {document.errors for document in documents} == {"replace"}
    assert {document.kind for document in documents} == {"text", "ids"}


def test_a_folder_without_documents_is_refused(tmp_path):
    write(tmp_path, "a.pdf", "x")
    write(tmp_path, ".b.txt", "x")
    with pytest.raises(Refused, match="skipped: 1 hidden, 1 other suffix"):
        open_documents(tmp_path)


def test_a_single_document_is_a_folder_of_one(tmp_path):
    path = write(tmp_path, "a.txt", "x")
    (tmp_path / "link").symlink_to(path)
    for way in (path, str(path), tmp_path / "link"):
        documents, skipped = open_documents(way)
        assert len(documents) == 1 and not skipped


def test_a_document_is_the_same_under_any_name_mark_and_packing(tmp_path):
    same = [
        write(tmp_path, "a.txt", TEXT),
        write(tmp_path, "b.md", "\ufeff" + TEXT),
        write(tmp_path, "c.xz", lzma.compress(TEXT.encode())),
    ]
    prints = {open_document(path).fingerprint(VOCAB) for path in same}
    assert len(prints) == 1
    whole = prints.pop()
    assert whole.bytes == len(TEXT.encode())
    other = open_document(write(tmp_path, "d.txt", TEXT[:-1] + "x"))
    assert other.fingerprint(VOCAB) != whole
    limit = whole.bytes - 1
    assert other.fingerprint(VOCAB, limit) == open_document(same[0]).fingerprint(VOCAB, limit)
    assert other.fingerprint(VOCAB, limit).bytes == limit
    for name, dtype in (("e.npy", np.int64), ("f.npy", ">u2")):
        np.save(tmp_path / name, np.array([9, 300, 4095], dtype=dtype))
    ids = [open_document(tmp_path / name).fingerprint(VOCAB) for name in ("e.npy", "f.npy")]
    assert ids[0] == ids[1] and ids[0].bytes == 12


def test_documents_are_plain_values(tmp_path):
    path = write(tmp_path, "a.txt", "x")
    assert open_document(path) == Document(path=path)
