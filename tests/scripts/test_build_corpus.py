"""Promises of the corpus script: documents in order, each closed, as many tokens as asked."""

import importlib.util
import json
import lzma
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np

from wakesleep.streams.tokenizer import END, Tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_corpus.py"
TOKENIZER = files("wakesleep.streams") / "data" / "default" / "tokenizer.json"


def test_corpus_holds_every_document_in_order_and_its_index_tells_where(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("build_corpus", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    texts = {"b.txt.xz": "The second book.\r\nIts end.", "a.txt": "Not much to say. " * 40}
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(texts["b.txt.xz"].encode()))
    (tmp_path / "a.txt").write_bytes(texts["a.txt"].encode())
    output = tmp_path / "made" / "corpus.npy"
    paths = [str(tmp_path / name) for name in texts]
    options = ["--tokenizer", str(TOKENIZER), "--limit", "100", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["build_corpus.py", *paths, *options])
    script.main()

    tokenizer = Tokenizer.load(TOKENIZER)
    ids, index = np.load(output), json.loads(output.with_suffix(".json").read_text())
    whole = {name: tokenizer.encode(text)[:100] for name, text in texts.items()}
    assert ids.dtype == np.uint16
    assert ids.tolist() == [*whole["b.txt.xz"], END, *whole["a.txt"], END]
    assert index["tokenizer_sha256"] == tokenizer.sha256 and index["tokens"] == len(ids)
    for document in index["documents"]:
        start = document["start"]
        assert ids[start : start + document["tokens"]].tolist() == whole[document["name"]]
