"""Ten families of facts to plant into a document and to ask for afterwards.

Words, names, numbers and dates of the three splits are disjoint (`words.py`), and two of the
families are in no training data at all, so that recall can be told from having seen before.
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from wakesleep.streams.families import FAMILIES, HELD_OUT_KINDS, KINDS, TRAINED_KINDS, Family
from wakesleep.streams.loose_families import LOOSE, loose_families
from wakesleep.streams.words import load_words, split_of

__all__ = [
    "FAMILIES",
    "HELD_OUT_KINDS",
    "KINDS",
    "TRAINED_KINDS",
    "Fact",
    "FactMaker",
    "Plant",
    "make_facts",
    "make_unplanted",
    "parse_kinds",
    "plan_plants",
]

YOUNGEST = 1_000  # tokens between the youngest answer and the end of the document
TRIES = 10_000  # draws before the names of a split count as used up
CANONICAL = 0.5  # share of statements and questions in their family's first wording
MONTHS = (
    "January February March April May June July August September October November December"
).split()


class Fact(NamedTuple):
    """A question, the statements that answer it (the last one counts), and the answer.

    `answer` is None, and there are no statements, where nothing was planted.
    """

    kind: str
    statements: tuple[str, ...]
    question: str
    answer: str | None
    entity: str
    values: tuple[str, ...]  # one for each statement


class Plant(NamedTuple):
    """One statement and where it goes.

    `position` is the number of tokens of the document, planted ones included, before it.
    """

    position: int
    text: str
    fact: int  # index into the facts
    is_last: bool  # the statement that answers


class FactMaker:
    """Draws facts of one split; none says anything about what an earlier one was about.

    Args:
        similar: share of entities that have a word in common with an earlier one; of persons and
            things that are values, with an entity or an earlier value.
        shared: share of entities about which a fact of another family was drawn; 0: none.
        restated: share of changes that are said like a first statement; 0: none.
    """

    def __init__(
        self,
        split: str,
        draw: random.Random,
        *,
        similar: float = 0.0,
        shared: float = 0.0,
        restated: float = 0.0,
    ) -> None:
        self.words = load_words(split)
        self.split, self.draw, self.similar, self.shared = split, draw, similar, shared
        self.restated = restated
        self._entities: dict[str, list[tuple[str, str]]] = {}  # by what they are
        self._known: set[tuple[Family | None, tuple[str, str]]] = set()
        self._values: set[tuple[str, str]] = set()
        self._said: dict[str, list[tuple[str, str]]] = {}  # persons and things that are values

    def planted(self, kind: str, changes: int = 0) -> Fact:
        """Draw a fact of `kind`, stated once and then changed `changes` times."""
        return self._plant(FAMILIES[kind], "changed" if changes else kind, changes)

    def planted_loose(self, changes: int = 0) -> Fact:
        """Draw a fact of no family (`loose_families.py`)."""
        return self._plant(self.draw.choice(loose_families()), LOOSE, changes)

    def _plant(self, family: Family, kind: str, changes: int) -> Fact:
        entity = self._entity(family)
        values: list[str] = []
        while len(values) <= changes:
            value = self._value(family.value)
            if value not in values:
                values.append(value)
        wordings = [self._wording(family.statements)]
        for _ in range(changes):  # nothing is drawn for a share of 0: old facts stay what they are
            again = self.restated and self.draw.random() < self.restated
            wordings.append(self._wording(family.statements if again else family.changes))
        statements = tuple(
            _fill(wording, entity, value) for wording, value in zip(wordings, values, strict=True)
        )
        question = _fill(self._wording(family.questions), entity)
        return Fact(kind, statements, question, values[-1], entity, tuple(values))

    def unplanted(self, kind: str) -> Fact:
        """Draw a question of `kind` to which no earlier fact has the answer."""
        return self._ask(FAMILIES[kind], kind)

    def unplanted_loose(self) -> Fact:
        """Draw a question of no family to which no earlier fact has the answer."""
        return self._ask(self.draw.choice(loose_families()), LOOSE)

    def _ask(self, family: Family, kind: str) -> Fact:
        entity = self._entity(family)
        question = _fill(self._wording(family.questions), entity)
        return Fact(kind, (), question, None, entity, ())

    def note(self, fact: Fact) -> None:
        """Take a fact from elsewhere for an earlier one of these."""
        family = FAMILIES[fact.kind]
        first, _, last = fact.entity.partition(" ")
        self._remember(family, (first, last))

    def _wording(self, wordings: tuple[str, ...]) -> str:
        return wordings[0] if self.draw.random() < CANONICAL else self.draw.choice(wordings)

    def _entity(self, family: Family) -> str:
        """Draw an entity that is new to `family`, and new at all unless it is a shared one."""
        earlier = self._entities.get(family.entity, [])
        for _ in range(TRIES):
            if earlier and self.draw.random() < self.shared:
                entity, asked = self.draw.choice(earlier), family
            else:
                entity, asked = self._new_entity(family.entity, earlier), None
            if (asked, entity) not in self._known:
                self._remember(family, entity)
                return " ".join(entity)
        raise ValueError(
            f"the {self.split} split has hardly a {family.entity} left after {len(earlier):,}; "
            "ask for fewer facts"
        )

    def _remember(self, family: Family, entity: tuple[str, str]) -> None:
        self._known |= {(family, entity), (None, entity)}
        self._entities.setdefault(family.entity, []).append(entity)

    def _new_entity(self, what: str, earlier: Sequence[tuple[str, str]]) -> tuple[str, str]:
        first, last = self._pair(what)
        if earlier and self.draw.random() < self.similar:
            other = self.draw.choice(earlier)
            return (other[0], last) if self.draw.random() < 0.5 else (first, other[1])
        return first, last

    def _pair(self, what: str) -> tuple[str, str]:
        draw, words = self.draw, self.words
        match what:
            case "person":
                return draw.choice(words.first_names), draw.choice(words.last_names)
            case "thing":
                return draw.choice(words.adjectives), draw.choice(words.nouns)
            case "animal":
                return draw.choice(words.adjectives), draw.choice(words.animals)
            case "ship":
                first, last = draw.choice(words.adjectives), draw.choice(words.animals)
                return first.capitalize(), last.capitalize()
        raise AssertionError(what)

    def _value(self, what: str) -> str:
        """Draw a value; one that was drawn before only where the list is nearly used up."""
        for _ in range(20):
            value = self._any_value(what)
            if (what, value) not in self._values:
                break
        self._values.add((what, value))
        return value

    def _any_value(self, what: str) -> str:
        draw, words = self.draw, self.words
        match what:
            case "person" | "thing":
                said = self._said.setdefault(what, [])
                earlier = self._entities.get(what, []) + said if self.similar else []
                said.append(self._new_entity(what, earlier))
                return " ".join(said[-1])
            case "city":
                return draw.choice(words.cities)
            case "job":
                return draw.choice(words.jobs)
            case "colour":
                return draw.choice(words.colours)
            case "goods":
                return draw.choice(words.goods)
        while True:
            value = self._number(what)
            if split_of(value) == self.split:
                return value

    def _number(self, what: str) -> str:
        draw = self.draw
        match what:
            case "code":
                return "".join(draw.choices("0123456789", k=draw.randint(4, 6)))
            case "extension":
                return "".join(draw.choices("0123456789", k=draw.randint(3, 4)))
            case "date":
                return f"{draw.randint(1, 28)} {draw.choice(MONTHS)} {draw.randint(1700, 1999)}"
        raise AssertionError(what)


def make_facts(
    count: int, seed: int, kinds: Sequence[str] = KINDS, split: str = "test"
) -> list[Fact]:
    """Make `count` facts, equally many of each kind, in random order; no two share an entity.

    The same arguments always give the same facts.

    Raises:
        ValueError: a negative count or more facts than names, no kinds, an unknown kind or split.
    """
    maker, order = _maker_and_kinds(count, seed, kinds, split)
    return [maker.planted(kind, changes=int(kind == "changed")) for kind in order]


def make_unplanted(
    facts: Sequence[Fact], seed: int, kinds: Sequence[str] = KINDS, split: str = "test"
) -> list[Fact]:
    """Make as many questions as `facts`, all about entities of which none of them says anything.

    Half of the entities have a word in common with one of the facts or of the other questions.

    Raises:
        ValueError: no kinds, an unknown kind or split.
    """
    maker, order = _maker_and_kinds(len(facts), seed, kinds, split)
    maker.similar = 0.5
    for fact in facts:
        maker.note(fact)
    return [maker.unplanted(kind) for kind in order]


def plan_plants(
    facts: Sequence[Fact], total_tokens: int, seed: int, tokens_per_statement: int = 48
) -> list[Plant]:
    """Fix where every statement goes, in the order of the document.

    The ages of the answering statements (tokens from there to the end) are log-uniform and
    stratified between `YOUNGEST` and `total_tokens`; the earlier statements of a fact that
    changes are anywhere before. Two positions are at least `tokens_per_statement` apart.

    Raises:
        ValueError: the document is too short for the statements.
    """
    statements = sum(len(fact.statements) for fact in facts)
    limit = total_tokens - YOUNGEST
    if statements and limit < statements * tokens_per_statement:
        raise ValueError(
            f"total_tokens must be at least {YOUNGEST + statements * tokens_per_statement:,} for "
            f"{statements} statements, not {total_tokens:,}; plant fewer facts or read more tokens"
        )
    draw = random.Random(f"plants {seed}")
    planted = [index for index, fact in enumerate(facts) if fact.statements]
    draw.shuffle(planted)
    plants: list[Plant] = []
    for stratum, index in enumerate(planted):
        texts = facts[index].statements
        share = (stratum + draw.random()) / len(planted)
        age = YOUNGEST * math.exp(share * math.log(total_tokens / YOUNGEST))
        last = max(len(texts) - 1, int(total_tokens - age))
        positions = [*sorted(draw.sample(range(last), len(texts) - 1)), last]
        plants += [
            Plant(position, text, index, place == len(texts) - 1)
            for place, (position, text) in enumerate(zip(positions, texts, strict=True))
        ]
    plants.sort(key=lambda plant: plant.position)
    return _apart(plants, limit, tokens_per_statement)


def parse_kinds(text: str) -> tuple[str, ...]:
    """Read `all` or a comma-separated list of kinds.

    Raises:
        ValueError: a kind that does not exist; the message names its nearest neighbour.
    """
    if text.strip() == "all":
        return KINDS
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    _check_kinds(kinds)
    return kinds


def _maker_and_kinds(
    count: int, seed: int, kinds: Sequence[str], split: str
) -> tuple[FactMaker, list[str]]:
    if count < 0:
        raise ValueError(f"count must be 0 or more, not {count}")
    _check_kinds(kinds)
    draw = random.Random(f"facts {seed}")
    order = [kinds[index % len(kinds)] for index in range(count)]
    draw.shuffle(order)
    return FactMaker(split, draw), order


def _check_kinds(kinds: Sequence[str]) -> None:
    if not kinds:
        raise ValueError(f"kinds must name at least one of {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in FAMILIES:
            near = difflib.get_close_matches(kind, (*KINDS, "all"), n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"kinds are all, {', '.join(KINDS)}"
            raise ValueError(f"kinds: no kind {kind!r}; {hint}")


def _fill(wording: str, entity: str, value: str = "") -> str:
    article = "an" if value[:1].lower() in tuple("aeiou") else "a"
    return wording.format(e=entity, v=value, a=article)


def _apart(plants: list[Plant], limit: int, gap: int) -> list[Plant]:
    """Move plants that are too close forward, then those beyond `limit` back; keep the order."""
    positions: list[int] = []
    for plant in plants:
        positions.append(max(plant.position, positions[-1] + gap if positions else 0))
    for index in range(1, len(positions) + 1):
        positions[-index] = min(positions[-index], limit - (index - 1) * gap)
    return [plant._replace(position=p) for plant, p in zip(plants, positions, strict=True)]
