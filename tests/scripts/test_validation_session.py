"""A validation session is told facts of the validation split and of the trained families alone."""

import pytest

from wakesleep.streams.errors import Refused
from wakesleep.streams.facts import TRAINED_KINDS
from wakesleep.streams.session import Session
from wakesleep.streams.words import load_words


def test_facts_of_the_validation_split_are_planted_and_kept(script, model_folder, text, tmp_path):
    stream = script("validation_session").stream
    keys = {"model": str(model_folder), "facts.count": "24", "threads": "1"}
    summary = stream(tmp_path / "s", text, keys)
    assert stream(tmp_path / "s", text, keys) == summary
    session = Session.load(tmp_path / "s")
    facts, words = session.manifest.facts, load_words("validation")
    assert {fact.kind for fact in facts} == set(TRAINED_KINDS)
    assert [row["answer"] for row in summary["facts"]] == [fact.answer for fact in facts]
    homes = [fact.answer for fact in facts if fact.kind in ("residence", "changed")]
    assert len(homes) == 6 and set(homes) <= set(words.cities)
    said = session.language_model.tokenizer.decode(
        [int(i) for i in memoryview((tmp_path / "s" / "ids.bin").read_bytes()).cast("H")]
    )
    assert all(statement in said for fact in facts for statement in fact.statements)
    with pytest.raises(Refused, match=r"facts\.count"):
        stream(tmp_path / "s", text, keys | {"facts.count": "25"})
