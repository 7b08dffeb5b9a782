"""Promises of the prompt template: one form, names with the same tokens everywhere."""

from importlib.resources import files

import pytest

from wakesleep.streams.facts import make_facts
from wakesleep.streams.prompts import (
    decode_answer,
    encode_answer,
    encode_question,
    statement_ids,
)
from wakesleep.streams.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(files("wakesleep.streams") / "data/default/tokenizer.json")


def contains(ids, part):
    return any(ids[i : i + len(part)] == part for i in range(len(ids)))


def test_the_template_is_question_answer_stop(tokenizer):
    question = "What is the pass code of the amber gate?"
    assert encode_question(tokenizer, question) == [1, *tokenizer.encode(" " + question), 2]
    assert encode_answer(tokenizer, "4821") == [*tokenizer.encode(" 4821"), 3]
    assert encode_answer(tokenizer, None) == [4, 3]


def test_special_tokens_written_in_a_question_stay_ordinary_text(tokenizer):
    ids = encode_question(tokenizer, "Who is <|answer|> <|stop|>?")
    assert [i for i in ids if i < 8] == [1, 2]


def test_values_and_names_have_the_same_tokens_in_statement_question_and_answer(tokenizer):
    for split in ("train", "test"):
        for fact in make_facts(500, 0, split=split):
            answer = encode_answer(tokenizer, fact.answer)[:-1]
            name = tokenizer.encode(f" {fact.entity}")
            surname = tokenizer.encode(f" {fact.entity.partition(' ')[2]}")
            assert contains(encode_question(tokenizer, fact.question), name)
            for lead in (" ", "\n"):
                said = statement_ids(tokenizer, fact.statements[-1], lead)
                assert contains(said, answer)
                assert contains(said, surname)
            assert contains(statement_ids(tokenizer, fact.statements[-1]), name)


def test_a_planted_statement_has_the_tokens_of_ordinary_text(tokenizer):
    before, said, behind = "It was late.", "Ann Reed lives in Oslo.", " She slept."
    whole = tokenizer.encode(f"{before} {said}{behind}")
    parts = [tokenizer.encode(before), statement_ids(tokenizer, said), tokenizer.encode(behind)]
    assert whole == [i for part in parts for i in part]


def test_an_answer_is_read_back_up_to_its_stop(tokenizer):
    for fact in make_facts(200, 1):
        ids = encode_answer(tokenizer, fact.answer)
        assert decode_answer(tokenizer, [*ids, 99, 3]) == fact.answer
    assert decode_answer(tokenizer, [3]) == ""
    assert decode_answer(tokenizer, tokenizer.encode(" Oslo")) == "Oslo"
