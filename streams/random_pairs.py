"""Pairs of random tokens: one run of tokens is the name of another.

    v1 v2 of n1.                                n1?
    n1 is v1. n2 is v2 v3. n1 is v4.            n1?

There is no list of values to learn by heart: copying is the only way to answer. Each thing that
stories ask for is learned from such pairs within a million tokens or two, and hardly ever from the
stories themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from wakesleep.streams.sequences import EPISODE, FILL, LATEST, Page, Run, spread_times
from wakesleep.streams.tokenizer import NUM_SPECIAL

SAID = (4, 64)  # statements of an episode of names whose values change
MOST_VALUES = 6  # of a name then, on average
NAME_TOKENS, PART_TOKENS, VALUE_TOKENS = (1, 3), (1, 2), (1, 5)  # of a pair


def write_pairs(page: Page, *, turned: bool = False) -> None:
    """Fill a page with episodes of random tokens: some are the names of others, then asked for.

    Args:
        turned: values stand before their names, and half of the episodes have names of two parts
            that recur, so that it takes both to tell which is meant.
    """
    wanted = page.draw.randint(*EPISODE)
    while wanted:
        before = len(page.pieces)
        parted = turned and page.draw.random() < 0.5
        drawn = _grid(page, wanted) if parted else _random_names(page, wanted)
        names = {name: _random_ids(page, VALUE_TOKENS) for name in drawn}
        sources = {name: page.pair(name, value, turned=turned) for name, value in names.items()}
        for name in page.draw.sample(list(names), len(names)):
            page.ask_pair(name, names[name], sources[name])
            if page.draw.random() < page.config.unknown_odds:
                page.ask_pair(_random_ids(page, NAME_TOKENS), None, None)
        if page.used <= page.length:
            wanted = page.draw.randint(*EPISODE)
        else:
            page.drop_to(before)
            wanted //= 2


def write_latest_pairs(page: Page) -> None:
    """Fill a page with names of random tokens that get one value after the other; the last counts.

    Half of the pages have text between: then most of what is asked for, and the values before it,
    have left the window.
    """
    draw = page.draw
    ends: set[int] = set()
    spread = draw.random() < 0.5
    wanted = SAID[1] // 2 if spread else SAID[1]
    while wanted >= SAID[0]:
        before = len(page.pieces)
        _say_and_ask_latest(page, draw.randint(SAID[0], wanted), spread, ends)
        if page.used > (FILL if spread else 1) * page.length:
            page.drop_to(before)
            wanted //= 2
        elif spread:
            return


def _say_and_ask_latest(page: Page, said: int, spread: bool, ends: set[int]) -> None:
    """Add `said` statements behind all others, or over the early part of the page; ask for all.

    ends: last tokens of the page's names, to be added to: no name is, or ends in, another.
    """
    draw = page.draw
    drawn = _random_names(page, max(1, round(said / draw.uniform(1, MOST_VALUES))))
    names = list({name[-1]: name for name in drawn if name[-1] not in ends}.values())
    if not names:
        return
    ends |= {name[-1] for name in names}
    turns = [*names, *draw.choices(names, k=said - len(names))]
    draw.shuffle(turns)
    last = {name: turn for turn, name in enumerate(turns)}
    times = spread_times(page, said) if spread else [None] * said
    values, sources = {}, {}
    for turn, (name, time) in enumerate(zip(turns, times, strict=True)):
        values[name] = _random_ids(page, VALUE_TOKENS)
        sources[name] = page.pair(name, values[name], valid=turn == last[name], target=time)
    for name in draw.sample(names, len(names)):
        soonest = times[last[name]] + page.config.far if spread else None
        time = draw.uniform(min(soonest, page.length - 1), page.length) if spread else None
        page.ask_pair(name, values[name], sources[name], LATEST, time)


def _random_names(page: Page, count: int) -> Iterator[Run]:
    return (_random_ids(page, NAME_TOKENS) for _ in range(count))


def _grid(page: Page, count: int) -> list[Run]:
    """Names of two parts each, out of as few parts as it takes and one more."""
    few = range(math.isqrt(count) + 1)
    first, second = ([_random_ids(page, PART_TOKENS) for _ in few] for _ in range(2))
    return page.draw.sample([a + b for a in first for b in second], count)


def _random_ids(page: Page, count: tuple[int, int]) -> Run:
    low, high = NUM_SPECIAL, page.tokenizer.vocab_size
    return tuple(page.draw.randrange(low, high) for _ in range(page.draw.randint(*count)))
