"""What a call within one chunk leaves ready for the next one, which would make it anew.

Between two boundaries nothing moves: store and fast weights stay, and the window's keys keep their
slots. Token by token, most of a call's time would go into turning the same keys once more.

    logits, state, stats = model(token, state, ready=stats.ready)

It follows from the state alone, is no part of it and is never saved. It counts for the very state
that it came with; with any other one everything is made anew, to the same bits.

Shapes: B lanes, H heads, K head width, R rotary dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from wakesleep.ttl.fast import Told
from wakesleep.ttl.state import StreamState
from wakesleep.ttl.store_reader import BufferReader


class LayerReady(NamedTuple):
    turns: Tensor  # [distances, 2, R // 2] rotations
    window: Tensor | None  # [B, H, slots, R + K] turned keys; None = a boundary has moved the slots
    reader: BufferReader | None  # of the store
    told: Told | None  # what an MLP holds


class Ready(NamedTuple):
    state: StreamState  # that it was made of
    layers: tuple[LayerReady | None, ...]

    def for_state(self, state: StreamState) -> tuple[LayerReady | None, ...]:
        """What counts for the layers of a state."""
        return self.layers if state is self.state else (None,) * len(state.blocks)
