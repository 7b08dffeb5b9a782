"""Facts in two steps, of random tokens: who has a thing, and where that one is now.

    b of t.   b is p.   c of u.   b is q.       t?  b      b?  q      is t?  q

This is what bAbI tasks 2 and 3 ask ("Where is the milk?"), without a list of names, things or
places that could be learned by heart; the latest of several places counts.
"""

from __future__ import annotations

from wakesleep.streams.sequences import Page, Run, random_ids

NAMES = (4, 10)  # of an episode, holders and things
HOLDERS = 4  # at most
MOVES = (1, 3)  # of every holder
TOKENS = (1, 1)  # of every name


def write_chains(page: Page) -> None:
    """Fill a page with episodes: who holds what and goes where, then all questions about it."""
    while True:
        before = len(page.pieces)
        _write_episode(page)
        if page.used > page.length:
            page.drop_to(before)
            return


def _write_episode(page: Page) -> None:
    draw = page.draw
    names = list({random_ids(page, TOKENS): None for _ in range(draw.randint(*NAMES))})
    count = draw.randint(2, min(HOLDERS, len(names) - 1))
    holders, things = names[:count], names[count:]
    moves = [holder for holder in holders for _ in range(draw.randint(*MOVES))]
    turns = [(holder, None) for holder in moves]
    turns += [(draw.choice(holders), thing) for thing in things]
    draw.shuffle(turns)
    places: dict[Run, tuple[Run, int]] = {}  # where a holder is, and which statement says so
    owners: dict[Run, tuple[Run, int]] = {}  # who has a thing, likewise
    for holder, thing in turns:
        if thing is None:
            moves.remove(holder)
            place = random_ids(page, TOKENS)
            said = page.pair(holder, place, valid=holder not in moves)
            places[holder] = place, said
        else:
            owners[thing] = holder, page.pair(thing, holder, turned=True)
    asked = [(name, *found, False) for name, found in (*places.items(), *owners.items())]
    asked += [(thing, *places[holder], True) for thing, (holder, _) in owners.items()]
    for name, value, source, chain in draw.sample(asked, len(asked)):
        page.ask_pair(name, value, source, chain=chain)
