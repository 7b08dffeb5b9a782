"""Signs of life of the parts of a model: gates, surprise, norms, fill and age."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wakesleep.ttl.memory import NeuralMemory
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.state import StreamState

if TYPE_CHECKING:
    from wakesleep.streams.training_metrics import Means

GATES = ("output", "keep", "step", "momentum")  # in the order of `NeuralMemory.gates`
HEALTH = (
    *(f"gate_{name}" for name in GATES),
    "surprise_p50",  # quantiles over the tokens of a step
    "surprise_p95",
    "memory_norm",  # of a head's fast weights, as far as they were learned; mean over the heads
    "store_fill",  # share of the places
    "store_age",  # tokens since a stored pair was read, mean
)


class GateMeans:
    """Means of all gates since `start`, over layers, heads and tokens."""

    def __init__(self, model: TTLModel) -> None:
        self.seen: dict[str, list[Tensor]] = {}
        for module in model.modules():
            if isinstance(module, NeuralMemory):
                module.gates.register_forward_hook(self._hook(module))

    def start(self) -> None:
        """Forget what was seen: a validation, or what a backward pass computed again."""
        self.seen.clear()

    def add_to(self, means: Means) -> None:
        """Hand over what was seen."""
        for name, values in self.seen.items():
            means.update(f"gate_{name}", float(torch.stack(values).mean()))

    def _hook(self, memory: NeuralMemory):
        heads, top = memory.num_heads, memory.config.max_momentum

        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            gates = output.detach().float().sigmoid().unflatten(-1, (-1, heads))
            averages = gates.flatten(0, 1).mean((0, 2))
            for name, value in zip(GATES, averages, strict=False):  # a memory may lack the last
                value = value * top if name == "momentum" else value
                self.seen.setdefault(name, []).append(value)

        return hook


def add_health(means: Means, state: StreamState, surprise: Tensor) -> None:
    """Count a step's surprise [B, T], and the memories and stores of the state behind it."""
    memories = [block.memory for block in state.blocks if block.memory is not None]
    if memories and surprise.numel():
        levels = torch.tensor([0.5, 0.95], device=surprise.device)
        low, high = surprise.detach().flatten().quantile(levels)
        means.update("surprise_p50", float(low))
        means.update("surprise_p95", float(high))
        norms = [w.detach().flatten(2).norm(dim=2) for m in memories for w in m.weights]
        means.update("memory_norm", float(torch.stack([norm.mean() for norm in norms]).mean()))
    stores = [block.store for block in state.blocks if block.store is not None]
    if not stores:
        return
    filled = [store.position >= 0 for store in stores]
    means.update("store_fill", float(torch.stack([f.float().mean() for f in filled]).mean()))
    ages = [state.position[:, None, None] - store.position for store in stores]
    held = torch.cat([age[f] for age, f in zip(ages, filled, strict=True)])
    if held.numel():
        means.update("store_age", float(held.float().mean()))
