"""Promises of the corpus script: documents in order, each closed, and no word twice or missing."""

import json
import lzma
from importlib.resources import files

import numpy as np
import pytest

from wakesleep.streams.tokenizer import END, Tokenizer
from wakesleep.streams.training_text import open_texts

TOKENIZER = files("wakesleep.streams") / "data" / "default" / "tokenizer.json"
TEXTS = {
    "b.txt.xz": "The second book.\r\nIts end.",
    "a.txt": "Not much to say. " * 40,
    "c.md": "".join(f"Line {n} of a longer one; " for n in range(300)),
}


@pytest.fixture
def corpus(script):
    return script("build_corpus")


@pytest.fixture
def build(corpus, monkeypatch, tmp_path):
    for name, text in TEXTS.items():
        data = text.encode()
        (tmp_path / name).write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    texts = [str(tmp_path / name) for name in TEXTS]

    def run(output, *options):
        words = ["build_corpus.py", *texts, "--output", str(output), *options]
        monkeypatch.setattr("sys.argv", words)
        return corpus.main()

    return run


def test_corpus_holds_every_document_in_order_and_its_index_tells_where(build, tmp_path):
    output = tmp_path / "made" / "corpus.npy"
    assert build(output, "--limit", "100") == 0
    tokenizer = Tokenizer.load(TOKENIZER)
    ids, index = np.load(output), json.loads(output.with_suffix(".json").read_text())
    whole = {name: tokenizer.encode(text)[:100] for name, text in TEXTS.items()}
    assert ids.dtype == np.uint16
    assert ids.tolist() == [i for text in whole.values() for i in (*text, END)]
    assert index["tokenizer_sha256"] == tokenizer.sha256 and index["tokens"] == len(ids)
    for document in index["documents"]:
        start = document["start"]
        assert ids[start : start + document["tokens"]].tolist() == whole[document["name"]]
    parts = [part.ids.tolist() for part in open_texts((str(output),))]
    assert parts == [[*text, END] for text in whole.values()]
    assert sorted(path.name for path in output.parent.iterdir()) == ["corpus.json", "corpus.npy"]


def test_a_build_that_was_stopped_anywhere_ends_with_the_same_bytes(
    build, corpus, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(corpus, "BLOCK", 50)
    monkeypatch.setattr(corpus, "SAVE_EVERY", 200)
    monkeypatch.setattr(corpus, "SAY_EVERY", 0.0)
    whole, cut = tmp_path / "whole.npy", tmp_path / "cut.npy"
    assert build(whole) == 0
    show, left = corpus._Progress.show, 0

    def stop(self, *args):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        show(self, *args)

    monkeypatch.setattr(corpus._Progress, "show", stop)
    codes = []
    while 0 not in codes and len(codes) < 40:
        left = 3 + len(codes) % 7
        codes.append(build(cut))
    assert codes[-1] == 0 and set(codes[:-1]) == {130} and len(codes) > 5
    assert cut.read_bytes() == whole.read_bytes()
    assert cut.with_suffix(".json").read_text() == whole.with_suffix(".json").read_text()
    said = capsys.readouterr().err
    assert "the same command goes on" in said and "going on behind" in said
    assert "document 3 of 3" in said


def test_what_was_begun_with_other_texts_is_not_taken_up(
    build, corpus, tmp_path, monkeypatch, capsys
):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus.np.lib.format, "write_array_header_1_0", stop)
        assert build(tmp_path / "cut.npy") == 130
    assert build(tmp_path / "cut.npy", "--limit", "9") == 2
    assert "begun with other limit" in capsys.readouterr().err
    assert build(tmp_path / "cut.npy") == 0


def test_texts_that_cannot_be_read_are_named(build, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert build(tmp_path / "c.npy") == 2
    assert "a.txt" in capsys.readouterr().err
    assert not (tmp_path / "c.npy").exists()
