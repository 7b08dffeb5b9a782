"""Ratios are those of single rounds, laws say what is beyond, and tables and picture tell all."""

import pytest

from wakesleep.streams.bench_cases import Entry, Group
from wakesleep.streams.bench_config import BenchConfig
from wakesleep.streams.bench_plots import bench_figure, compared
from wakesleep.streams.bench_report import as_text, cells_of
from wakesleep.streams.bench_rows import add_ratios, completed, make_row


def values(rates, **more):
    return {"equal": True, "check": "all", "rates": rates, "finite": True, "peak_bytes": 10} | more


def grouped(operation, found, references):
    """Rows of a group whose entries have these values."""
    group = Group(operation, "g", tuple(found), tuple(references))
    rows = {entry: make_row(group, entry, one) for entry, one in found.items()}
    add_ratios(rows, found, group)
    return list(rows.values())


def test_ratios_are_those_of_rounds_to_the_fastest_reference():
    """The machine slowed down after the first round: that is no difference between the two."""
    ours, slow, fast, gone = (Entry(name, "x") for name in ("ours", "slow", "fast", "gone"))
    found = {
        ours: values([50.0, 25.0, 45.0]),
        slow: values([10.0, 10.0, 10.0]),
        fast: values([100.0, 50.0, 60.0]),
        gone: {"skipped": "not installed"},
    }
    rows = grouped("decode", found, [slow, fast])
    assert rows[0]["ratio_to"] == {"implementation": "fast", "case": "x", "ratio": 0.5}
    assert rows[2]["ratio_to"] is None is rows[3]["ratio_to"]
    assert (rows[0]["low"], rows[0]["tokens_per_second"], rows[0]["high"]) == (25, 45, 50)
    assert all(row["ratio_to"] is None for row in grouped("decode", {ours: found[ours]}, []))


def test_beyond_what_was_measured_ours_stays_and_full_attention_follows_a_line():
    config = BenchConfig(positions=(1_000, 10_000, 100_000))
    rows = []
    for name in ("ours", "full attention"):
        entries = [Entry(name, "x", 1_000), Entry(name, "y", 10_000)]
        numbers = [values([100.0], peak_bytes=1_000), values([50.0], peak_bytes=10_000)]
        rows += grouped("growth", dict(zip(entries, numbers, strict=True)), entries[:1])
    ours, attention = (row for row in completed(rows, config) if row.get("extrapolated"))
    assert (ours["tokens_per_second"], ours["peak_bytes"]) == (50, 10_000)
    assert 1 / attention["tokens_per_second"] == pytest.approx(0.02 + 0.01 * 90_000 / 9_000)
    assert attention["peak_bytes"] == 100_000 and attention["position"] == 100_000
    assert completed(rows, config)[2] == ours and completed(rows, config)[-1] == attention
    assert ours["ratio_to"]["ratio"] == 0.5 and ours["case"] == "after 100k"
    one = [row for row in rows if row["position"] == 1_000]
    beyond = [r["implementation"] for r in completed(one, config) if r.get("extrapolated")]
    assert beyond == ["ours", "ours"]  # one point makes no line


def test_bytes_per_token_are_what_a_call_of_twice_the_length_needs_more():
    rows = []
    for size, peak in ((100, 5_000), (200, 7_000)):
        entry = Entry("ours", f"{size} tokens", size)
        rows += grouped("one-shot", {entry: values([1.0], peak_bytes=peak)}, [])
    short, long = completed(rows, BenchConfig())
    assert long["bytes_per_token"] == 20 and "bytes_per_token" not in short
    assert cells_of(long)[-1] == "7.00 kB, 20 B/token"


def test_tables_and_picture_show_every_kind_of_row():
    ours, theirs = Entry("ours", "x", 10), Entry("window only", "x", 10)
    found = {
        ours: values([2_000.0, 3_000.0]),
        theirs: values([1_000.0, 1_500.0]),
        Entry("a", "x"): {"skipped": "needs a GPU"},
        Entry("b", "x"): {"failed": "killed"},
        Entry("c", "x"): {"equal": False, "check": "1e-3 off"},
        Entry("d", "x"): values([1.0, 1.0], finite=False),
    }
    rows = grouped("decode", found, [theirs])
    rows += grouped("growth", {ours: found[ours]}, [])
    text = as_text(rows)
    for words in ("skipped: needs a GPU", "failed: killed", "NOT EQUAL, not timed: 1e-3 off"):
        assert words in text
    assert "not finite" in text and "2.00 x window only" in text and "2,000 to 3,000" in text
    assert compared(rows) == [("decode x\nover window only", 2.0)]
    above, below = bench_figure(rows).subfigs
    assert len(above.axes) == 1 and len(below.axes) == 3
    for some in ([], [row | {"peak_bytes": 0} for row in rows]):
        bench_figure(some).canvas.draw()
