"""Rows count what they say they count, with intervals that are known from elsewhere."""

import pytest

from wakesleep.streams.facts import KINDS, make_facts


@pytest.fixture
def rows_module(script):
    return script("recall_rows")


def answer(kind="pass_code", age=5_000, *, correct=True, known=True, planted=True, **more):
    return {
        **{"kind": kind, "age_tokens": age, "correct": correct, "known": known},
        **{"planted": planted, **more},
    }


ANSWERS = [
    answer(age=1_000),
    answer(age=9_999, correct=False),
    answer(age=10_000, known=False),
    answer("residence", age=9_000_000),
    answer("changed", age=2_000, correct=False),
    answer("changed", age=2_000_000),
    answer("cargo", age=3_000),
    answer("extension", age=300, correct=False),
    answer("owner", 0, planted=False, correct=True, known=False),
    answer("cargo", 0, planted=False, correct=False, known=False),
    answer("birthday", 0, planted=False, correct=False, known=True),
]


def test_every_answer_is_counted_in_its_groups(rows_module):
    rows = rows_module.rows_of("s", "as read", ANSWERS, "test")
    counted = {(row["group"], row["decade"]): (row["correct"], row["n"]) for row in rows}
    assert counted == {
        ("trained", "1k to 10k"): (1, 2),
        ("trained", "10k to 100k"): (1, 1),
        ("trained", "1M to 10M"): (1, 1),
        ("trained", "all"): (3, 4),
        ("right_and_known", "all"): (2, 4),
        ("changed", "all"): (1, 2),
        ("held_out", "all"): (1, 2),
        ("pass_code", "all"): (2, 3),
        ("residence", "all"): (1, 1),
        ("cargo", "all"): (1, 1),
        ("extension", "all"): (0, 1),
        ("nothing", "all"): (2, 3),
        ("nothing_unsaid", "all"): (1, 3),
    }
    assert {(row["session"], row["condition"]) for row in rows} == {("s", "as read")}
    for row in rows:
        assert (row["low"], row["high"]) == rows_module.wilson(row["correct"], row["n"])


def test_intervals_are_those_of_wilson(rows_module):
    expected = {
        (0, 10): (0.0, 0.2775),
        (8, 10): (0.4902, 0.9433),
        (1, 1): (0.2065, 1.0),
        (62, 64): (0.8930, 0.9914),
    }
    for (right, n), interval in expected.items():
        assert rows_module.wilson(right, n) == pytest.approx(interval, abs=5e-5)


def test_chance_is_that_of_a_guess_among_the_values_of_the_split(rows_module):
    for kind in KINDS:
        values = {fact.answer for fact in make_facts(600, 3, (kind,))}
        guess = rows_module.chance(kind, "test")
        # A short list is drawn nearly in full, of a long one there is always something new.
        assert 0.9 < len(values) * guess <= 1 or (len(values) > 500 and guess < 1 / 500)
    rows = rows_module.rows_of("s", "reset", ANSWERS[2:4], "test")
    cities = rows_module.chance("residence", "test")
    assert next(r["chance"] for r in rows if r["decade"] == "all") == pytest.approx(cities / 2)


def test_the_table_shows_false_answers_and_leaves_out_what_was_not_asked(rows_module):
    rows = rows_module.rows_of("full", "as read", ANSWERS, "test")
    found = [answer(found=True), answer(found=False)]
    rows += rows_module.rows_of("full", "bm25", found, "test")
    meanings = {"as read": "the state of the session", "bm25": "a search"}
    lines = rows_module.markdown(rows, meanings).splitlines()
    head = [cell.strip() for cell in lines[2].strip("|").split("|")]
    ages = ["1k to 10k", "10k to 100k", "1M to 10M", "all ages"]
    assert head[:6] == ["session", "condition", *ages]
    cells = {
        line.split("|")[2].strip(): dict(
            zip(head, (cell.strip() for cell in line.strip("|").split("|")), strict=True)
        )
        for line in lines[4:6]
    }
    assert cells["as read"]["1k to 10k"] == "1/2 50 % (9\N{EN DASH}91)"
    assert cells["as read"]["false answers"] == "1/3 33 % (6\N{EN DASH}79)"
    assert cells["bm25"]["false answers"] == cells["bm25"]["changed"] == ""
    text = "\n".join(lines)
    assert "- *bm25*: a search." in text
    assert "In full, bm25 finds 1 of 2 statements." in text
    assert "| full | as read | 2/3 | 1/1 | 1/2 |" in text
