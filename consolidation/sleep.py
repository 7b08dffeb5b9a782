"""One sleep by whatever rule: paid from the budget unit by unit, judged, taken or put back.

state, ledger, report = sleep(model, state, SleepConfig(rule="replay"), ledger, generator)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from wakesleep.consolidation.budget import Ledger
from wakesleep.consolidation.night import Night, SleepReport
from wakesleep.consolidation.passes_sleep import PassesNight, check_passes
from wakesleep.consolidation.replay import room
from wakesleep.consolidation.replay_sleep import ReplayNight, replay_layers
from wakesleep.consolidation.sleep_config import SleepConfig
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.state import StreamState


def sleep(
    model: TTLModel,
    state: StreamState,
    config: SleepConfig,
    ledger: Ledger,
    generator: torch.Generator,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[StreamState, Ledger, SleepReport]:
    """Sleep once; `state` is not changed, the next one is returned.

    Args:
        ledger: what was spent so far; `config.bucket` says what may be.
        generator: of the cues; on the CPU.
        stop: asked between units; the sleep ends there, and what it did is judged.

    Raises:
        ValueError: the model cannot sleep by this rule.
    """
    with torch.inference_mode():
        night = _night(model, state, config, ledger, generator)
        return night.finish(night.run(stop))


def check_model(model: TTLModel, config: SleepConfig) -> None:
    """Refuse a rule that a model cannot sleep by.

    Raises:
        ValueError: why it cannot.
    """
    match config.rule:
        case "replay":
            replay_layers(model.config)
        case "recurrent" | "cross":
            check_passes(model.config, config)


def least_cost(model: TTLModel, state: StreamState, config: SleepConfig) -> int:
    """FLOPs below which a sleep would not begin."""
    with torch.inference_mode():
        return _night(model, state, config, Ledger(), torch.Generator()).least


def pressure(model: TTLModel, state: StreamState, config: SleepConfig) -> float:
    """Share of the places that sleep could make free which hold a pair that is worth it.

    What is worth less may be overwritten at any time. A pair that the fast weights know counts as
    well: the next sleep makes its place free. A head that sleep can do nothing for counts as empty.
    """
    held = places = 0
    for block, module in zip(state.blocks, model.blocks, strict=True):
        store, fast = block.store, block.fast
        if store is not None and fast.asleep.numel():
            space = module.attention.fast.space
            heads = slice(None) if space is None else space.answers.nonzero()[:, 0]
            worthy = (store.position >= 0) & (store.score >= config.worth)
            marked = worthy & (fast.asleep == store.position)
            more = room(store, fast, config.worth)
            count = torch.where(marked.any(-1) | (more > 0), worthy.sum(-1), 0)
            held, places = held + int(count[:, heads].sum()), places + worthy[:, heads].numel()
    return held / places if places else 0.0


def _night(model, state, config: SleepConfig, ledger: Ledger, generator) -> Night:
    match config.rule:
        case "replay":
            return ReplayNight(model, state, config, ledger, generator)
        case "recurrent" | "cross":
            return PassesNight(model, state, config, ledger, generator)
    raise ValueError("with sleep.rule=none nothing sleeps")
