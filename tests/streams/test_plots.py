"""The pictures of a session: their numbers, and that the numbers are what is drawn."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from wakesleep.streams.plots import (
    BINS,
    SMOOTHED_FROM,
    curve_of,
    draw_plots,
    reading_figure,
    recall_by_age,
    recall_figure,
    running_mean,
    store_counts,
    store_figure,
    stored_positions,
    wilson,
)
from wakesleep.streams.results import by_training


def metrics(n: int, **other) -> list[dict]:
    return [
        {"tokens": 1000 * (i + 1), "bits_per_byte": 2 - i / n, "surprise": 0.5} | other
        for i in range(n)
    ]


def facts(*ages_and_correct) -> list[dict]:
    return [
        {"kind": "owner", "age_tokens": age, "correct": correct}
        for age, correct in ages_and_correct
    ]


def labels(figure) -> list[str]:
    texts = [text for ax in figure.axes for text in (ax.get_xlabel(), ax.get_ylabel())]
    return [text for text in texts if text]


def test_a_curve_skips_what_was_not_measured():
    lines = metrics(3)
    lines[1]["bits_per_byte"] = None
    x, y = curve_of(lines, "bits_per_byte")
    assert x.tolist() == [1000, 3000] and y.tolist() == [2.0, 2 - 2 / 3]


def test_reading_draws_each_measured_line_and_every_resume():
    figure = reading_figure(metrics(5), resumed_at=[2000, 3000])
    loss, surprise = (ax.lines[0] for ax in figure.axes)
    assert loss.get_xdata().tolist() == [1000, 2000, 3000, 4000, 5000]
    assert np.allclose(loss.get_ydata(), [2, 1.8, 1.6, 1.4, 1.2])
    assert surprise.get_ydata().tolist() == [0.5] * 5
    marks = figure.axes[0].collections[0].get_segments()
    assert [segment[0][0] for segment in marks] == [2000, 3000]
    assert labels(figure) == ["bits per byte", "position in the stream (tokens)", "surprise"]


def test_a_model_without_surprise_has_one_curve():
    figure = reading_figure(metrics(5, surprise=None))
    assert labels(figure) == ["position in the stream (tokens)", "bits per byte"]
    assert reading_figure([]).axes


def test_many_points_get_a_running_mean():
    few, many = (reading_figure(metrics(n)) for n in (SMOOTHED_FROM - 1, SMOOTHED_FROM))
    assert (len(few.axes[0].lines), len(many.axes[0].lines)) == (1, 2)
    noise = np.random.default_rng(0).standard_normal(250)
    direct = [noise[max(0, i - 5) : i + 6].mean() for i in range(250)]
    assert np.allclose(running_mean(noise), direct)


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (63, 64, 0.9166, 0.9972),
    ],
)
def test_the_interval_is_wilsons(right, asked, low, high):
    assert wilson(right, asked) == pytest.approx((low, high), abs=1e-4)


def test_recall_is_drawn_by_decade_of_age_with_the_number_asked():
    asked = facts((2_000, True), (5_000, False), (9_000, True), (3_000_000, True))
    recalls = recall_by_age(asked)
    assert [(r.decade, r.right, r.asked) for r in recalls] == [(3, 2, 3), (6, 1, 1)]
    ax = recall_figure(recalls).axes[0]
    assert np.allclose(ax.lines[0].get_ydata(), [100 * 2 / 3, 100])
    assert np.allclose(ax.lines[0].get_xdata(), [10**3.5, 10**6.5])
    assert ax.get_xscale() == "log" and [t.get_text() for t in ax.texts] == ["2 of 3", "1 of 1"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1k to 10k", "1M to 10M"]
    assert ax.get_ylabel().endswith("(%)") and ax.get_xlabel().endswith("(tokens)")


def test_kinds_that_training_holds_out_are_a_curve_of_their_own():
    trained, held_out = facts((2_000, True), (3_000_000, True)), facts((5_000, False))
    held_out[0]["kind"] = "cargo"
    figure = recall_figure(*map(recall_by_age, by_training(trained + held_out)))
    ax = figure.axes[0]
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["kinds of facts in training", "held out of it"]
    assert [t.get_text() for t in ax.texts] == ["1 of 1", "1 of 1", "0 of 1"]
    alone = recall_figure(*map(recall_by_age, by_training(held_out))).axes[0]
    assert [t.get_text() for t in alone.texts] == ["0 of 1"] and alone.get_legend() is None


def test_every_place_of_the_store_is_counted_once_where_it_came_from():
    held = {1: np.array([0, 5, 999]), 3: np.array([500, 501, 502, 510])}
    edges, counts = store_counts(held, 1000)
    assert counts.shape == (2, BINS) and edges[[0, -1]].tolist() == [0, 1000]
    assert counts.sum(1).tolist() == [3, 4]
    assert counts[1, 50] == 3 and counts[1, 51] == 1 and counts[0, [0, 99]].tolist() == [2, 1]


def test_layers_are_stacked_and_planted_facts_marked():
    held = {1: np.array([0, 5, 999]), 3: np.array([1, 2])}
    ax = store_figure(held, 1000, planted=[250, 750]).axes[0]
    lower, upper = (patch.get_data() for patch in ax.patches)
    assert lower.values[0] == 2 and upper.values[0] == 4 and upper.baseline[0] == 2
    assert list(ax.lines[0].get_xdata()) == [250, 750]
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["layer 1", "layer 3", "planted fact"]
    assert "5 stored pairs" in ax.get_title(loc="left")
    assert ax.get_ylabel() == "places held per 10 tokens"


def test_positions_are_read_from_a_snapshot_without_empty_places(tmp_path):
    shape = (1, 2, 3)
    save_file(
        {
            "stream.blocks.10.store.position": np.array([-1, 4, 5, 6, -1, -1]).reshape(shape),
            "stream.blocks.2.store.position": np.full(shape, -1),
            "stream.blocks.2.store.score": np.zeros(shape),
            "stream.position": np.array([9]),
        },
        tmp_path / "state",
    )
    held = stored_positions(tmp_path / "state")
    assert list(held) == [2, 10]
    assert (held[2].tolist(), held[10].tolist()) == ([], [4, 5, 6])


def test_a_session_gets_its_pictures_and_nothing_else(tmp_path):
    save_file(
        {"stream.blocks.0.store.position": np.arange(8).reshape(1, 1, 8)}, tmp_path / "state-1"
    )
    write = {
        "metrics.jsonl": "\n".join(json.dumps(line) for line in metrics(3)),
        "summary.json": json.dumps(
            {"tokens": 3000, "resumed_at": [], "facts": facts((500, True), (2_000, False))}
        ),
        "session.json": json.dumps({"state": "state-1"}),
    }
    for name, text in write.items():
        (tmp_path / name).write_text(text)
    before = set(tmp_path.iterdir())
    pictures = draw_plots(tmp_path)
    assert [path.name for path in pictures] == ["reading.png", "recall.png", "store.png"]
    assert set(tmp_path.iterdir()) - before == set(pictures)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
