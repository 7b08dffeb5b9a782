"""Facts of no family, for training alone: many relations between many kinds of things.

A model that is told facts of eight families learns the sentences of eight families; what is said in
any other way it does not take for a fact. Here the relation is a word like any other. None of it is
about what the held-out families are about.
"""

from __future__ import annotations

from functools import cache
from itertools import product

from wakesleep.streams.families import Family

LOOSE = "loose"
NOUNS = {  # by the sort of value: "the tutor of Ann Reed is ..."
    "person": (
        "tutor neighbour teacher doctor lawyer rival partner patron cousin sister brother landlord "
        "heir guardian guide uncle aunt captain judge painter founder keeper"
    ),
    "thing": (
        "emblem gift prize weapon instrument treasure souvenir symbol portrait trophy tool "
        "inheritance crest model copy"
    ),
    "city": "birthplace destination school market origin parish office garrison refuge",
    "code": "price number weight height score rank room seat licence ticket depth account debt",
    "colour": "coat roof door flag uniform ribbon lantern seal",
    "job": "trade calling disguise",
}
VERBS = {  # "Ann Reed admires ...", "Whom does Ann Reed admire?"
    "person": (
        ("admires", "admire"),
        ("fears", "fear"),
        ("trusts", "trust"),
        ("follows", "follow"),
        ("envies", "envy"),
        ("visits", "visit"),
        ("remembers", "remember"),
        ("protects", "protect"),
    ),
    "thing": (
        ("repairs", "repair"),
        ("guards", "guard"),
        ("paints", "paint"),
        ("seeks", "seek"),
        ("avoids", "avoid"),
        ("damaged", "damage"),
    ),
    "city": (
        ("comes from", "come from"),
        ("travels to", "travel to"),
        ("left for", "leave for"),
        ("longs for", "long for"),
    ),
}
ASKED = {"person": "Whom", "thing": "What", "city": "Which city"}
ENTITIES = ("person", "thing", "animal")


@cache
def loose_families() -> tuple[Family, ...]:
    """One family for each relation and sort of entity."""
    nouns = [
        _of_noun(entity, value, noun)
        for (value, words), entity in product(NOUNS.items(), ENTITIES)
        for noun in words.split()
    ]
    verbs = [
        _of_verb(entity, value, *verb)
        for (value, pairs), entity in product(VERBS.items(), ENTITIES)
        for verb in pairs
    ]
    return (*nouns, *verbs)


def _of_noun(entity: str, value: str, noun: str) -> Family:
    e, first, v = _named(entity, value)
    who = "Who" if value == "person" else "What"
    return Family(
        entity,
        value,
        (
            f"The {noun} of {e} is {v}.",
            f"{first}'s {noun} is {v}.",
            f"{first} has {v} as {noun}.",
            f"As for {e}, the {noun} is {v}.",
        ),
        (
            f"{who} is the {noun} of {e}?",
            f"{who} is {e}'s {noun}?",
            f"Which {noun} does {e} have?",
        ),
        (f"The {noun} of {e} is now {v}.", f"The new {noun} of {e} is {v}."),
    )


def _of_verb(entity: str, value: str, verb: str, base: str) -> Family:
    e, first, v = _named(entity, value)
    who = "who" if entity == "person" else "which"
    return Family(
        entity,
        value,
        (
            f"{first} {verb} {v}.",
            f"It is said that {e} {verb} {v}.",
            f"There is {e}, {who} {verb} {v}.",
        ),
        (f"{ASKED[value]} does {e} {base}?", f"{ASKED[value]} is it that {e} {verb}?"),
        (f"{first} now {verb} {v}.",),
    )


def _named(entity: str, value: str) -> tuple[str, str, str]:
    """How an entity is named inside and at the start of a sentence, and how a value is."""
    v = {"thing": "the {v}", "job": "{a} {v}"}.get(value, "{v}")
    return ("{e}", "{e}", v) if entity == "person" else ("the {e}", "The {e}", v)
