"""Facts whose value stands before what it is asked by: one answer each, and whole in the page."""

from __future__ import annotations

import random
import re

from wakesleep.streams.reversed_facts import write_reversed
from wakesleep.streams.sequences import ANSWER_KINDS, REVERSED, Page, RecallConfig
from wakesleep.streams.training_config import TrainConfig
from wakesleep.streams.training_data import open_tokenizer
from wakesleep.streams.words import load_words

STATEMENT = re.compile(
    r"(?:The|Then) (\w+) ((?:is|took|picked|got|grabbed|dropped|left|put|disc)[^.]*)\."
)
QUESTION = re.compile(r"(?:What|Who) ([^?]*)\?")


def pages(words, length=512):
    tokenizer = open_tokenizer(TrainConfig())
    for seed in range(20):
        page = Page(tokenizer, random.Random(seed), length, RecallConfig())
        write_reversed(page, words)
        made = page.finish([tokenizer.encode(".")[0]] * length)
        yield tokenizer, made


def test_every_answer_is_the_one_that_was_said_before_it_in_its_episode():
    for split in ("train", "validation"):
        shared, count = 0, 0
        for tokenizer, made in pages(load_words(split)):
            for start, stop, age, kind in made.answers:
                assert ANSWER_KINDS[kind] == REVERSED and age > 0
                text = tokenizer.decode(made.tokens[:start])
                asked = QUESTION.findall(text)[-1]
                said = [(value, what) for value, what in STATEMENT.findall(text) if what == asked]
                assert said[-1][0] == tokenizer.decode(made.tokens[start : stop - 1]).strip()
                last = asked.split()[-1]
                shared += (
                    len({what for _, what in STATEMENT.findall(text) if what.endswith(f" {last}")})
                    > 1
                )
                count += 1
        assert (
            count > 100 and shared > count / 5
        )  # a thing alone often does not tell which is meant
