"""Facts whose value stands before what it is asked by.

    The barn is amber of the den.           What is amber of the den?
    Then Ann picked up the otter.           Who picked up the otter?

In the statements of `families` the value follows its entity, so that what is learned from them is
to read on behind a match. The stories of bAbI ask the other way round, and by themselves teach it
very slowly: most of their questions can be answered by leaving out what cannot be meant.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

from wakesleep.streams.sequences import REVERSED, Page
from wakesleep.streams.words import Words

EPISODE = (2, 8)  # facts of an episode
ASKED = 3  # of them at most
GOT = ("took", "picked up", "got", "grabbed", "dropped", "left", "put down", "discarded")


def write_reversed(page: Page, words: Words) -> None:
    """Fill a page with episodes: some facts, then questions about a few of them."""
    draw = page.draw
    while True:
        before = len(page.pieces)
        facts = _draw_facts(draw, words)
        sources = [page.say(page.used, said, value) for said, value, _ in facts]
        for number in draw.sample(range(len(facts)), min(len(facts), draw.randint(1, ASKED))):
            _, value, question = facts[number]
            page.ask(page.used, question, value, sources[number], REVERSED)
        if page.used > page.length:
            page.drop_to(before)
            return


def _draw_facts(draw: random.Random, words: Words) -> list[tuple[str, str, str]]:
    """Statement, value and question of every fact of an episode."""
    count = draw.randint(*EPISODE)
    if draw.random() < 0.5:
        ways, things = _draw_keys(draw, words.adjectives, words.nouns, count)
        values = draw.sample([noun for noun in words.nouns if noun not in things], count)
        said = [f"is {way} of the {thing}" for way, thing in zip(ways, things, strict=True)]
        return [
            (f"The {value} {what}.", value, f"What {what}?")
            for value, what in zip(values, said, strict=True)
        ]
    verbs, things = _draw_keys(draw, GOT, words.animals, count)
    said = [f"{verb} the {thing}" for verb, thing in zip(verbs, things, strict=True)]
    people = draw.sample(words.first_names, count)
    # A name that begins a line has other tokens: hence "Then".
    return [
        (f"Then {value} {what}.", value, f"Who {what}?")
        for value, what in zip(people, said, strict=True)
    ]


def _draw_keys(
    draw: random.Random, ways: Sequence[str], things: Sequence[str], count: int
) -> tuple[list[str], list[str]]:
    """So many pairs of two words; in half of the episodes it takes both to tell them apart."""
    if draw.random() < 0.5:
        return draw.sample(ways, count), draw.sample(things, count)
    few = math.isqrt(count) + 1
    grid = list(itertools.product(draw.sample(ways, few), draw.sample(things, few)))
    chosen = draw.sample(grid, count)
    return [way for way, _ in chosen], [thing for _, thing in chosen]
