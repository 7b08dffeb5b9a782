"""What sleep did to the prediction of what was read last, the last question of the gate.

Shapes: B lanes, W window, C chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cross_entropy

from wakesleep.ttl.fast import open_keys
from wakesleep.ttl.flops import wake_flops
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.state import SPAN, StreamState, closed_memory


def tail_nats(model: TTLModel, state: StreamState) -> Tensor | None:
    """Nats [B, W - 1] of the window's tokens, read once more from an empty window.

    Store, memory and fast weights are those of `state`, which is not changed. The memory has
    learned these tokens already, so only the difference of two states means something. None as long
    as some lane's window is not full.
    """
    window, C = model.window_of(state), model.config.chunk
    boundary = state.position // C * C
    if int(boundary.min()) < window:
        return None
    ids = state.ids[:, SPAN : SPAN + window]
    fresh = model.init_state(state.position.shape[0], window=window, capacity=1)
    blocks = tuple(
        block._replace(
            window=empty.window, memory=closed_memory(block.memory, empty.memory), page=empty.page
        )
        for block, empty in zip(state.blocks, fresh.blocks, strict=True)
    )
    begin = state._replace(
        blocks=blocks, position=boundary - window, ids=fresh.ids, recent=fresh.recent
    )
    logits = model(ids, begin)[0][:, :-1].float()
    return cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def tail_flops(model: TTLModel, state: StreamState, held: Sequence[int] | None = None) -> int:
    """What `tail_nats` costs, all lanes together.

    Args:
        held: keys of an MLP that the softmax sees, in each layer of fast weights; None = the
            state's.
    """
    window, C = model.window_of(state), model.config.chunk
    if held is None:
        held = [open_keys(state.blocks[layer].fast) for layer in model.config.fast_layers]
    stores = [block.store for block in state.blocks if block.store is not None]
    capacity = stores[0].position.shape[-1] if stores else None
    sizes = {"window": window, "capacity": capacity, "held": held}
    starts = (state.position // C * C - window).tolist()
    return sum(wake_flops(model.config, at, window, **sizes) for at in starts if at >= 0)
