"""Training sequences: statements and questions laid into ordinary text.

T is the length of a sequence. The pieces of a sequence are first drawn with the places where they
would like to be, then moved apart; what they leave free is one passage of the corpus, in order.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from wakesleep.streams.facts import Fact, FactMaker
from wakesleep.streams.families import FAMILIES, TRAINED_KINDS
from wakesleep.streams.loose_families import LOOSE
from wakesleep.streams.prompts import (
    encode_answer,
    encode_question,
    statement_ids,
    wrap_answer,
    wrap_question,
)
from wakesleep.streams.tokenizer import Tokenizer

LINE_SHARE = 0.25  # of statements that begin a line; the others stand inside a paragraph
FILL = 0.75  # of a sequence that statements and questions take at most, unless it is a dense one
EPISODE = (2, 16)  # facts of one episode of a dense sequence
CLOSER = 8  # times closer together than all over a page, at most
DENSE_CHANGES = 0.2  # share of the facts of a dense sequence that change
PAIR, STORY, UNKNOWN, REVERSED, LATEST = "pair", "story", "unknown", "reversed", "latest_pair"
BABI = ("qa1", "qa2", "qa3", "qa4", "qa5")
ANSWER_KINDS = (*TRAINED_KINDS, LOOSE, PAIR, STORY, UNKNOWN, *BABI, REVERSED, LATEST)


Run = tuple[int, ...]  # ids that follow each other


class Answer(NamedTuple):
    """Where one answer is, its stop included: tokens[start:stop]."""

    start: int
    stop: int
    age: int  # tokens from the value in its statement to the answer; -1: nothing was said
    kind: int  # index into ANSWER_KINDS


class Sequence(NamedTuple):
    tokens: np.ndarray  # [T] int64
    weight: np.ndarray  # [T] float32, of predicting this token from those before it
    fact: np.ndarray  # [T] bool: a value that is still valid, and the token that ends it
    value: np.ndarray  # [T] bool: any value inside its statement, and the token that ends it
    answers: list[Answer]


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """How facts are spread over a sequence, and how much each kind of token counts."""

    facts_min: int = 2
    facts_max: int = 24
    far: int = 320  # tokens; what is older has left the window
    far_share: float = 0.75  # of questions asked at least that far from their statement
    loose_share: float = 0.3  # of facts that belong to no family
    unknown_share: float = 0.3  # of questions to which nothing is the answer
    similar: float = 0.5  # share of entities, and of persons and things that are values, with a
    # word in common with an earlier one of either
    shared: float = 0.2  # share of entities of which something else is said, too
    changed_share: float = 0.5  # of the facts of a sequence about changes
    restated: float = 0.3  # share of changes that are said like a first statement
    answer_weight: float = 2.0
    language_weight: float = 0.3  # of ordinary text
    prompt_weight: float = 0.1  # of statements and questions

    def __post_init__(self) -> None:
        if not 1 <= self.facts_min <= self.facts_max:
            raise ValueError(
                f"facts_min must be from 1 to facts_max={self.facts_max}, not {self.facts_min}"
            )
        if self.far < 0:
            raise ValueError(f"far must be 0 tokens or more, not {self.far}")
        shares = ("far_share", "loose_share", "similar", "shared", "changed_share", "restated")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        if not 0 <= self.unknown_share < 1:
            raise ValueError(f"unknown_share must be at least 0 and below 1: {self.unknown_share}")
        for name in ("answer_weight", "language_weight", "prompt_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")

    @property
    def unknown_odds(self) -> float:
        """Questions about nothing for each that has an answer."""
        return self.unknown_share / (1 - self.unknown_share)


class Piece(NamedTuple):
    target: float  # where it would like to begin
    ids: list[int]
    value: range  # of a statement: where its value is; of a question: its answer
    source: int | None  # of a question: index of the statement that answers it; None: nothing does
    kind: str | None  # of a question
    valid: bool = False  # of a statement: its value answers questions at the end
    told: bool = False  # of a statement: its value was told before, and counts like an answer


class Page:
    """One sequence being written.

    Args:
        draw: the source of every random choice; equal sources give equal pages.
        length: T.
    """

    def __init__(
        self, tokenizer: Tokenizer, draw: random.Random, length: int, config: RecallConfig
    ) -> None:
        self.tokenizer, self.draw, self.length, self.config = tokenizer, draw, length, config
        self.pieces: list[Piece] = []
        self.used = 0

    def say(
        self, target: float, text: str, value: str, *, valid: bool = True, told: bool = False
    ) -> int:
        """Add a statement; return its index, the source of questions.

        Args:
            valid: no later statement says something else.
            told: the value follows from earlier statements.
        """
        lead = "\n" if self.draw.random() < LINE_SHARE else " "
        ids = statement_ids(self.tokenizer, text, lead)
        where = _find(ids, self.tokenizer.encode(f" {value}"))
        return self._add(Piece(target, ids, where, None, None, valid, told))

    def ask(
        self, target: float, question: str, answer: str | None, source: int | None, kind: str
    ) -> None:
        """Add a question with its answer."""
        prompt = encode_question(self.tokenizer, question)
        ids = [*prompt, *encode_answer(self.tokenizer, answer)]
        self._add(Piece(target, ids, range(len(prompt), len(ids)), source, kind))

    def pair(
        self,
        name: Run,
        value: Run,
        *,
        turned: bool = False,
        valid: bool = True,
        target: float | None = None,
    ) -> int:
        """Add the statement that one run of tokens is the value of another.

        Args:
            turned: the value stands before its name.
            valid: no later statement says something else.
            target: where it would like to begin; None: behind all others.
        """
        verb, end = (self.tokenizer.encode(text) for text in (" of" if turned else " is", "."))
        first, second = (value, name) if turned else (name, value)
        begin = 0 if turned else len(name) + len(verb)
        where = range(begin, begin + len(value))
        ids = [*first, *verb, *second, *end]
        target = self.used if target is None else target
        return self._add(Piece(target, ids, where, None, None, valid))

    def ask_pair(
        self,
        name: Run,
        value: Run | None,
        source: int | None,
        kind: str = PAIR,
        target: float | None = None,
    ) -> None:
        """Add the question for the value of a name, None if it has none."""
        prompt = wrap_question(name)
        ids = [*prompt, *wrap_answer(value)]
        kind = UNKNOWN if value is None else kind
        target = self.used if target is None else target
        self._add(Piece(target, ids, range(len(prompt), len(ids)), source, kind))

    def drop_to(self, count: int) -> None:
        """Take the pieces from number `count` on back."""
        self.used -= sum(len(piece.ids) for piece in self.pieces[count:])
        del self.pieces[count:]

    def finish(self, text: np.ndarray) -> Sequence:
        """Lay all pieces into `text` ([at least T - used] ids)."""
        config = self.config
        tokens = np.zeros(self.length, np.int64)
        weight = np.full(self.length, config.language_weight, np.float32)
        fact, said = np.zeros((2, self.length), bool)
        free = np.ones(self.length, bool)
        answers = []
        places = self._places()
        for piece, place in zip(self.pieces, places, strict=True):
            span = slice(place, place + len(piece.ids))
            value = slice(place + piece.value.start, place + piece.value.stop)
            tokens[span], free[span], weight[span] = piece.ids, False, config.prompt_weight
            weight[place] = 0.0  # nothing in the text says that a piece begins here
            if piece.kind is None:
                # An answer stops where the value ended: that token is read like the value's own.
                ended = slice(value.start, value.stop + 1)
                fact[ended], said[ended] = piece.valid, True
                if piece.told:
                    weight[value] = config.answer_weight
                continue
            weight[value] = config.answer_weight
            age = -1
            if piece.source is not None:
                age = value.start - places[piece.source] - self.pieces[piece.source].value.start
            kind = ANSWER_KINDS.index(UNKNOWN if piece.source is None else piece.kind)
            answers.append(Answer(value.start, value.stop, age, kind))
        tokens[free] = text[: int(free.sum())]
        return Sequence(tokens, weight, fact, said, sorted(answers))

    def _add(self, piece: Piece) -> int:
        self.pieces.append(piece)
        self.used += len(piece.ids)
        return len(self.pieces) - 1

    def _places(self) -> list[int]:
        """First column of every piece: the targets, moved apart, in their order."""
        order = sorted(range(len(self.pieces)), key=lambda index: self.pieces[index].target)
        places = [0] * len(order)
        end = 0
        for index in order:
            places[index] = max(int(self.pieces[index].target), end)
            end = places[index] + len(self.pieces[index].ids)
        limit = self.length
        for index in reversed(order):
            limit -= len(self.pieces[index].ids)
            places[index] = limit = min(places[index], limit)
        return places


def write_recall(page: Page, maker: FactMaker, changed_share: float) -> None:
    """Spread facts over the early part of a page, most questions far behind them."""
    draw, config = page.draw, page.config
    wanted = round(config.facts_min * (config.facts_max / config.facts_min) ** draw.random())
    for _ in range(wanted):
        before = len(page.pieces)
        fact = _draw_fact(page, maker, changed_share)
        places = sorted(draw.uniform(0, horizon(page)) for _ in fact.statements)
        source = _say_all(page, fact, places)
        _ask_later(page, places[-1] + len(page.pieces[source].ids), fact, source)
        if draw.random() < config.unknown_odds:
            unknown = _draw_unknown(page, maker)
            page.ask(draw.uniform(0, page.length), unknown.question, None, None, UNKNOWN)
        if page.used > FILL * page.length:
            page.drop_to(before)
            break


def write_dense(page: Page, maker: FactMaker) -> None:
    """Fill a page with episodes: a few facts close together, then questions about them."""
    wanted = page.draw.randint(*EPISODE)
    while wanted:
        before = len(page.pieces)
        _write_episode(page, maker, wanted)
        if page.used <= page.length:
            wanted = page.draw.randint(*EPISODE)
        else:
            page.drop_to(before)
            wanted //= 2


def _write_episode(page: Page, maker: FactMaker, count: int) -> None:
    facts = [_draw_fact(page, maker, DENSE_CHANGES) for _ in range(count)]
    sources = _say_mixed(page, facts)
    asked = list(facts)
    for _ in facts:
        if page.draw.random() < page.config.unknown_odds:
            asked.append(_draw_unknown(page, maker))
    page.draw.shuffle(asked)
    for fact in asked:
        page.ask(page.used, fact.question, fact.answer, sources.get(fact.question), fact.kind)


def _say_mixed(page: Page, facts: list[Fact]) -> dict[str, int]:
    """Add the statements of `facts` one behind the other, in random order but for each fact's own.

    Returns:
        The index of the statement that answers each question.
    """
    turns = [index for index, fact in enumerate(facts) for _ in fact.statements]
    page.draw.shuffle(turns)
    said = [0] * len(facts)
    sources = {}
    for index in turns:
        fact, turn = facts[index], said[index]
        said[index] += 1
        valid = said[index] == len(fact.statements)
        sources[fact.question] = page.say(
            page.used, fact.statements[turn], fact.values[turn], valid=valid
        )
    return sources


def _draw_unknown(page: Page, maker: FactMaker) -> Fact:
    if page.draw.random() < page.config.loose_share:
        return maker.unplanted_loose()
    return maker.unplanted(page.draw.choice(TRAINED_KINDS))


def _draw_fact(page: Page, maker: FactMaker, changed_share: float) -> Fact:
    if page.draw.random() < page.config.loose_share:
        return maker.planted_loose(int(page.draw.random() < changed_share))
    kind = maker.draw.choice(TRAINED_KINDS)
    changes = int(kind == "changed")
    if FAMILIES[kind].changes and maker.draw.random() < changed_share:
        changes = maker.draw.randint(1, 2)
    return maker.planted(kind, changes)


def _say_all(page: Page, fact: Fact, places: list[float]) -> int:
    """Add all statements of a fact; return the index of the one that counts."""
    last = len(places) - 1
    indices = [
        page.say(place, text, value, valid=turn == last)
        for turn, (place, text, value) in enumerate(
            zip(places, fact.statements, fact.values, strict=True)
        )
    ]
    return indices[-1]


def _ask_later(page: Page, end: float, fact: Fact, source: int) -> None:
    """Ask a fact whose last statement ends at about `end`."""
    draw, config = page.draw, page.config
    far = end + config.far
    if draw.random() < config.far_share and far < page.length:
        target = draw.uniform(far, page.length)
    else:
        target = draw.uniform(end, min(far, page.length))
    page.ask(target, fact.question, fact.answer, source, fact.kind)


def horizon(page: Page) -> float:
    """Where the last statements of a page are: questions fit behind, out of the window."""
    return max(page.length - page.config.far - 64, page.length / 4)


def spread_times(page: Page, count: int) -> list[float]:
    """Where `count` statements are, in order: over all of that part of the page, or close together.

    When all of them have left the window, an earlier one may have been in the window when a later
    one was read, or no longer. That the later one counts has to be learned of both.
    """
    whole = horizon(page)
    part = whole * CLOSER ** -page.draw.random()
    start = page.draw.uniform(0, whole - part)
    return sorted(page.draw.uniform(start, start + part) for _ in range(count))


def _find(ids: list[int], part: list[int]) -> range:
    """The last place of `part` in `ids`."""
    for start in range(len(ids) - len(part), -1, -1):
        if ids[start : start + len(part)] == part:
            return range(start, start + len(part))
    raise ValueError("a value must have the same tokens in its statement as in the answer")
