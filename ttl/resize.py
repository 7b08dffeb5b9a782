"""Change or empty the window, or change the store, of a state that has already read something.

Growing leaves new places empty. Shrinking evicts once: tokens that no longer fit the window compete
for the store as they would have at a boundary, and of the store's pairs the best stay.

Shapes: B lanes, H heads, W window, C chunk, S places.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wakesleep.kernels.admission import admit_reference, bin_span
from wakesleep.ttl.fast import follow
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.state import (
    SPAN,
    SPAN_AFTER,
    BlockState,
    StoreState,
    StreamState,
    WindowState,
)
from wakesleep.ttl.store import candidates, empty_store
from wakesleep.ttl.store_reader import exchange, put


def resize_state(
    model: TTLModel, state: StreamState, *, window: int | None = None, capacity: int | None = None
) -> StreamState:
    """The same lanes with another window W (a multiple of the chunk) or store capacity S.

    Raises:
        ValueError: a size is not legal for this model.
    """
    chunk = model.config.chunk
    old = model.window_of(state)
    window = old if window is None else window
    if window < chunk or window % chunk:
        raise ValueError(f"window must be a positive multiple of chunk {chunk}, got {window}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"store.capacity must be at least 1, got {capacity}")
    end = state.position // chunk * chunk  # the last boundary
    span = bin_span(end, chunk) if model.config.store.quota else None
    blocks = []
    for block in state.blocks:
        if block.store is not None:
            leaving = None if window >= old else _leaving(block.window, state.ids, end, old, window)
            size = block.store.position.shape[-1] if capacity is None else capacity
            block = _with_store(block, size, leaving, span)
        blocks.append(block._replace(window=_resize_window(block.window, window, old)))
    ids = _resize_front(state.ids, window - old, -1)
    return state._replace(blocks=tuple(blocks), ids=ids)


def clear_window(model: TTLModel, state: StreamState) -> StreamState:
    """Empty the windows (hard eviction): their tokens compete for the store, and are then gone.

    The window's convolutions begin anew, too: what they keep of the last tokens are features, which
    know of all tokens before.

    Raises:
        ValueError: a lane is inside a chunk.
    """
    chunk, window = model.config.chunk, model.window_of(state)
    if bool((state.position % chunk).any()):
        raise ValueError("a window is emptied at a boundary of chunks")
    span = bin_span(state.position, chunk) if model.config.store.quota else None
    blocks = []
    for block in state.blocks:
        if block.store is not None:
            leaving = _leaving(block.window, state.ids, state.position, window, 0)
            block = _with_store(block, block.store.position.shape[-1], leaving, span)
        empty = WindowState(*(torch.zeros_like(t) for t in block.window))
        blocks.append(block._replace(window=empty))
    return state._replace(blocks=tuple(blocks))


def _with_store(
    block: BlockState, size: int, leaving: StoreState | None, span: Tensor | None
) -> BlockState:
    """The block with a store of `size` places, and what is known to sleep in it."""
    store, fast = _resize_store(block.store, size, leaving, span), block.fast
    if fast.s.shape[1]:
        fast = fast._replace(asleep=follow(fast.asleep, store.position))
    return block._replace(store=store, fast=fast)


def _resize_store(
    store: StoreState, size: int, leaving: StoreState | None, span: Tensor | None
) -> StoreState:
    """The best of the store and of what leaves the window, in `size` places.

    Where all pairs stay they keep their places, so that reads stay the same to the last bit.
    """
    spare = size - store.position.shape[-1]
    if leaving is None and spare >= 0:
        return _append(store, empty_store(store, spare)) if spare else store
    pool = store if leaving is None else _append(store, leaving)
    order = pool.position.argsort(dim=-1, stable=True)  # candidates come by position

    def sort(t: Tensor) -> Tensor:
        return t.gather(2, order.view(*order.shape, *[1] * (t.dim() - 3)).expand_as(t))

    pool = pool._replace(**{name: sort(t) for name, t in _places(pool)})
    new = empty_store(store, size)
    chosen = admit_reference(new.score, new.position, pool.score, pool.position, span)
    rows = exchange(chosen, size, pool.position.shape[-1])
    return new._replace(**{name: put(t, getattr(pool, name), rows) for name, t in _places(new)})


def _places(store: StoreState) -> list[tuple[str, Tensor]]:
    """The fields that have places, [B, H, S, ...]."""
    return [(name, t) for name, t in store._asdict().items() if name != "moments"]


def _append(store: StoreState, more: StoreState) -> StoreState:
    return store._replace(
        **{name: torch.cat([t, getattr(more, name)], 2) for name, t in _places(store)}
    )


def _leaving(window: WindowState, ids: Tensor, end: Tensor, old: int, new: int) -> StoreState:
    """The oldest tokens of a window that shrinks at the boundary `end`, as candidates."""
    count = old - new
    position = end[:, None] - old + torch.arange(count, device=end.device)
    # ids of the spans, none from the open chunk: not all of it has been read
    known = ids[:, SPAN_AFTER + 1 : SPAN + old]
    known = nn.functional.pad(known, (0, count + SPAN), value=-1)[:, : count + SPAN - 1]
    enters = window.live[:, :count]
    first = (t[:, :count] for t in (window.k, window.v, window.score))
    return candidates(*first, enters, position, known)


def _resize_window(window: WindowState, new: int, old: int) -> WindowState:
    if new == old:
        return window
    parts = (_resize_front(t, new - old, 0) for t in window[:4])
    return WindowState(*parts, tail=window.tail)


def _resize_front(t: Tensor, grow: int, empty: int) -> Tensor:
    """Add `grow` empty slots in front of dimension 1 of t, or take -grow away."""
    if grow < 0:
        return t[:, -grow:]
    return nn.functional.pad(t, (0, 0) * (t.dim() - 2) + (grow, 0), value=empty)
