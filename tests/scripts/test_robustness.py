"""Bad input leaves a state finite, every bad row is counted, and a fault would be seen."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from wakesleep.streams.console import Console
from wakesleep.streams.language_model import load_language_model
from wakesleep.streams.runner import StreamRunner
from wakesleep.streams.segments import Segment
from wakesleep.ttl.state import flatten, unflatten


@pytest.fixture
def robustness(script):
    return script("robustness")


@pytest.fixture
def words(model_folder, text, tmp_path):
    keys = [f"model={model_folder}", f"document={text}", "tokens=3k", "clean_tokens=1k"]
    return ["robustness.py", *keys, "threads=1", "--output", str(tmp_path / "out")]


def test_every_input_is_measured_once(robustness, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        robustness.main()
    assert stopped.value.code == 0
    rows = json.loads((tmp_path / "out" / "robustness.json").read_text())["rows"]
    assert [row["input"] for row in rows] == list(robustness.INPUTS)
    for row in rows:
        assert row["tokens"] == 3000 and row["finite"] and row["max_norm"] > 0
        assert row["bits_per_byte_fresh"] == rows[0]["bits_per_byte_fresh"]
        assert row["bits_per_byte_after"] != row["bits_per_byte_fresh"]
        broken = row["input"] == "nonfinite"
        assert row["nonfinite_rows"] == row["expected_rows"]
        assert (10 < row["expected_rows"] < 60) if broken else row["expected_rows"] == 0
    out = capsys.readouterr().out
    assert all(f"| {name} | 3,000 | finite |" in out for name in robustness.INPUTS)

    monkeypatch.setattr(robustness, "measure", None)  # everything is there: nothing is measured
    with pytest.raises(SystemExit) as stopped:
        robustness.main()
    assert stopped.value.code == 0 and capsys.readouterr().out == out


@pytest.mark.parametrize("fault", [{"finite": False, "max_norm": None}, {"nonfinite_rows": 6}])
def test_a_fault_is_an_exit_code(robustness, words, monkeypatch, fault):
    sound = {"input": "noise", "tokens": 9, "finite": True, "bad_numbers": 3, "max_norm": 1.0}
    sound |= {"nonfinite_rows": 7, "expected_rows": 7}
    sound |= {"bits_per_byte_after": 1.0, "bits_per_byte_fresh": 1.0}
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(robustness, "run", lambda *_: [sound, sound | fault])
    with pytest.raises(SystemExit) as stopped:
        robustness.main()
    assert stopped.value.code == 1


def test_inputs_are_what_they_are_called(robustness, model_folder):
    language_model = load_language_model(model_folder)
    text = np.arange(100, 4000)
    made = {
        name: robustness.make_input(name, text, language_model, 0) for name in robustness.INPUTS
    }
    assert all(len(ids) == len(text) for ids in made.values())
    assert made["text"].tolist() == text.tolist()
    assert set(made["zeros"].tolist()) == {0}
    assert language_model.tokenizer.decode(made["constant"].tolist()) == " the" * len(text)
    counts = np.bincount(made["noise"], minlength=4096)
    assert len(counts) == 4096 and counts[:8].sum() > 0 and counts.max() < 10
    replaced = made["nonfinite"] != text
    assert set(made["nonfinite"][replaced].tolist()) == {5, 6, 7} and 20 < replaced.sum() < 60


def test_broken_embeddings_are_those_of_a_copy(robustness, model_folder):
    language_model = load_language_model(model_folder)
    before = language_model.model.embedding.weight.clone()
    broken = robustness.broken_copy(language_model).model.embedding.weight
    rows = [broken[token].unique(dim=0).tolist()[0] for token in (6, 7)]
    assert rows == [math.inf, -math.inf] and broken[5].isnan().all()
    assert broken.isfinite().all(1).sum() == len(broken) - 3
    assert torch.equal(language_model.model.embedding.weight, before)


def test_no_number_of_a_state_escapes_the_count(robustness, model_folder):
    language_model = load_language_model(model_folder)
    runner = StreamRunner(language_model)
    assert robustness.count_bad(runner.state) == 0  # -inf marks empty places
    ids = np.arange(100, 400)
    runner.read(Segment(ids, ids > 0))
    tensors = flatten(runner.state)
    assert robustness.count_bad(runner.state) == 0
    floats = [
        name for name, tensor in tensors.items() if tensor.numel() and tensor.is_floating_point()
    ]
    assert any("store.score" in name for name in floats)
    assert any("memory.weights" in name for name in floats)
    for name in floats:
        for value in (math.nan, math.inf, -math.inf):
            spoiled = tensors[name].clone()
            spoiled.view(-1)[-1] = value
            state = unflatten(runner.state, tensors | {name: spoiled})
            assert robustness.count_bad(state) == 1, (name, value)


def test_the_norm_is_that_of_the_largest_head(robustness, model_folder):
    runner = StreamRunner(load_language_model(model_folder))
    assert robustness.memory_norm(runner.state) == 0.0
    name = "blocks.0.memory.weights.1"
    tensors = flatten(runner.state)
    weights = tensors[name].clone()
    weights[0, 0, 0, 0], weights[0, 1, 0, :2] = 4.0, torch.tensor([3.0, 4.0])
    state = unflatten(runner.state, tensors | {name: weights})
    assert robustness.memory_norm(state) == pytest.approx(5.0)
    weights[0, 1, 1, 1] = math.nan
    assert robustness.memory_norm(state) == math.inf


def test_a_document_that_is_too_short_is_refused(robustness, model_folder, text, tmp_path):
    config = robustness.RobustnessConfig(
        model=str(model_folder), document=str(text), tokens=10**6, threads=1
    )
    with pytest.raises(ValueError, match="tokens"):
        robustness.run(config, tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()
