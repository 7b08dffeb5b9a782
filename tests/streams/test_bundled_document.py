"""The bundled document is what its description says."""

import hashlib
import json
from importlib.resources import files

from wakesleep.streams.documents import open_document
from wakesleep.streams.token_reader import open_tokens
from wakesleep.streams.tokenizer import Tokenizer

DATA = files("wakesleep.streams") / "data"
ABOUT = json.loads((DATA / "document.json").read_text())


def test_the_bundled_text_is_the_one_described():
    document = open_document(DATA / "document.txt.xz")
    sha256 = hashlib.sha256()
    for text in document.text():
        sha256.update(text.encode())
    assert sha256.hexdigest() == ABOUT["sha256"]
    assert document.size <= 12e6
    assert {"name", "title", "source", "licence"} <= ABOUT.keys()


def test_the_bundled_text_holds_just_over_ten_million_tokens():
    tokenizer = Tokenizer.load(DATA / "default" / "tokenizer.json")
    assert tokenizer.sha256 == ABOUT["tokenizer_sha256"]
    reader = open_tokens(open_document(DATA / "document.txt.xz"), tokenizer)
    while len(reader.read(1 << 16)):
        pass
    cursor = reader.cursor
    assert cursor["tokens"] == ABOUT["tokens"]
    assert 10_000_000 < cursor["tokens"] < 10_000_100
    assert (cursor["bytes"], cursor["sha256"]) == (ABOUT["bytes"], ABOUT["sha256"])
