"""Promises of the facts: exact forms, parts that share nothing, ages of every size."""

import json
import math
import random
import re
from collections import Counter
from importlib.resources import files
from itertools import pairwise

import pytest

from wakesleep.streams.facts import (
    YOUNGEST,
    FactMaker,
    make_facts,
    make_unplanted,
    parse_kinds,
    plan_plants,
)
from wakesleep.streams.families import FAMILIES, HELD_OUT_KINDS, KINDS, TRAINED_KINDS
from wakesleep.streams.prompts import statement_ids
from wakesleep.streams.tokenizer import Tokenizer
from wakesleep.streams.words import SPLITS, Words, load_words, split_of

TOTAL = 10_000_000
NAME = r"\S+ \S+"


def parts_of(fact):
    """The words, names, numbers and dates of a fact, lower case."""
    first, _, last = fact.entity.partition(" ")
    found = {first.lower(), last.lower()}
    for value in fact.values:
        whole = FAMILIES[fact.kind].value not in ("person", "thing")
        found |= {value.lower()} if whole else {part.lower() for part in value.split(" ", 1)}
    return found


def test_promised_forms_are_said_and_asked_in_exactly_these_words():
    forms = {
        "pass_code": (
            [r"The pass code of the [a-z]+ [a-z]+ is \d{4,6}\."],
            r"What is the pass code of the [a-z]+ [a-z]+\?",
        ),
        "residence": ([rf"{NAME} lives in [A-Z].+\."], rf"Where does {NAME} live\?"),
        "changed": (
            [rf"{NAME} lives in [A-Z].+\.", rf"{NAME} has moved to [A-Z].+\."],
            rf"Where does {NAME} live\?",
        ),
    }
    for kind, (statements, question) in forms.items():
        assert kind in TRAINED_KINDS
        exact = [
            fact
            for fact in make_facts(200, 0, [kind], "train")
            if re.fullmatch(question, fact.question)
            and all(map(re.fullmatch, statements, fact.statements))
        ]
        assert len(exact) > 20, kind


def test_families_are_ten_with_several_wordings_two_held_out():
    assert len(KINDS) == 10 and set(TRAINED_KINDS) | set(HELD_OUT_KINDS) == set(KINDS)
    assert len(HELD_OUT_KINDS) == 2 and not set(TRAINED_KINDS) & set(HELD_OUT_KINDS)
    for kind in KINDS:
        facts = make_facts(200, 1, [kind])
        shapes = [[fact.question, *fact.statements[:1]] for fact in facts]
        for place in range(2):
            said = {
                re.sub(r"\ban?\b", "a", text.replace(fact.entity, "{}"))
                for fact, text in zip(facts, (shape[place] for shape in shapes), strict=True)
            }
            bare = {
                re.sub("|".join(map(re.escape, f.values)), "{}", t) for f in facts for t in said
            }
            assert len(bare) >= 3, kind


def test_every_value_follows_its_entity_in_every_statement():
    for fact in make_facts(1_000, 2):
        for text, value in zip(fact.statements, fact.values, strict=True):
            assert text.count(fact.entity) == 1
            assert text.rindex(value) > text.index(fact.entity)


def test_the_last_statement_counts_and_all_values_of_a_fact_differ():
    for fact in make_facts(400, 3, ["changed", "residence"]):
        assert fact.answer == fact.values[-1]
        assert fact.answer in fact.statements[-1]
        assert len(set(fact.values)) == len(fact.statements) == 1 + (fact.kind == "changed")


def test_splits_share_no_word_name_number_or_date():
    parts = {
        split: {part for fact in make_facts(1_500, 4, split=split) for part in parts_of(fact)}
        for split in SPLITS
    }
    for split, found in parts.items():
        assert len(found) > 500
        assert {split_of(part) for part in found} == {split}
        others = set().union(*(parts[other] for other in SPLITS if other != split))
        assert not found & others


def test_splits_together_are_all_words_and_each_list_has_all_splits():
    lists = json.loads((files("wakesleep.streams") / "data/words.json").read_text("utf-8"))
    assert "Apache-2.0" in lists["licence"]
    for name in Words._fields:
        assert len(lists[name]) == len({word.lower() for word in lists[name]}), name
        splits = [getattr(load_words(split), name) for split in SPLITS]
        assert sorted(word for words in splits for word in words) == sorted(lists[name])
        assert min(map(len, splits)) >= 8, name


def test_no_two_facts_share_an_entity_and_equal_seeds_give_equal_facts():
    facts = make_facts(1_000, 5)
    assert len({fact.entity for fact in facts}) == 1_000
    assert facts == make_facts(1_000, 5) != make_facts(1_000, 6)
    assert set(Counter(fact.kind for fact in facts).values()) == {100}


def test_unplanted_questions_are_similar_but_about_nothing_that_was_said():
    facts = make_facts(500, 7)
    questions = make_unplanted(facts, 7)
    assert len(questions) == 500
    assert all(q.answer is None and q.statements == () for q in questions)
    said = {fact.entity for fact in facts}
    assert not said & {question.entity for question in questions}
    words = {word for entity in said for word in entity.split()}
    assert sum(bool(words & set(q.entity.split())) for q in questions) > 200


@pytest.mark.parametrize(("kind", "entity"), [("hiding_place", "thing"), ("owner", "person")])
def test_similar_values_have_a_word_in_common_with_what_facts_are_about(kind, entity):
    about = "residence" if entity == "person" else "pass_code"

    def shares(similar):
        maker = FactMaker("train", random.Random(4), similar=similar)
        words = {word for _ in range(50) for word in maker.planted(about).entity.split()}
        if kind == "hiding_place":  # whose entities are things, too
            words |= {word for _ in range(50) for word in maker.planted(kind).entity.split()}
        values = [maker.planted(kind).answer for _ in range(50)]
        return sum(bool(words & set(value.split())) for value in values)

    assert shares(0.0) <= 20 and shares(1.0) >= 35


def test_similar_values_have_a_word_in_common_with_one_another():
    def repeated(similar):
        maker = FactMaker("train", random.Random(4), similar=similar)
        words = [w for _ in range(40) for w in maker.planted("owner").answer.split()]
        return len(words) - len(set(words))

    assert repeated(0.0) <= 6 and repeated(1.0) >= 35


def test_a_change_may_be_said_like_a_first_statement():
    for share in (0.0, 1.0):
        maker = FactMaker("train", random.Random(5), restated=share)
        for fact in [maker.planted("residence", 2) for _ in range(20)]:
            wordings = FAMILIES["residence"].statements if share else FAMILIES["residence"].changes
            said = list(zip(fact.statements[1:], fact.values[1:], strict=True))
            for statement, value in said:
                assert statement in {w.format(e=fact.entity, v=value) for w in wordings}
            assert len(said) == 2 and fact.answer == fact.values[-1]


def test_every_decade_of_age_gets_the_same_number_of_answers():
    facts = make_facts(256, 0)
    answers = [plant for plant in plan_plants(facts, TOTAL, 0) if plant.is_last]
    decades = Counter(int(math.log10(TOTAL - plant.position)) for plant in answers)
    assert all(abs(decades[decade] - 64) <= 2 for decade in (3, 4, 5, 6))
    halves = Counter(int(2 * math.log10((TOTAL - p.position) / YOUNGEST)) for p in answers)
    assert all(abs(halves[half] - 32) <= 2 for half in range(8))


@pytest.mark.parametrize("total", [9_000, 50_000, 500_000, TOTAL])
def test_plants_are_in_order_apart_and_say_all_statements(total):
    facts = make_facts(128, 8)[: total // 150]
    plants = plan_plants(facts, total, 8)
    assert plants == plan_plants(facts, total, 8) != plan_plants(facts, total, 9)
    positions = [plant.position for plant in plants]
    assert positions[0] >= 0 and positions[-1] <= total - YOUNGEST
    assert all(b - a >= 48 for a, b in pairwise(positions))
    for index, fact in enumerate(facts):
        own = [plant for plant in plants if plant.fact == index]
        assert [plant.text for plant in own] == list(fact.statements)
        assert [plant.is_last for plant in own] == [*[False] * (len(own) - 1), True]


def test_a_statement_is_no_longer_than_the_room_that_is_left_for_it():
    tokenizer = Tokenizer.load(files("wakesleep.streams") / "data/default/tokenizer.json")
    facts = [fact for split in SPLITS for fact in make_facts(1_000, 9, split=split)]
    longest = max(len(statement_ids(tokenizer, text)) for f in facts for text in f.statements)
    assert 20 < longest <= 48


def test_a_document_too_short_for_its_facts_is_refused_with_the_length_it_needs():
    facts = make_facts(20, 0, ["residence"])
    assert plan_plants(facts, YOUNGEST + 20 * 48, 0)
    with pytest.raises(ValueError, match=r"at least 1,960 for 20 statements, not 1,959"):
        plan_plants(facts, YOUNGEST + 20 * 48 - 1, 0)


def test_kinds_are_read_from_text_and_a_wrong_one_names_its_neighbour():
    assert parse_kinds("all") == KINDS
    assert parse_kinds("changed, pass_code,changed") == ("changed", "pass_code")
    with pytest.raises(ValueError, match=r"'residense'; did you mean residence\?"):
        parse_kinds("residense,changed")
    with pytest.raises(ValueError, match="kinds are all, pass_code"):
        parse_kinds("zzz")


def test_more_facts_than_names_are_refused_instead_of_searched_for_ever():
    with pytest.raises(ValueError, match="the validation split has hardly a ship left"):
        make_facts(100_000, 0, ["cargo"], "validation")
