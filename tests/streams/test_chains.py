"""Facts in two steps: every answer is where the last statements lead, followed by hand."""

from __future__ import annotations

import random

import pytest

from wakesleep.streams.chains import write_chains
from wakesleep.streams.prompts import ANSWER, QUESTION, STOP
from wakesleep.streams.sequences import CHAIN, PAIR, Page, RecallConfig
from wakesleep.streams.training_config import TrainConfig
from wakesleep.streams.training_data import open_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(TrainConfig())


def statement(ids, value, words):
    """Name and value of a statement, and whether it says who has the name."""
    middle, end = words
    assert ids[-1] == end
    said = ids[value.start : value.stop]
    owned = value.start == 0
    name = ids[value.stop + 1 : -1] if owned else ids[: value.start - 1]
    assert (ids[value.stop] if owned else ids[value.start - 1]) == middle[owned]
    return tuple(name), tuple(said), owned


def test_every_answer_is_where_the_last_statements_lead(tokenizer):
    is_, of, end = (tokenizer.encode(text)[0] for text in (" is", " of", "."))
    kinds = {PAIR: 0, CHAIN: 0}
    moved = 0
    for seed in range(20):
        page = Page(tokenizer, random.Random(seed), 512, RecallConfig())
        write_chains(page)
        assert page.used <= 512 and page.pieces
        where, owner, said_in, asked_before = {}, {}, {}, True
        for number, piece in enumerate(page.pieces):
            if piece.kind is None:
                if asked_before:  # an episode begins
                    where, owner, asked_before = {}, {}, False
                name, value, owned = statement(piece.ids, piece.value, ((is_, of), end))
                (owner if owned else where)[name] = value
                moved += name in said_in and not owned
                said_in[name] = number
                continue
            asked_before = True
            prompt, answer = piece.ids[: piece.value.start], piece.ids[piece.value.start :]
            assert prompt[0] == QUESTION and prompt[-1] == ANSWER and answer[-1] == STOP
            name = tuple(prompt[1:-1])
            if piece.kind == CHAIN:
                assert name[0] == is_
                holder = owner[name[1:]]
                value, source = where[holder], said_in[holder]
            else:
                value, source = (where | owner)[name], said_in[name]
            assert tuple(answer[:-1]) == value and piece.source == source
            assert page.pieces[source].valid
            kinds[piece.kind] += 1
    assert min(kinds.values()) > 100 and moved > 50


def test_what_a_later_place_has_replaced_is_no_fact(tokenizer):
    page = Page(tokenizer, random.Random(3), 512, RecallConfig())
    write_chains(page)
    said = [piece for piece in page.pieces if piece.kind is None]
    assert {piece.valid for piece in said} == {True, False}
    asked = {piece.source for piece in page.pieces if piece.kind is not None}
    assert {page.pieces.index(piece) for piece in said if piece.valid} == asked
