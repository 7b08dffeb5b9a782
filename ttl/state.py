"""The state of a stream: a tree of NamedTuples whose tensors all start with the lane.

Everything that a model remembers is in this tree, and nothing of it is anywhere else: a call takes
a state and returns the next one. The functions below work on the whole tree; a part that a model
does not have is None.

Shapes: B lanes, H heads, K head width, W window, C chunk, O open tokens of a memory (a page),
S store places (0 without a store), P probes, D model width, R convolution taps minus one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

SPAN = 32  # token ids kept around every stored pair
SPAN_AFTER = 12  # of these, ids that follow the pair's own token

Tree = TypeVar("Tree")


class WindowState(NamedTuple):
    """Short-term memory: the last W tokens before the open chunk, then the open chunk itself."""

    k: Tensor  # [B, W + C, H, K] keys, not rotated
    v: Tensor  # [B, W + C, H, K]
    live: Tensor  # [B, W + C] bool: a token is there and was finite
    score: Tensor  # [B, W + C, H] float32, what the store will admit it by
    tail: Tensor  # [B, R, 3 * H * K] last inputs of the short convolution


class StoreState(NamedTuple):
    """Exact memory: S places per head; places are overwritten, order is told by `position`."""

    k: Tensor  # [B, H, S, K]
    v: Tensor  # [B, H, S, K]
    score: Tensor  # [B, H, S] float32, -inf where empty
    mass: Tensor  # [B, H, S] float32, attention mass read from the pair since it was admitted
    position: Tensor  # [B, H, S] int64, since the lane's reset; -1 where empty
    span: Tensor  # [B, H, S, SPAN] int32 token ids around the pair; -1 where there was no token
    moments: Tensor  # [B, H, 3] float32: count, mean, variance of the raw scores before this chunk


class MemoryState(NamedTuple):
    """Long-term memory: fast weights, their momentum and the chunk or page that is still open."""

    weights: tuple[Tensor, ...]  # per layer, [B, H, in, out] float32, less the initial weights
    momentum: tuple[Tensor, ...]  # same shapes; empty tuple without momentum
    k: Tensor  # [B, O, H, K] float32 keys of the open page
    v: Tensor  # [B, O, H, K] float32
    gates: Tensor  # [B, O, H, 2 or 3] float32: keep, step and, if there is one, momentum
    live: Tensor  # [B, O] bool: a token is there that may be written
    tail: Tensor  # [B, R, 3 * H * K] last inputs of the convolution, 2 * H * K of a paged memory
    surprise: Tensor  # [B, 2] float32: weight and running mean, up to the last boundary


class ProbeState(NamedTuple):
    """Pairs of the fast weights that are set aside to judge every sleep by; never replayed."""

    k: Tensor  # [B, H or 0, P, K] keys of length 1
    v: Tensor  # [B, H or 0, P, K]
    position: Tensor  # [B, H or 0, P] int64; -1 where empty


class KeyState(NamedTuple):
    """Keys whose values an MLP holds, as the store had them; the loudest first, then emptiness."""

    k: Tensor  # [B, H, N, K]
    score: Tensor  # [B, H, N] float32, that of the store's place; -inf where empty
    position: Tensor  # [B, H, N] int64; -1 where empty
    open: Tensor  # [B, H, N] bool: the store has it no more, so the softmax sees it


class FastState(NamedTuple):
    """Fast weights that are read awake and written asleep; zero heads in a layer without them."""

    s: Tensor  # [B, H or 0, K, K or 2 M] float32, of a matrix, or of an MLP with M hidden
    covariance: Tensor  # [B, H or 0, K or 0, K] float32, sum of k k^T over the keys of a matrix
    gates: Tensor  # [B, C or 0, H or 0, 2] float32, keep and step in the open chunk, written awake
    asleep: Tensor  # [B, H or 0, S] int64 position of the written pair in each store place, or -1
    probes: ProbeState
    old: KeyState | None  # of an MLP


class BlockState(NamedTuple):
    window: WindowState
    store: StoreState | None
    memory: MemoryState | None
    fast: FastState
    page: Tensor  # [B, O, 2, H, K] keys and values of what MAC read for the open page; else O = 0


class RecentState(NamedTuple):
    """The last L tokens with their final hidden states, for recurrent sleep; L = 0 without it."""

    ids: Tensor  # [B, L] int64
    position: Tensor  # [B, L] int64
    hidden: Tensor  # [B, L, D]


class StreamState(NamedTuple):
    blocks: tuple[BlockState, ...]
    position: Tensor  # [B] int64 tokens read since the lane's last reset
    lane: Tensor  # [B] int64 number of the lane, kept by reset (for the reservoir's hash)
    ids: Tensor  # [B, W + C + SPAN] int64, the window's token ids and SPAN before; -1 = none
    nonfinite: Tensor  # [B] int64 rows that were masked since the reset
    recent: RecentState


def closed_memory(memory: MemoryState | None, empty: MemoryState | None) -> MemoryState | None:
    """A memory without its open chunk, which is that of `empty`: the next token begins one."""
    if memory is None:
        return None
    opened = ("k", "v", "gates", "live", "tail")
    return memory._replace(**{name: getattr(empty, name) for name in opened})


def map_state(fn: Callable[..., Tensor], state: Tree, *others: Tree) -> Tree:
    """Apply `fn` to every tensor of `state` (and to its partners in `others`)."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return fn(state, *others)
    parts = [map_state(fn, *row) for row in zip(state, *others, strict=True)]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def named_tensors(state: Tree, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (dotted name, tensor) in a fixed order."""
    if isinstance(state, Tensor):
        yield prefix, state
    elif state is not None:
        names = getattr(state, "_fields", None) or [str(i) for i in range(len(state))]
        for name, part in zip(names, state, strict=True):
            yield from named_tensors(part, f"{prefix}.{name}" if prefix else name)


def flatten(state: Tree) -> dict[str, Tensor]:
    """The tensors of `state` by dotted name, for saving."""
    return dict(named_tensors(state))


def unflatten(like: Tree, tensors: dict[str, Tensor]) -> Tree:
    """Build a tree of the form of `like` from the tensors that `flatten` gave.

    Raises:
        ValueError: names differ from those of `like`.
    """
    names = [name for name, _ in named_tensors(like)]
    if set(names) != set(tensors):
        odd = sorted(set(names) ^ set(tensors))[:3]
        raise ValueError(f"tensors do not fit this state: missing or unknown {odd}")
    order = iter(names)
    return map_state(lambda _: tensors[next(order)], like)


def detach(state: Tree) -> Tree:
    """The same numbers without their history: the gradient stops here."""
    return map_state(Tensor.detach, state)


def select(state: Tree, lanes: Tensor) -> Tree:
    """The lanes with the numbers `lanes` [n] int64, in that order."""
    return map_state(lambda t: t.index_select(0, lanes), state)


def put(state: Tree, lanes: Tensor, part: Tree) -> Tree:
    """The state with the lanes of `part` in the place of those with the numbers `lanes` [n]."""
    return map_state(lambda t, new: t.index_copy(0, lanes, new), state, part)


def merge(lanes: Tensor, new: Tree, old: Tree) -> Tree:
    """Lane b of `new` where `lanes[b]` (bool [B]), of `old` elsewhere."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(lanes.view(-1, *[1] * (a.dim() - 1)), a, b)

    return map_state(pick, new, old)


def to(state: Tree, device: torch.device | str) -> Tree:
    """The state on another device; dtypes stay."""
    return map_state(lambda t: t.to(device), state)


def nbytes(state: Tree) -> int:
    """Bytes of all tensors of the state."""
    return sum(t.numel() * t.element_size() for _, t in named_tensors(state))
