"""What a study concludes, from results that are made up."""

from __future__ import annotations

import json

import pytest

from wakesleep.streams.config import load_config
from wakesleep.streams.stream_config import StreamConfig
from wakesleep.streams.tune_config import TuneConfig
from wakesleep.streams.tune_plots import draw_study
from wakesleep.streams.tune_report import cost_of, make_report, markdown, worth_of, write_report

SEARCH = {"window": [256, 128], "store.capacity": [1000, 500, 2000]}


def result(window=256, capacity=1000, right=50, sleep=0.0, bits=1.5, **values) -> dict:
    """A result whose parts cost what their sizes say: 1,000 FLOPs per token each."""
    parts = {"window_flops": window * 1e3, "store_flops": capacity * 1e3, "sleep_flops": sleep}
    return {
        "values": {"window": window, "store.capacity": capacity, **values},
        "tokens": 1000,
        "recall": [right, 100],
        "deep": [right // 4, 33],
        "young": [right // 3, 33],
        "bits_per_byte": bits,
        "bits_by_seed": [bits - 0.01, bits + 0.01],
        "recall_by_seed": [right / 100, right / 100],
        "state_bytes": 1000 * capacity,
        "seconds": 2.0,
        "pause_p95": 0.1,
        "sleeps": 0,
        "wake_flops": 5e6 + (window + capacity) * 1e3,
        **parts,
    }


def test_best_cheaper_and_better_are_told_apart():
    rows = [
        result(right=60),
        result(128, right=70),  # cheaper and better at once
        result(128, 500, right=60),  # the least that does as well
        result(256, 2000, right=90),  # the best, for more
        result(256, 500, right=10),
        result(128, 2000, right=80),
    ]
    report = make_report(TuneConfig(search=SEARCH), rows)
    assert (report.first, report.best) == (rows[0], rows[3])
    assert (report.cheaper, report.better) == (rows[2], rows[1])
    assert report.results[0] is rows[3] and report.results[-1] is rows[4]
    assert report.front == [rows[2], rows[1], rows[5], rows[3]]
    costs = [cost_of(row) for row in report.front]
    assert costs == sorted(costs)


def test_by_bits_per_byte_less_is_better():
    rows = [result(bits=1.6), result(128, bits=1.5), result(256, 2000, bits=1.55)]
    config = TuneConfig(search=SEARCH, goal="bits_per_byte")
    report = make_report(config, rows)
    assert report.best is report.better is report.cheaper is rows[1]
    assert "1.500 bits per byte at 6.13 MFLOP" in markdown(config, report)


def test_the_worth_of_a_part_is_the_slope_that_was_put_in():
    rows = []
    for window in (128, 256):
        for capacity in (500, 1000, 2000):
            for sleep in (0.0, 1e6, 2e6):
                gain = 20 * window / 1e3 + 10 * capacity / 1e3 + 5 * sleep / 1e6
                right = 1e-2 * round(100 * (30 + gain))
                rows.append(result(window, capacity, right, sleep))
    worth = {w.part: w for w in worth_of(TuneConfig(search=SEARCH), rows)}
    for part, slope in (("window", 0.20), ("store", 0.10), ("sleep", 0.05)):
        assert worth[part].gain == pytest.approx(slope, abs=0.001)
        assert worth[part].low < worth[part].gain < worth[part].high < worth[part].low + 0.01
    assert [w.part for w in worth_of(TuneConfig(search=SEARCH), rows[::9])] == []
    report = make_report(TuneConfig(search=SEARCH), rows)
    assert "one more MFLOP per token in store: +0.1" in markdown(TuneConfig(search=SEARCH), report)


def test_passes_saturate_where_more_cannot_be_told_apart():
    search = {"window": [256], "store.capacity": [1000], "sleep.passes": [1, 2, 4, 8]}
    config, rows = TuneConfig(search=search), []
    for passes, rights in ((1, (40, 44)), (2, (60, 66)), (4, (70, 78)), (8, (72, 76))):
        rows += [result(right=right, **{"sleep.passes": passes}) for right in rights]
    assert make_report(config, rows).saturation == 4
    assert make_report(config, rows[:2]).saturation is None


def test_settings_that_differ_are_no_error_of_the_passes():
    """Stores differ by far more than passes; seeds agree, then they do not."""
    search = {"window": [256], "store.capacity": [1000, 500], "sleep.passes": [1, 2]}
    rows = [
        result(capacity=capacity, right=right, **{"sleep.passes": passes})
        for capacity, passes, right in ((1000, 1, 80), (500, 1, 20), (1000, 2, 84), (500, 2, 24))
    ]
    assert make_report(TuneConfig(search=search), rows).saturation == 2
    for row in rows[2:]:
        row["recall_by_seed"] = [row["recall_by_seed"][0] + 0.1, row["recall_by_seed"][0] - 0.1]
    assert make_report(TuneConfig(search=search), rows).saturation == 1


def test_files_are_what_other_commands_take(tmp_path):
    search = {"window": [256, 128], "sleep.trigger": [["every"], ["idle", "pressure"]]}
    rows = [
        result(right=40, **{"sleep.trigger": ["every"]}),
        result(128, right=60, **{"sleep.trigger": ["idle", "pressure"]}),
    ]
    for row in rows:
        del row["values"]["store.capacity"]
    config = TuneConfig(search=search, stream={"sleep": {"rule": "replay"}, "threads": 1})
    report = make_report(config, rows)
    files = write_report(tmp_path, config, report)
    assert {file.name for file in files} == {
        "table.md", "results.json", "best.yaml", "cheaper.yaml", "better.yaml"
    }  # fmt: skip
    taken, _ = load_config(StreamConfig, tmp_path / "best.yaml")
    assert taken.window == 128 and taken.sleep.trigger == ("idle", "pressure")
    assert taken.sleep.rule == "replay" and taken.threads == 1
    told = json.loads((tmp_path / "results.json").read_text())
    assert told["best"] == rows[1] and len(told["results"]) == 2


@pytest.mark.parametrize("goal", ["recall", "bits_per_byte"])
def test_pictures_are_drawn_and_a_ratio_has_one_of_its_own(tmp_path, goal):
    search = SEARCH | {"sleep.offline_ratio": [0, 0.25]}
    rows = [
        result(right=right, sleep=1e6 * ratio, **{"sleep.offline_ratio": ratio})
        for right, ratio in ((40, 0), (60, 0.25), (55, 0.25))
    ]
    config = TuneConfig(search=search, goal=goal)
    names = [path.name for path in draw_study(tmp_path, config, make_report(config, rows))]
    assert names == ["compute.png", "ratio.png"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)
    config = TuneConfig(search=SEARCH, goal=goal)
    alone = draw_study(tmp_path, config, make_report(config, [result()]))
    assert [path.name for path in alone] == ["compute.png"]
