"""The data of a run: what is held out is nowhere in training, and a resumed run reads the same."""

import json

import numpy as np
import pytest

from wakesleep.streams.config import load_config
from wakesleep.streams.errors import Refused
from wakesleep.streams.language_model import DEFAULT, load_language_model
from wakesleep.streams.tokenizer import Tokenizer
from wakesleep.streams.train_command import find_recipe
from wakesleep.streams.training import prepare, train
from wakesleep.streams.training_config import TrainConfig
from wakesleep.ttl.model_io import TOKENIZER

SHORT = ["train.steps=2", "train.lanes=2", "threads=1", "admission.keep_all_share=0"]
TEXT = [*SHORT, "data.kind=text", "train.validate_every=2", "data.paths=[x]"]
MIXTURE = [*SHORT, "data.kind=mixture", "data.mixture.corpus=c/train.npy", "model.vocab_size=4096"]


@pytest.fixture(autouse=True)
def _documents(tmp_path, monkeypatch):
    """Four documents in the folder x, another one in y."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number, length in enumerate((100, 200, 150, 300)):
        write(tmp_path / "x" / f"{number}.npy", rng.integers(0, 64, length))
    write(tmp_path / "y" / "0.npy", rng.integers(0, 64, 200))


def write(path, ids):
    path.parent.mkdir(exist_ok=True)
    np.save(path, ids)


def write_corpus(path, ids):
    write(path, ids)
    sha256 = Tokenizer((DEFAULT / TOKENIZER).read_bytes()).sha256
    path.with_suffix(".json").write_text(json.dumps({"tokenizer_sha256": sha256}))


def recipe(*words: str) -> TrainConfig:
    return load_config(TrainConfig, find_recipe("tiny.yaml"), words)[0]


def assert_refused(tmp_path, message, *words):
    with pytest.raises(Refused, match=message) as refusal:
        prepare(recipe(*words), tmp_path / "run")
    assert len(str(refusal.value).splitlines()) <= 3 and not (tmp_path / "run").exists()


def test_a_document_that_is_trained_on_is_refused_as_held_out(tmp_path):
    prepare(recipe(*TEXT, "data.validation_paths=[y]"), tmp_path / "run")
    for paths in ("x/1.npy", "y,x"):
        message = r"x/[01]\.npy is held out, and in data\.paths too\nLeave"
        assert_refused(tmp_path, message, *TEXT, f"data.validation_paths=[{paths}]")


def test_a_copy_of_it_is_refused_as_well(tmp_path):
    write(tmp_path / "y" / "1.npy", np.load("x/3.npy").astype(np.uint16))
    message = r"y/1\.npy is held out, and in data\.paths too\nThere it is .*x/3\.npy"
    assert_refused(tmp_path, message, *TEXT, "data.validation_paths=[y]")


def test_a_document_that_is_read_twice_is_not_held_out_once(tmp_path):
    message = r"x/3\.npy is held out, and in data\.paths too"
    words = [*TEXT, "data.validation_documents=1"]
    prepare(recipe(*words), tmp_path / "run")
    assert_refused(tmp_path, message, *words, "data.paths=[x,x/3.npy]")


def test_the_documents_of_one_file_are_compared_one_by_one(tmp_path):
    ids = np.tile(np.arange(50), 3)
    write(tmp_path / "books.npy", ids)
    parts = [{"start": start, "tokens": 49} for start in (0, 50, 100)]
    (tmp_path / "books.json").write_text(json.dumps({"documents": parts}))
    words = [*TEXT, "data.paths=[books.npy]", "data.validation_documents=1"]
    assert_refused(tmp_path, r"books\.npy, document 3 is held out.*\nThere .*document 2", *words)


def test_the_corpus_of_a_mixture_is_not_held_out(tmp_path):
    for name in ("train", "copy"):
        write_corpus(tmp_path / "c" / f"{name}.npy", np.arange(9_000) % 97)
    for name in ("train", "copy"):
        message = r"data\.mixture\.validation_corpus is the text of data\.mixture\.corpus"
        assert_refused(tmp_path, message, *MIXTURE, f"data.mixture.validation_corpus=c/{name}.npy")


@pytest.mark.parametrize("change", ["added", "rewritten", "held out"])
def test_a_run_does_not_go_on_with_other_documents(tmp_path, change):
    config = recipe(*TEXT, "data.validation_paths=[y]")
    train(config, tmp_path / "run")
    ids = np.load("x/1.npy")
    ids[7] += 1
    key = "data.validation_paths" if change == "held out" else "data.paths"
    write(
        tmp_path / {"added": "x/9.npy", "rewritten": "x/1.npy", "held out": "y/9.npy"}[change], ids
    )
    with pytest.raises(Refused, match=f"{key} holds other texts than in the run"):
        prepare(config, tmp_path / "run", resume=True)
    write(tmp_path / "x" / "1.npy", ids - (np.arange(200) == 7))
    for path in ("x/9.npy", "y/9.npy"):
        (tmp_path / path).unlink(missing_ok=True)
    prepare(config, tmp_path / "run", resume=True)


def test_a_run_does_not_go_on_with_another_corpus(tmp_path):
    corpus = np.arange(9_000) % 97
    write_corpus(tmp_path / "c" / "train.npy", corpus)
    config = recipe(*MIXTURE, "train.validate_every=0", "train.sequence_len=512")
    train(config, tmp_path / "run")
    write_corpus(tmp_path / "c" / "train.npy", corpus[::-1])
    with pytest.raises(Refused, match=r"data\.mixture\.corpus holds other texts than in the run"):
        prepare(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"documents": []}, r"data\.paths=\['i\.npy'\] holds no document"),
        ({"documents": [{"start": 0, "tokens": 0}]}, r"data\.paths=.* holds no document"),
        ({"documents": [{"start": 0.0, "tokens": 5.5}]}, r"i\.json is no index of i\.npy"),
        ([], r"i\.json is no index of i\.npy"),
    ],
)
def test_an_index_without_documents_is_refused(tmp_path, index, message):
    write(tmp_path / "i.npy", np.arange(60))
    (tmp_path / "i.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        prepare(recipe(*TEXT, "train.validate_every=0", "data.paths=[i.npy]"), tmp_path / "run")


@pytest.mark.parametrize("index", ["{}", "[]", "nope"])
def test_a_corpus_with_a_damaged_index_is_refused(tmp_path, index):
    write_corpus(tmp_path / "c" / "train.npy", np.arange(9_000) % 97)
    (tmp_path / "c" / "train.json").write_text(index)
    with pytest.raises(ValueError, match=r"c/train\.(json is not plain JSON|npy is of another)"):
        prepare(recipe(*MIXTURE, "train.validate_every=0"), tmp_path / "run")


def test_a_validation_without_texts_names_the_keys(tmp_path):
    for words, message in (
        (["data.validation_documents=0"], r"validate_every=2 needs .*: data\.validation_documents"),
        (["data.validation_paths=[z]"], r"z: no such file; data\.validation_paths names"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(recipe(*TEXT, *words), tmp_path / "run")


def test_a_sequence_too_short_for_its_parts_is_refused(tmp_path):
    write_corpus(tmp_path / "c" / "train.npy", np.arange(9_000) % 97)
    short = [*MIXTURE, "train.validate_every=0", "train.sequence_len=16"]
    assert_refused(tmp_path, r"train\.sequence_len=16 is too short for data\.kind=mixture", *short)


def test_the_tokenizer_of_the_documents_is_exported(tmp_path):
    other = json.loads((DEFAULT / TOKENIZER).read_text())
    (tmp_path / "own.json").write_text(json.dumps(other, indent=1))  # the same one, another file
    sha256 = Tokenizer.load(tmp_path / "own.json").sha256
    index = {"documents": [{"start": 0, "tokens": 59}], "tokenizer_sha256": sha256}
    write(tmp_path / "i.npy", np.arange(60))
    (tmp_path / "i.json").write_text(json.dumps(index))
    words = [*TEXT, "data.paths=[i.npy]", "train.validate_every=0", "model.vocab_size=4096"]
    assert_refused(tmp_path, r"data\.paths: .*i\.npy is of another tokenizer\nName .*", *words)
    nowhere = "data.tokenizer=nowhere.json"
    assert_refused(tmp_path, r"nowhere\.json: no tokenizer can be read", *words, nowhere)
    assert train(recipe(*words, "data.tokenizer=own.json"), tmp_path / "run")["reads_text"]
    assert load_language_model(tmp_path / "run" / "last").tokenizer.sha256 == sha256
