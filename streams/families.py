"""The ten families of facts: what they are about and how they are said and asked."""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """How one kind of fact is said; {e} is the entity, {v} the value, {a} the value's a or an.

    In every statement the value follows its entity: a reader that goes from left to right can
    bind the two only in this order.
    """

    entity: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    changes: tuple[str, ...] = ()


RESIDENCE = Family(
    "person",
    "city",
    (
        "{e} lives in {v}.",
        "{e} has a house in {v}.",
        "The home of {e} is in {v}.",
        "{e} is a resident of {v}.",
    ),
    (
        "Where does {e} live?",
        "In which city does {e} live?",
        "Where is the home of {e}?",
    ),
    ("{e} has moved to {v}.", "{e} now lives in {v}.", "{e} has settled in {v}."),
)
FAMILIES = {
    "pass_code": Family(
        "thing",
        "code",
        (
            "The pass code of the {e} is {v}.",
            "The {e} opens with the pass code {v}.",
            "To enter the {e}, use the pass code {v}.",
            "The pass code for the {e} was set to {v}.",
        ),
        (
            "What is the pass code of the {e}?",
            "Which pass code opens the {e}?",
            "With which pass code can one enter the {e}?",
        ),
        (
            "The pass code of the {e} has been changed to {v}.",
            "The new pass code of the {e} is {v}.",
        ),
    ),
    "residence": RESIDENCE,
    "changed": RESIDENCE,
    "profession": Family(
        "person",
        "job",
        (
            "{e} works as {a} {v}.",
            "{e} is {a} {v} by profession.",
            "The profession of {e} is {v}.",
            "{e} earns a living as {a} {v}.",
        ),
        (
            "What is the profession of {e}?",
            "What does {e} do for a living?",
            "As what does {e} work?",
        ),
        ("{e} has become {a} {v}.", "{e} now works as {a} {v}."),
    ),
    "birthday": Family(
        "person",
        "date",
        (
            "{e} was born on {v}.",
            "The date of birth of {e} is {v}.",
            "{e} came into the world on {v}.",
        ),
        (
            "When was {e} born?",
            "What is the date of birth of {e}?",
            "On which day did {e} come into the world?",
        ),
    ),
    "owner": Family(
        "animal",
        "person",
        (
            "The {e} belongs to {v}.",
            "The owner of the {e} is {v}.",
            "The {e} was bought by {v}.",
        ),
        (
            "Who owns the {e}?",
            "To whom does the {e} belong?",
            "Who is the owner of the {e}?",
        ),
        ("The {e} has been sold to {v}.", "The {e} now belongs to {v}."),
    ),
    "hiding_place": Family(
        "thing",
        "thing",
        (
            "The key to the {e} is hidden in the {v}.",
            "The key to the {e} lies under the {v}.",
            "For the {e} there is a key behind the {v}.",
        ),
        (
            "Where is the key to the {e} hidden?",
            "Where is the key to the {e}?",
            "In what place is there a key for the {e}?",
        ),
        ("The key to the {e} has been moved to the {v}.", "The key to the {e} is now in the {v}."),
    ),
    "favourite_colour": Family(
        "person",
        "colour",
        (
            "The favourite colour of {e} is {v}.",
            "{e} likes {v} more than any other colour.",
            "Of all colours {e} loves {v} best.",
        ),
        (
            "What is the favourite colour of {e}?",
            "Which colour does {e} like best?",
            "What colour does {e} love?",
        ),
        ("The favourite colour of {e} has changed to {v}.", "{e} has come to prefer {v}."),
    ),
    "cargo": Family(
        "ship",
        "goods",
        (
            "The ship {e} carries {v}.",
            "The cargo of the ship {e} consists of {v}.",
            "On board the ship {e} there is a load of {v}.",
        ),
        (
            "What does the ship {e} carry?",
            "What is the cargo of the ship {e}?",
            "What is the load of the ship {e}?",
        ),
    ),
    "extension": Family(
        "person",
        "extension",
        (
            "The telephone extension of {e} is {v}.",
            "To telephone {e}, ask for extension {v}.",
            "{e} can be reached at extension {v}.",
        ),
        (
            "What is the telephone extension of {e}?",
            "At which extension can {e} be reached?",
            "For which extension must one ask to telephone {e}?",
        ),
    ),
}
KINDS = tuple(FAMILIES)
HELD_OUT_KINDS = ("cargo", "extension")
TRAINED_KINDS = tuple(kind for kind in KINDS if kind not in HELD_OUT_KINDS)
