"""Every row is a run of its own, measured once; what does not fit is said."""

import json
import sys

import pytest

from wakesleep.streams.errors import Refused

KEYS = ["recipe=configs/tiny.yaml", "lengths=[64]", "tokens=64", "segment=16", "steps=2"]


@pytest.fixture(scope="module")
def compare(script):
    return script("compare_recompute")


def test_lengths_make_equal_steps_in_whole_segments(compare, tmp_path):
    config = compare.RecomputeConfig(
        recipe="configs/tiny.yaml", lengths=(32,), tokens=64, segment=8
    )
    recipe = compare.recipe_of(config, 32, "chunk", tmp_path / "ids.npy")
    assert (recipe.train.lanes, recipe.train.sequence_len) == (2, 32)
    assert (recipe.train.segment, recipe.train.recompute) == (8, "chunk")
    for lengths in ((33,), (128,), (36,)):
        with pytest.raises(ValueError, match="lengths must divide tokens=64"):
            compare.RecomputeConfig(lengths=lengths, tokens=64, segment=8)


def test_a_row_is_a_process_and_is_measured_once(compare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "HOW", ("segment",))
    words = ["compare_recompute.py", *KEYS, "threads=1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    compare.main()
    rows = json.loads((tmp_path / "recompute.json").read_text())["rows"]
    assert [row["length"] for row in rows] == [64]
    assert all(row["peak_bytes"] > 1e7 and row["tokens_per_second"] > 0 for row in rows)
    out = capsys.readouterr().out
    assert "| 64 | 1 | segment |" in out
    monkeypatch.setattr(compare, "measure", None)  # everything is there: nothing is measured
    compare.main()
    assert capsys.readouterr().out == out


def test_what_does_not_fit_is_told_from_what_fails(compare, tmp_path, monkeypatch):
    config = compare.RecomputeConfig(
        recipe="configs/tiny.yaml", lengths=(64,), tokens=64, segment=16
    )
    recipe = compare.recipe_of(config, 64, "none", tmp_path / "nothing.npy")
    with pytest.raises(Refused, match="nothing"):
        compare.measure(recipe, tmp_path / "a")
    fails = "import sys; sys.exit('can not allocate memory')"
    monkeypatch.setattr(compare, "TRAIN", fails)
    measured = compare.measure(recipe, tmp_path / "b")
    assert measured == {"peak_bytes": None, "tokens_per_second": None}
    assert "more than is free" in compare.table(
        [{**measured, "length": 64, "recompute": "none"}], 64
    )
