"""Every part can be left out, all models read the same segments, and ratios are those of pairs."""

import sys

import pytest
import torch

from wakesleep.streams.language_model import load_language_model


@pytest.fixture(scope="module")
def compare(script):
    return script("compare_parts")


def test_models_without_parts_have_the_others_and_the_same_sizes(compare, model_folder):
    given = load_language_model(model_folder)
    layers = {}
    for name, keys in compare.WITHOUT.items():
        model = compare.without(given, keys).model
        layers[name] = model.config.memory_layers, model.config.store_layers
        assert model.config.dim == given.model.config.dim
        assert model.embedding.weight.dtype == torch.float32
        assert not any(p.requires_grad for p in model.parameters()) or model is given.model
    assert layers == {
        "full": ((0,), (1,)),
        "no store": ((0,), ()),
        "no memory": ((), (1,)),
        "window only": ((), ()),
    }
    cost = [
        compare.mflop_per_token(compare.without(given, k).model.config)
        for k in compare.WITHOUT.values()
    ]
    full, store, memory, window = cost
    assert full > max(store, memory) and window < min(store, memory)
    assert full + window == pytest.approx(store + memory)


def test_the_table_has_a_row_for_each(compare, model_folder, text, monkeypatch, capsys):
    monkeypatch.setattr(compare, "SEGMENT_LEN", 256)
    keys = [f"model={model_folder}", f"document={text}", "warmup=512", "repeats=3", "threads=1"]
    monkeypatch.setattr(sys, "argv", ["compare_parts.py", *keys])
    compare.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [f"| {name}" for name in compare.WITHOUT]
    assert rows[-1].endswith(" 1.00 |")


def test_ratios_are_those_of_segments_read_one_after_the_other(compare):
    """The machine slowed down after the first round: that is no difference between models."""
    rows = [compare.Row("full", 2.0, [50.0, 25.0, 45.0]), compare.Row("w", 1.0, [100, 50, 60])]
    assert compare.table(rows).splitlines()[2].endswith(" 45 | 25 to 50 | 0.50 |")


def test_only_what_comes_behind_the_warmup_counts(compare, model_folder, monkeypatch):
    monkeypatch.setattr(compare, "SEGMENT_LEN", 64)
    ids = torch.arange(10, 10 + 64 * 5).numpy()
    rows = compare.measure(load_language_model(model_folder), ids, warmup=128)
    assert [len(row.rates) for row in rows] == [3] * len(compare.WITHOUT)


def test_a_short_document_is_refused(compare, model_folder, text, monkeypatch, capsys):
    keys = [f"model={model_folder}", f"document={text}", "threads=1"]
    monkeypatch.setattr(sys, "argv", ["compare_parts.py", *keys])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code == 2 and "ask for fewer: repeats=N" in capsys.readouterr().err
