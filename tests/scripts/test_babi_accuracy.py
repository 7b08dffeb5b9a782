"""Published questions become samples of their own, and reading side by side changes no answer."""

import io
import random
import tarfile

import numpy as np
import pytest
import torch

from wakesleep.streams.language_model import DEFAULT, load_language_model
from wakesleep.streams.prompts import QUESTION, statement_ids

FILE = """\
1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary moved to the garden.
5 Where is Mary? \tgarden\t4
1 Sandra went to the office.
2 Where is Sandra?\toffice\t1
"""


@pytest.fixture
def babi(script):
    return script("babi_accuracy")


@pytest.fixture(scope="module")
def model():
    return load_language_model(DEFAULT, device="cpu")


def archive(folder, tasks):
    with tarfile.open(folder / "babi.tar.xz", "w:xz") as tar:
        for edition, text in (("en", "1 A.\n2 Q?\ta\t1\n"), ("en-10k", FILE)):
            for task in tasks:
                info = tarfile.TarInfo(f"babi/{edition}/{task}_name_test.txt")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
    return folder / "babi.tar.xz"


def test_every_question_has_the_sentences_before_it_and_no_earlier_question(babi, tmp_path):
    samples = babi.read_archive(archive(tmp_path, babi.BABI))["qa3"]
    assert [len(sample.story) for sample in samples] == [2, 3, 1]
    assert samples[1].story[-1] == "Mary moved to the garden."
    assert samples[1][1:] == ("Where is Mary?", "garden")
    with pytest.raises(SystemExit, match="no qa5"):
        babi.read_archive(archive(tmp_path, babi.BABI[:-1]))


def test_sentences_keep_their_order_and_a_passage_its_length(babi, model):
    sample = babi.Sample(["Mary moved to the bathroom.", "John went there."], "Where?", "garden")
    noise = np.full(500, 300)
    said = [i for sentence in sample.story for i in statement_ids(model.tokenizer, sentence)]
    for seed in range(20):
        ids, answer = babi.lay(model, sample, noise, 90, random.Random(seed))
        assert ids.index(QUESTION) == 90 and answer == 2
        assert [i for i in ids[:90] if i != 300] == said
    ids, _ = babi.lay(model, sample, None, 0, random.Random(0))
    assert ids[: len(said)] == said and ids[len(said)] == QUESTION


def test_answers_do_not_depend_on_what_is_read_beside_them(babi, model, monkeypatch):
    monkeypatch.setattr(babi, "SEGMENT", 64)
    samples = list(babi.samples_of(FILE.splitlines()))
    noise = np.arange(300, 1300)
    rows = [
        babi.lay(model, sample, noise, length, random.Random(length))
        for sample in samples
        for length in (0, 100, 140)
    ]
    rows += [([*ids[:-2], 700, ids[-1]], count) for ids, count in rows[:2]]  # a wrong answer
    alone = []
    for ids, count in rows:
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            logits, _, _ = model.model(tokens, model.model.init_state(1))
        said = logits[0, -count - 1 : -1].argmax(-1)
        alone.append(said.tolist() == ids[-count:])
    assert babi.count_right(model, rows) == alone
    assert set(alone) == {True, False}
