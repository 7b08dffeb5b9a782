"""Replay: pairs of the exact store are written into fast weights, and their places become free.

A unit of replay takes a block of pairs per head: those that are needed most and that the fast
weights give back worst. It never takes a pair whose score says that nobody will ask for it, nor one
whose key was stored again later: that value is no longer true. After the write, those that the fast
weights give back are marked. A later sleep asks for the marked pairs in another way; what it still
finds leaves the store, and what a released pair had superseded leaves with it, or the old value
would be read again.

A pair that was never written is not marked, however much an answer resembles its value: the values
of different words may be that much alike, and the store is the only place that has it.

All functions take the state of one layer and return the next; they work on all lanes and heads.

Shapes: B lanes, H heads, S store places, n pairs of a unit, M marked pairs, K head width.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from wakesleep.kernels.protected_write import protected_write
from wakesleep.kernels.rehearsed_write import STEPS, rehearsed_write
from wakesleep.ttl.fast import answer, follow, held_keys, is_linear
from wakesleep.ttl.key_space import KeySpace, unit_key
from wakesleep.ttl.state import FastState, KeyState, ProbeState, StoreState

Sample = TypeVar("Sample", ProbeState, KeyState)

SAME_KEY = 0.98  # cosine of two keys from which on they are one
INSTEAD = 20.0  # weight of a pair against another value of its key that is there
NO_LIMIT = 1 << 40  # pairs


class Standard(NamedTuple):
    """From when on a pair counts as known."""

    tolerance: float  # cosine of its value with what a query for its key gives back
    noise: Tensor  # [H] what a query has beside the key, see `KeySpace.noise`; an MLP is asked keys


class Pairs(NamedTuple):
    """What one unit writes; n is that of the head with most of them."""

    place: Tensor  # [B, H, n] int64, all different within a head
    chosen: Tensor  # [B, H, n] bool; k and v of the other rows are zeros
    k: Tensor  # [B, H, n, K] float32, of length 1
    v: Tensor  # [B, H, n, K] float32
    replaces: Tensor  # [B, H, n] bool: a probe or an old key says that it had another value


def seen_by(space: KeySpace, store: StoreState, fast: FastState) -> tuple[StoreState, FastState]:
    """Both with keys as fast weights see them, and of the store those heads that they can answer.

    A head whose queries do not tell what they look for keeps its pairs.
    """
    position = torch.where(space.answers[:, None], store.position, -1)
    if fast.old:
        fast = fast._replace(old=fast.old._replace(k=space.keys(fast.old.k)))
    return store._replace(k=space.keys(store.k), position=position), fast


def unseen(fast: FastState, before: FastState) -> FastState:
    """`fast` with the keys of `before`, from which rows may have gone since."""
    if not fast.old:
        return fast
    k = torch.where(fast.old.position[..., None] >= 0, before.old.k, 0.0)
    return fast._replace(old=fast.old._replace(k=k))


def keep_keys(fast: FastState, store: StoreState, pairs: Pairs, known: Tensor) -> FastState:
    """Let the keys of written pairs compete for the rows of an MLP: the best scores stay.

    What lost its key can no longer be asked for: it stays no probe.

    Args:
        store: as it is, not as fast weights see it.
        known: [B, H, n] bool, the pairs whose keys compete.
    """
    if not fast.old:
        return fast
    k, score, position = (take(t, pairs.place) for t in (store.k, store.score, store.position))
    score, position = torch.where(known, score, -torch.inf), torch.where(known, position, -1)
    new = KeyState(k, score, position, known & False)
    both = KeyState(*(torch.cat(pair, 2) for pair in zip(fast.old, new, strict=True)))
    best = both.score.argsort(dim=-1, descending=True, stable=True)
    old = KeyState(*(take(t, best[..., : fast.old.k.shape[2]]) for t in both))
    fast = fast._replace(old=old)
    return fast._replace(probes=only(fast.probes, can_be_asked(fast, fast.probes.position)))


def opened(fast: FastState, store: StoreState) -> FastState:
    """The softmax sees the keys that an MLP holds of pairs that are not in the store."""
    if not fast.old:
        return fast
    position = fast.old.position
    outside = (position >= 0) & (follow(store.position, position) < 0)
    return fast._replace(old=fast.old._replace(open=outside))


def can_be_asked(fast: FastState, position: Tensor) -> Tensor:
    """Which written pairs, at position [B, H, n], fast weights can be asked for: [B, H, n] bool.

    A matrix for all of them, an MLP for those whose key it holds.
    """
    return follow(fast.old.position, position) >= 0 if fast.old else position >= 0


def only(sample: Sample, rows: Tensor) -> Sample:
    """The `rows` [B, H, P] bool of a sample, emptiness elsewhere."""
    empty = {"k": 0.0, "v": 0.0, "score": -torch.inf, "position": -1, "open": False}
    fields = {}
    for name, t in sample._asdict().items():
        where = rows.view(*rows.shape, *[1] * (t.dim() - 3))
        fields[name] = torch.where(where, t, empty[name])
    return type(sample)(**fields)


def likeness(s: Tensor, k: Tensor, v: Tensor, noise: Tensor) -> Tensor:
    """Cosine [B, H, n] of values v with what fast weights give back to queries for k [B, H, n, K].

    A matrix answers all that is in a query, what it has beside the key as well: as loudly, in no
    direction, as the mean over all directions. The more is written, the louder that is.
    """
    told = answer(s, k)
    if not is_linear(s):
        return torch.cosine_similarity(told, v, dim=-1)
    beside = noise.square() * s.square().mean(-2).sum(-1)  # [B, H]
    length = (told.square().sum(-1) + beside[..., None]).sqrt() * v.norm(dim=-1)
    return (told * v).sum(-1) / length.clamp(min=1e-8)


def choose(store: StoreState, fast: FastState, num_pairs: int, worth: float) -> Pairs:
    """The pairs that a unit should write, by need times gain; num_pairs per head at most.

    Need is a pair's rank by score in its head, gain the share of its value that is not given back.
    Left out are pairs that are not finite, marked or set aside as probes, those with too small a
    score or, for an MLP, with a smaller one than any key that it holds, once it is full, and those
    that a later pair with the same key supersedes. No head takes more than it has `room` for.

    Args:
        worth: score from which on a pair is worth a write.
    """
    k, v, usable = readable(store)
    told = answer(fast.s, k)
    gain = ((v - told).norm(dim=-1) / v.norm(dim=-1).clamp(min=1e-6)).clamp(max=1)
    need = store.score.argsort(dim=-1).argsort(dim=-1) + 1.0
    aside = (store.position[..., None] == fast.probes.position[..., None, :]).any(-1)
    usable &= (store.score >= worth) & (fast.asleep != store.position) & ~aside
    if fast.old:
        usable &= store.score > fast.old.score.amin(-1, keepdim=True)
    use = torch.where(usable, need * gain, -torch.inf)
    order = use.argsort(dim=-1, descending=True, stable=True)[..., : 2 * num_pairs]
    old = _superseded(take(k, order), store.position.gather(-1, order), k, store.position)
    fresh = usable.gather(-1, order) & ~old
    first = (~fresh).to(torch.uint8).argsort(dim=-1, stable=True)[..., :num_pairs]
    place, chosen = order.gather(-1, first), fresh.gather(-1, first)
    rank = torch.arange(chosen.shape[-1], device=chosen.device)
    chosen &= rank < room(store, fast, worth)[..., None]
    most = int(chosen.sum(-1).max())
    place, chosen = place[..., :most], chosen[..., :most]
    k, v = (torch.where(chosen[..., None], take(t, place), 0.0) for t in (k, v))
    written = [fast.probes.k, *([fast.old.k] if fast.old else [])]
    again = (k @ torch.cat(written, 2).float().mT >= SAME_KEY).any(-1)
    return Pairs(place, chosen, k, v, chosen & again)


def room(store: StoreState, fast: FastState, worth: float) -> Tensor:
    """How many more pairs each head [B, H] takes; any number in a matrix.

    An MLP has a row for each. Once they are full, what is known least is forgotten, and as long as
    the store has room for all that is worth more, nothing is gained by that. Nor by a write of a
    few pairs, which rehearses all.
    """
    if not fast.old:
        return torch.full_like(fast.asleep[..., 0], NO_LIMIT)
    few, places = store.k.shape[-1], store.k.shape[2]
    waiting = (store.position >= 0) & (store.score >= worth) & (fast.asleep != store.position)
    held = fast.old.position >= 0
    least = torch.where(held, fast.old.score, torch.inf).amin(-1, keepdim=True)
    better = (waiting & (store.score > least)).sum(-1)
    crowd = (better - max(places - 2 * few, 0)).clamp(min=0)
    total = (~held).sum(-1) + crowd
    return torch.where(total >= few, total, 0)


def change(fast: FastState, pairs: Pairs, lam: float, steps: int = STEPS) -> FastState:
    """The fast weights with the pairs in them, at full step; marks, probes and old keys stay.

    An MLP rehearses its old keys. What it answers to others does not matter: it is never asked.

    Args:
        lam: ridge of a matrix.
        steps: of Adam, of an MLP.
    """
    weight = 1.0 + (INSTEAD - 1) * pairs.replaces
    if fast.old:
        old = fast.old.k[:, :, : held_keys(fast)].to(fast.s.dtype)
        return fast._replace(s=rehearsed_write(fast.s, pairs.k, pairs.v, weight, old, steps))
    given = (fast.s, fast.covariance, pairs.k, pairs.v)
    s, covariance = protected_write(*given, lam, weight)
    return fast._replace(s=s, covariance=covariance)


def mark(store: StoreState, fast: FastState, pairs: Pairs, standard: Standard) -> FastState:
    """Mark the pairs just written, and keep the marks of others, where they are known."""
    k, v, usable = readable(store)
    wrote = torch.zeros_like(usable).scatter(-1, pairs.place, pairs.chosen)
    usable &= wrote | (fast.asleep == store.position)
    known = usable & (likeness(fast.s, k, v, standard.noise) >= standard.tolerance)
    return fast._replace(asleep=torch.where(known, store.position, -1))


def release(
    store: StoreState, fast: FastState, standard: Standard, generator: torch.Generator
) -> tuple[StoreState, FastState]:
    """Free the places of marked pairs that are still found; the others lose their mark.

    A matrix, which queries ask, is asked with a key that is disturbed as they are, an MLP with the
    key that it holds. A value is found if what comes back points to it, and to no other stored
    value more. The pairs that a released one supersedes are released with it.

    Args:
        generator: of the disturbances; on the CPU.
    """
    marked = (fast.asleep == store.position) & (store.position >= 0)
    most = int(marked.sum(-1).max())
    place = (~marked).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
    k, v, usable = readable(store)
    keys, values, position = take(k, place), take(v, place), store.position.gather(-1, place)
    cues = keys
    if is_linear(fast.s):
        drawn = torch.randn(k.shape[-2:], generator=generator).to(k.device)  # lanes get the same
        cues = unit_key(keys + standard.noise[..., None, None] * unit_key(drawn)[place])
    told = answer(fast.s, cues)
    near = F.normalize(told, dim=-1) @ F.normalize(v, dim=-1).mT  # [B, H, M, S]
    best = torch.where(usable[..., None, :], near, -torch.inf).amax(-1)
    own = torch.cosine_similarity(told, values, dim=-1)
    found = marked.gather(-1, place) & (own >= standard.tolerance) & (own >= best - 1e-6)
    found &= can_be_asked(fast, position)
    if is_linear(fast.s):  # one disturbance may be a lucky one
        found &= likeness(fast.s, keys, values, standard.noise) >= standard.tolerance
    free = torch.zeros_like(marked).scatter(-1, place, found)
    later = torch.where(found, position, -1)
    free |= (store.position >= 0) & _superseded(k, store.position, keys, later)
    return emptied(store, free), fast._replace(asleep=torch.full_like(fast.asleep, -1))


def take(t: Tensor, place: Tensor) -> Tensor:
    """Rows [B, H, n, ...] of t [B, H, S, ...] at place [B, H, n]."""
    index = place.view(*place.shape, *[1] * (t.dim() - 3)).expand(*place.shape, *t.shape[3:])
    return t.gather(2, index)


def readable(store: StoreState) -> tuple[Tensor, Tensor, Tensor]:
    """Unit keys and values [B, H, S, K] float32, and which places [B, H, S] hold a good pair."""
    k, v = unit_key(store.k), store.v.float()
    good = (store.position >= 0) & k.isfinite().all(-1) & v.isfinite().all(-1)
    good &= (k.square().sum(-1) > 0.5) & (v.square().sum(-1) > 0)
    k, v = (torch.where(good[..., None], t, 0.0) for t in (k, v))
    return k, v, good


def _superseded(k: Tensor, position: Tensor, others: Tensor, others_at: Tensor) -> Tensor:
    """Which of the keys k [B, H, n, K] at position [B, H, n] come again later among the others."""
    same = k @ others.mT >= SAME_KEY
    return (same & (others_at[..., None, :] > position[..., None])).any(-1)


def emptied(store: StoreState, free: Tensor) -> StoreState:
    """The store without the pairs in the places `free` [B, H, S] bool."""
    empty = {"k": 0, "v": 0, "score": -torch.inf, "mass": 0, "position": -1, "span": -1}
    fields = {}
    for name, value in empty.items():
        t = getattr(store, name)
        fields[name] = torch.where(free.view(*free.shape, *[1] * (t.dim() - 3)), value, t)
    return store._replace(**fields)
