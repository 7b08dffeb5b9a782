"""Stories of people who go from place to place, in the manner of bAbI tasks 1 and 2.

The tasks are from arXiv 1502.05698; names, places and sentences here are drawn from our own lists.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from wakesleep.streams.sequences import STORY, Page, spread_times
from wakesleep.streams.words import Words

MOVES = ("went to", "moved to", "travelled to", "journeyed to", "walked to", "went back to")
TAKES = ("took", "picked up", "got", "grabbed")
DROPS = ("dropped", "left", "put down", "discarded")
CARRY_SHARE = 0.35  # of stories in which things are taken and left, too
FILL = 0.6  # of a page that a story takes at most


class Event(NamedTuple):
    text: str
    named: str  # the place that somebody went to, or the thing that was taken or left
    known: dict[str, tuple[str, int]]  # after it: question -> place, number of the event that tells
    place: str | None = None  # where it happens, if that was told and the text does not say it
    told: bool = False  # `named` follows from what was said before, and is to be predicted


def write_story(page: Page, words: Words) -> None:
    """Spread a story over the early part of a page, with questions between and behind."""
    draw = page.draw
    events = make_story(draw, words, draw.randint(6, 40))
    spread_story(page, events, STORY, words.first_names)


def spread_story(
    page: Page,
    events: list[Event],
    kind: str,
    strangers: Sequence[str] = (),
    most: float = math.inf,
) -> None:
    """Lay events into a page's early part, far apart or not, with questions between and behind.

    Args:
        strangers: people who may be asked for although nothing was said of them.
        most: questions.
    """
    draw = page.draw
    times = spread_times(page, len(events))
    telling = {event for _, event in events[-1].known.values()}
    numbers = [
        page.say(time, event.text, event.named, valid=index in telling, told=event.told)
        for index, (time, event) in enumerate(zip(times, events, strict=True))
    ]
    heard = {question for event in events for question in event.known}
    asked: set[tuple[str, int]] = set()
    for _ in range(2 * len(heard)):
        question, time = _question_and_time(page, events, times)
        now = max(index for index, before in enumerate(times) if before <= time)
        place, told = events[now].known.get(question, (None, None))
        if told is None or (question, told) in asked:  # a second answer could be read off the first
            continue
        asked.add((question, told))
        page.ask(time, question, place, numbers[told], kind)
        unheard = f"Where is {draw.choice(strangers)}?" if strangers else None
        if unheard and unheard not in heard and draw.random() < page.config.unknown_odds:
            page.ask(draw.uniform(0, page.length), unheard, None, None, kind)
        if page.used > FILL * page.length or len(asked) >= most:
            break


def _question_and_time(page: Page, events: list[Event], times: list[float]) -> tuple[str, float]:
    """A question that has an answer then: mostly at the end and out of the window, or soon."""
    draw, far = page.draw, page.config.far
    if draw.random() < page.config.far_share:
        known = events[-1].known
        question = draw.choice(sorted(known))
        since = next(index for index, event in enumerate(events) if question in event.known)
        start = times[max(since, known[question][1])] + far
        return question, draw.uniform(min(start, page.length - 1), page.length)
    index = draw.choice([number for number, event in enumerate(events) if event.known])
    question = draw.choice(sorted(events[index].known))
    return question, draw.uniform(times[index], min(times[index] + far, page.length))


def make_story(draw: random.Random, words: Words, count: int) -> list[Event]:
    """Draw `count` events; what is carried is where its carrier is."""
    people = draw.sample(words.first_names, draw.randint(2, 8))
    places = draw.sample(words.nouns, draw.randint(3, 8))
    things = draw.sample(words.animals, draw.randint(1, 3)) if draw.random() < CARRY_SHARE else []
    where: dict[str, tuple[str, int]] = {}  # person or thing -> place, event that tells
    holder: dict[str, str] = {}  # thing -> person
    events: list[Event] = []
    for number in range(count):
        person = draw.choice(people)
        loose = [thing for thing in things if thing not in holder]
        held = [thing for thing in things if holder.get(thing) == person]
        act = draw.random()
        if person in where and loose and act < 0.3:
            named = draw.choice(loose)
            holder[named] = person
            where[named] = where[person]
            text = f"{person} {draw.choice(TAKES)} the {named}."
        elif held and act < 0.45:
            named = draw.choice(held)
            del holder[named]
            text = f"{person} {draw.choice(DROPS)} the {named}."
        else:
            here = where[person][0] if person in where else None
            named = draw.choice([place for place in places if place != here])
            where |= {moved: (named, number) for moved in (person, *held)}
            text = f"{person} {draw.choice(MOVES)} the {named}."
        events.append(Event(text, named, {_question(name, things): p for name, p in where.items()}))
    return events


def _question(name: str, things: list[str]) -> str:
    return f"Where is the {name}?" if name in things else f"Where is {name}?"
