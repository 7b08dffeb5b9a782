"""Stories of bAbI tasks 1 to 5 in their own words, without end.

    qa1  Mary moved to the bathroom.                    Where is Mary?
    qa2  Mary got the football there.                   Where is the football?
    qa3  the same                                       Where was the football before the garden?
    qa4  The office is north of the kitchen.            What is north of the kitchen?
    qa5  Bill gave the football to Fred.                Who received the football?

Sentences, verbs and the rules of what can happen are those of the published data, which is what a
model is tested on; none of its stories is in here.
Source: Weston et al., "Towards AI-Complete Question Answering", arXiv 1502.05698.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from wakesleep.streams.sequences import Page
from wakesleep.streams.stories import Event, spread_story
from wakesleep.streams.words import Words

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
PEOPLE = ("Daniel", "John", "Mary", "Sandra")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")  # of qa5
MOVES = ("went to", "moved to", "travelled to", "journeyed to", "went back to")
GETS = ("took", "picked up", "got", "grabbed")
DROPS = ("dropped", "left", "put down", "discarded")
GIVES = ("gave", "handed", "passed")
ACTS = {
    "qa1": ("move",),
    "qa2": ("get", "drop", "move"),
    "qa3": ("get", "drop", "move"),
    "qa5": ("get", "give", "drop", "move"),
}
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
GOT_THERE = {"qa2": 1.0, "qa3": 0.2, "qa5": 1.0}  # share of the sentences that end in "there"
LEFT_THERE = 0.2
MIDDLE = 2 / 3  # of the sentences of qa4 that end in the room that both name
MOST = {"qa4": 1}  # questions about a story of this task: of two rooms, one rules out the other
INTERRUPTED, ON_THE_WAY = 0.6, 0.6  # stories with questions on the way; sentences with one behind
SPELT = 0.5  # stories that say where a thing is taken or left
SMALL = 0.5  # of stories with some of the cast only
FEWEST = (2, 2, 1)  # people, places, things
BLOCK = 2  # events between two moments at which a question may come
ASKED = {"qa1": 1.0, "qa2": 0.6, "qa3": 0.5, "qa5": 0.75}  # share of these, once there is one
QUESTIONS = 5  # of a published story; the last one that is asked ends the story
SPREAD = 0.5  # of a page that sentences of stories take at most, where text is between them
TOGETHER = (2, 8, 16)  # stories of different worlds that are told between one another there

Known = dict[str, tuple[str, int]]  # question: answer, number of the event that tells it


class Cast(NamedTuple):
    people: Sequence[str]
    places: Sequence[str]
    things: Sequence[str]


def own_cast(task: str) -> Cast:
    """Those of the published data."""
    return Cast(GIVERS if task == "qa5" else PEOPLE, PLACES, THINGS)


def open_cast(draw: random.Random, words: Words) -> Cast:
    """As many of each from a large vocabulary."""
    own = own_cast("qa1")
    return Cast(
        draw.sample(words.first_names, len(own.people)),
        draw.sample(words.nouns, len(own.places)),
        draw.sample(words.animals, len(own.things)),
    )


def make_babi(draw: random.Random, task: str, cast: Cast) -> list[Event]:
    """Draw a story that ends where a question may be asked."""
    if task == "qa4":
        return _rooms(draw, cast)
    world = _World(draw, task, cast)
    events: list[Event] = []
    left = draw.randint(1, QUESTIONS)
    while left:
        for _ in range(BLOCK):
            events.append(world.act(len(events)))
        left -= bool(events[-1].known) and draw.random() < ASKED[task]
    return events


def write_babi(page: Page, tasks: Sequence[str], words: Words, open_share: float) -> None:
    """Fill a page with stories, one behind the other, a few questions behind each, or on the way.

    Most answers of a page are those on the way: long stories teach little by what comes behind.
    """
    draw = page.draw
    while True:
        before = len(page.pieces)
        task, _, events = _draw_story(draw, tasks, words, open_share)
        often = ON_THE_WAY if task not in MOST and draw.random() < INTERRUPTED else 0.0
        said = _with_places(events) if draw.random() < SPELT else events
        sources: list[int] = []
        asked: set[tuple[str, int, int]] = set()  # an answer could be read off an equal one
        handled: dict[str, int] = {}  # thing: sentence in which it was last taken or left
        for event, (text, named, *_, told) in zip(events, said, strict=True):
            sources.append(page.say(page.used, text, named, told=told))
            if event.place:
                handled[event.named] = sources[-1]
            last = event is events[-1]
            new = [key for key in _keys(event.known, handled) if key not in asked]
            most = draw.randint(1, MOST.get(task, 3)) if last else int(draw.random() < often)
            for key in draw.sample(new, min(most, len(new))):
                asked.add(key)
                answer, told = event.known[key[0]]
                page.ask(page.used, key[0], answer, sources[told], task)
        if page.used > page.length:
            page.drop_to(before)
            return


def _keys(known: Known, handled: dict[str, int]) -> list[tuple[str, int, int]]:
    """Questions, each with the sentences that its answer may depend on: it is a new one by these.

    That a thing was left changes no answer at once, but where it is from then on.
    """
    return [
        (question, told, max((n for thing, n in handled.items() if thing in question), default=-1))
        for question, (_, told) in sorted(known.items())
    ]


def _with_places(events: list[Event]) -> list[Event]:
    """Say behind it where something is taken or left: told before, so it is to be predicted.

    Nothing announces it, so where a thing is has to be known at the end of every such sentence.
    """
    return [
        event._replace(text=f"{event.text} {event.place}.", named=event.place, told=True)
        if event.place
        else event
        for event in events
    ]


def spread_babi(page: Page, tasks: Sequence[str], words: Words, open_share: float) -> None:
    """Spread stories over the early part of a page, with questions between and behind.

    Several of them share no name: one story has few questions for so much text.
    """
    draw, wanted = page.draw, page.draw.choice(TOGETHER)
    left, names = SPREAD * page.length, set[str]()
    for attempt in itertools.count():
        if not wanted or (names and attempt >= 2 * max(TOGETHER)):
            return
        task, cast, events = _draw_story(draw, tasks, words, 1.0 if names else open_share)
        used = sum(len(page.tokenizer.encode(event.text)) for event in events)
        mine = {name for part in cast for name in part}
        if used > left or mine & names:
            continue
        events = _with_places(events) if draw.random() < SPELT else events
        spread_story(page, events, task, most=MOST.get(task, math.inf))
        left, names, wanted = left - used, names | mine, wanted - 1


def _draw_story(
    draw: random.Random, tasks: Sequence[str], words: Words, open_share: float
) -> tuple[str, Cast, list[Event]]:
    task = draw.choice(tasks)
    cast = open_cast(draw, words) if draw.random() < open_share else own_cast(task)
    if task not in MOST and draw.random() < SMALL:
        cast = _some_of(draw, cast)
    return task, cast, make_babi(draw, task, cast)


def _some_of(draw: random.Random, cast: Cast) -> Cast:
    """A smaller world: more happens to each of its things, so that more can be asked."""
    return Cast(
        *(
            draw.sample(names, draw.randint(fewest, len(names)))
            for names, fewest in zip(cast, FEWEST, strict=True)
        )
    )


class _World:
    """Who is where with what. What was not told is true, too, but no answer follows from it."""

    def __init__(self, draw: random.Random, task: str, cast: Cast) -> None:
        self.draw, self.task, self.cast = draw, task, cast
        self.where = {name: draw.choice(cast.places) for name in (*cast.people, *cast.things)}
        self.holder: dict[str, str] = {}
        self.told: dict[str, tuple[str, int]] = {}  # person: place, event that told it
        self.paths: dict[str, list[tuple[str, int]]] = {thing: [] for thing in cast.things}
        self.given: Known = {}  # the questions about the last gift

    def act(self, number: int) -> Event:
        """The next event that can happen."""
        while True:
            kind, person = self.draw.choice(ACTS[self.task]), self.draw.choice(self.cast.people)
            match kind:
                case "move":
                    found = self._move(person, number)
                case "get":
                    found = self._get(person)
                case "drop":
                    found = self._drop(person)
                case "give":
                    found = self._give(person, number)
            if found:
                place, _ = (
                    self.told.get(person, (None, 0)) if kind in ("get", "drop") else (None, 0)
                )
                return Event(*found, self._known(), place)

    def _move(self, person: str, number: int) -> tuple[str, str]:
        place = self.draw.choice([p for p in self.cast.places if p != self.where[person]])
        self.where[person], self.told[person] = place, (place, number)
        for thing in self._held(person):
            self._carry(thing, person)
        return f"{person} {self.draw.choice(MOVES)} the {place}.", place

    def _get(self, person: str) -> tuple[str, str] | None:
        here = self.where[person]
        loose = [t for t in self.cast.things if t not in self.holder and self.where[t] == here]
        if not loose:
            return None
        thing = self.draw.choice(loose)
        self.holder[thing] = person
        self._carry(thing, person)
        there = " there" if self.draw.random() < GOT_THERE[self.task] else ""
        return f"{person} {self.draw.choice(GETS)} the {thing}{there}.", thing

    def _drop(self, person: str) -> tuple[str, str] | None:
        if not (held := self._held(person)):
            return None
        thing = self.draw.choice(held)
        del self.holder[thing]
        there = " there" if self.draw.random() < LEFT_THERE else ""
        return f"{person} {self.draw.choice(DROPS)} the {thing}{there}.", thing

    def _give(self, person: str, number: int) -> tuple[str, str] | None:
        held, here = self._held(person), self.where[person]
        near = [p for p in self.cast.people if p != person and self.where[p] == here]
        if not held or not near:
            return None
        thing, other = self.draw.choice(held), self.draw.choice(near)
        self.holder[thing] = other
        self._carry(thing, other)
        self.given = {
            f"What did {person} give to {other}?": (thing, number),
            f"Who gave the {thing}?": (person, number),
            f"Who gave the {thing} to {other}?": (person, number),
            f"Who did {person} give the {thing} to?": (other, number),
            f"Who received the {thing}?": (other, number),
        }
        return f"{person} {self.draw.choice(GIVES)} the {thing} to {other}.", thing

    def _held(self, person: str) -> list[str]:
        return [thing for thing in self.cast.things if self.holder.get(thing) == person]

    def _carry(self, thing: str, person: str) -> None:
        """A thing is where its holder is; its path has what was told of that."""
        self.where[thing] = self.where[person]
        path, told = self.paths[thing], self.told.get(person)
        if told and (not path or path[-1][0] != told[0]):
            path.append(told)

    def _known(self) -> Known:
        match self.task:
            case "qa1":
                return {f"Where is {person}?": told for person, told in self.told.items()}
            case "qa2":
                ends = {thing: path[-1] for thing, path in self.paths.items() if path}
                return {f"Where is the {thing}?": end for thing, end in ends.items()}
            case "qa3":
                return {
                    f"Where was the {thing} before the {place}?": before
                    for thing, path in self.paths.items()
                    for before, (place, _) in list(itertools.pairwise(path))[-2:]
                }
            case _:
                return dict(self.given)


def _rooms(draw: random.Random, cast: Cast) -> list[Event]:
    """Three rooms in a line; what is asked about one sentence is its first room."""
    first, middle, last = draw.sample(list(cast.places), 3)
    onward = draw.choice(sorted(OPPOSITE))  # where one comes going from first to last
    pairs = [(middle, onward, first), (last, onward, middle)]
    draw.shuffle(pairs)
    events, known = [], {}
    for number, (room, way, other) in enumerate(pairs):
        if (other == middle) == (draw.random() >= MIDDLE):
            room, way, other = other, OPPOSITE[way], room
        known |= {
            f"What is {way} of the {other}?": (room, number),
            f"What is the {other} {OPPOSITE[way]} of?": (room, number),
        }
        events.append(Event(f"The {room} is {way} of the {other}.", room, dict(known)))
    return events
