"""Change the window or the store of a state that has already read something.

Growing leaves new places empty. Shrinking evicts once: tokens that no longer fit the window compete
for the store as they would have at a boundary, and of the store's pairs the best stay.

Shapes: B lanes, H heads, W window, C chunk, S places.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wakesleep.kernels.admission import admit_reference
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.state import SPAN, SPAN_AFTER, StoreState, StreamState, WindowState
from wakesleep.ttl.store import candidates, empty_store, put


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
    blocks = []
    for block in state.blocks:
        store = block.store
        if store is not None:
            size = store.position.shape[-1] if capacity is None else capacity
            new = empty_store(store, size)
            store = _compete(new._replace(moments=store.moments), store)
            if window < old:
                store = _compete(store, _leaving(block.window, state, old - window, old, chunk))
        blocks.append(block._replace(window=_resize_window(block.window, window, old), store=store))
    ids = _resize_front(state.ids, window - old, -1) if window != old else state.ids
    return state._replace(blocks=tuple(blocks), ids=ids)


def _compete(store: StoreState, new: StoreState) -> StoreState:
    """The best pairs of both, in the places of `store`."""
    order = new.position.argsort(dim=-1, stable=True)  # candidates come by position

    def sort(t: Tensor) -> Tensor:
        index = order.view(*order.shape, *[1] * (t.dim() - 3))
        return t.gather(2, index.expand(-1, -1, -1, *t.shape[3:]))

    fields = ("k", "v", "score", "mass", "position", "span")
    new = new._replace(**{name: sort(getattr(new, name)) for name in fields})
    chosen = admit_reference(store.score, store.position, new.score, new.position, None)
    placed = {
        name: put(getattr(store, name), getattr(new, name), chosen, inplace=False)
        for name in fields
    }
    return store._replace(**placed)


def _leaving(window: WindowState, state: StreamState, count: int, old: int, chunk: int):
    """The `count` oldest tokens of the window, as candidates for the store."""
    start = state.position // chunk * chunk - old
    position = start[:, None] + torch.arange(count, device=start.device)
    ids = state.ids[:, SPAN_AFTER + 1 :][:, : count + SPAN - 1]
    enters = window.live[:, :count] & (position >= 0)
    first = (t[:, :count] for t in (window.k, window.v, window.score))
    return candidates(*first, enters, position, ids)


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
