"""The table says what the session says, asks once, and chooses a threshold by validation alone."""

import json
import random
import sys

import numpy as np
import pytest

from wakesleep.streams.language_model import load_language_model
from wakesleep.streams.session import Session


@pytest.fixture
def table(script):
    return script("recall_table")


@pytest.fixture
def call(table, monkeypatch):
    """Run the script with these words."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["recall_table.py", *map(str, words)])
        table.main()

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_session_is_asked_in_every_condition_and_stays_as_it_is(session_folder, tmp_path, call):
    before = contents(session_folder)
    call(session_folder, "threads=1", "--output", tmp_path / "out")
    assert contents(session_folder) == before
    data = json.loads((tmp_path / "out" / "recall.json").read_text())
    names = ["as read", "store off", "memory off", "both off", "reset", "bm25"]
    assert list(data["conditions"]) == names
    asked = [row["condition"] for row in data["rows"] if row["group"] == "nothing"]
    assert asked == names and all(r["n"] == 10 for r in data["rows"] if r["group"] == "nothing")
    assert data["sessions"][0]["tokens"] == json.loads(before["session.json"])["tokens"]
    saved = json.loads((tmp_path / "out" / "answers" / "tiny.as-read.json").read_text())
    summary = json.loads(before["summary.json"])["facts"]
    planted = [answer for answer in saved["answers"] if answer.pop("planted")]
    assert planted == [pytest.approx(row) for row in summary]
    text = (tmp_path / "out" / "recall.md").read_text()
    assert all(f"| tiny | {name} |" in text for name in names)


def test_what_was_asked_is_not_asked_again(session_folder, tmp_path, call, table, monkeypatch):
    words = (session_folder, "--output", tmp_path)
    asked = []

    def dying(session, condition, questions, name):
        asked.append(condition)
        if len(asked) == 3:
            raise KeyboardInterrupt
        common = {"correct": False, "known": True, "age_tokens": 1000}
        return [common | {"kind": q.kind, "planted": bool(q.statements)} for q in questions]

    monkeypatch.setattr(table, "ask_all", dying)
    with pytest.raises(KeyboardInterrupt):
        call(*words)
    call(*words)
    first = (tmp_path / "recall.json").read_bytes()
    call(*words)
    names = ["as read", "store off", "memory off"]
    assert asked == [*names, "memory off", "both off", "reset", "bm25"]
    assert (tmp_path / "recall.json").read_bytes() == first


def test_answers_of_another_capacity_do_not_count(session_folder, tmp_path, table, monkeypatch):
    asked = []
    monkeypatch.setattr(table, "ask_all", lambda session, *_: asked.append(session) or [])
    for options in ({}, {}, {"store.capacity": 16}, {"window": 32}):
        session = Session.load(session_folder, options)
        table.answers_of(session, "tiny", [], ["as read"], tmp_path)
    assert len(asked) == 3


def test_answers_of_another_state_do_not_count(table, tmp_path):
    path = tmp_path / "answers.json"
    made_of = {"state_sha256": "a", "model_sha256": "b", "known_threshold": 0.5}
    assert table.remembered(path, made_of) is None
    table.write_json(path, {"made_of": made_of, "answers": [1]})
    assert table.remembered(path, made_of) == [1]
    for key, value in {"state_sha256": "c", "known_threshold": 0.6}.items():
        assert table.remembered(path, made_of | {key: value}) is None


def test_questions_about_nothing_are_about_what_no_statement_names(table, session_folder):
    questions, split = table.questions_of(Session.load(session_folder).manifest)
    told = [fact for fact in questions if fact.statements]
    nothing = [fact for fact in questions if not fact.statements]
    assert split == "test" and len(told) == len(nothing) == 10
    assert sorted(f.kind for f in told) == sorted(f.kind for f in nothing)
    assert all(fact.answer == "" for fact in nothing)
    assert not {fact.question for fact in told} & {fact.question for fact in nothing}


def test_what_cannot_be_asked_is_refused_in_words(
    call, session_folder, model_folder, text, tmp_path, capsys
):
    with Session.open(tmp_path / "plain", model_folder, threads=1, limit_tokens=50) as session:
        session.read(text)
    output = ["--output", tmp_path / "out"]
    refusals = {
        "no planted facts": [tmp_path / "plain", *output],
        "names that differ": [session_folder, session_folder, *output],
        "holds no session": [tmp_path / "none", *output],
        "of the test split": [session_folder, *output, "--threshold", tmp_path / "known.json"],
    }
    for what, words in refusals.items():
        with pytest.raises(SystemExit) as stopped:
            call(*words)
        assert stopped.value.code == 2 and what in capsys.readouterr().err
    assert not (tmp_path / "known.json").exists() and not (tmp_path / "out").exists()


def test_no_other_threshold_has_a_better_balanced_accuracy(table):
    draw = random.Random(2)
    answers = []
    for _ in range(200):
        planted, right = draw.random() < 0.5, draw.random() < 0.7
        said = planted or draw.random() < 0.6
        sure = draw.betavariate(4, 2) if planted and right else draw.betavariate(2, 4)
        answers.append(
            {
                **{"planted": planted, "correct": right if planted else not said},
                **{"predicted": "4711" if said else "", "confidence": round(sure, 2)},
            }
        )

    def balanced(threshold):
        known = np.array([bool(a["predicted"]) and a["confidence"] >= threshold for a in answers])
        right = np.array([a["planted"] and a["correct"] for a in answers])
        return (known[right].mean() + (~known[~right]).mean()) / 2

    threshold, accuracy = table.choose_threshold(answers)
    assert balanced(threshold) == pytest.approx(accuracy)
    assert accuracy >= max(balanced(t) for t in np.linspace(0, 1, 401)) - 1e-12
    assert 0.2 < threshold < 0.8


def test_the_threshold_is_one_that_the_model_is_loaded_with(
    script, call, table, make_model, text, tmp_path, monkeypatch
):
    folder, model = tmp_path / "valid", make_model()
    keys = {"model": str(model), "facts.count": "8", "threads": "1"}
    script("validation_session").stream(folder, text, keys)

    def scripted(language_model, state, facts, tokens):
        planted = bool(facts[0].statements)
        row = {"kind": facts[0].kind, "predicted": "x", "correct": planted, "known": True}
        return [row | {"age_tokens": 2000, "confidence": 0.8 if planted else 0.3}]

    monkeypatch.setattr(table, "ask_facts", scripted)
    words = (folder, "--output", tmp_path / "out", "--threshold", model / "known.json")
    call(*words)
    assert load_language_model(model).known_threshold == pytest.approx(0.55)
