"""The optimiser of a run: which rule moves which weights, and how fast.

Matrices of linear maps are moved by AdamW or by Muon; embeddings, gains, taps, gates, biases and
the initial weights of memories always by AdamW and without decay: a gate or an initial memory that
shrinks towards zero would be a memory that is switched off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wakesleep.streams.errors import Refused
from wakesleep.streams.training_config import OptimConfig

PARTS = ("embedding", "attention", "memory", "store", "mlp", "norm")  # whose gradients are watched
NORMS = tuple(f"grad_norm_{part}" for part in PARTS)
PER_HEAD = ("memory.gates", "fast.gates", "store.head.2")


class Joined(torch.optim.Optimizer):
    """Several optimisers as one: they share its groups and its state, so that it is saved whole."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        """Let each part move its own weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[first:last]
            first = last


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """One that moves every weight of `model`; its first group are the matrices.

    Raises:
        Refused: this torch has no Muon.
    """
    matrices = list(matrix_parameters(model))
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    first = {"params": matrices, "lr": optim.lr, "weight_decay": optim.weight_decay}
    second = {"params": rest, "lr": optim.lr_rest, "weight_decay": 0.0}
    match optim.rule:
        case "adamw":
            return torch.optim.AdamW([first, second], betas=optim.betas, fused=True)
        case "muon":
            if not hasattr(torch.optim, "Muon"):
                raise Refused(
                    "optim.rule=muon needs torch 2.9 or newer", "", "use optim.rule=adamw"
                )
            # scaled to the step that AdamW would make: one learning rate serves both
            muon = torch.optim.Muon([first], adjust_lr_fn="match_rms_adamw")
            return Joined([muon, torch.optim.AdamW([second], betas=optim.betas, fused=True)])


def matrix_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights of linear maps, but for those that give one number per head."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(PER_HEAD):
            yield module.weight


def part_norms(model: nn.Module) -> dict[str, float]:
    """Norm of the gradient of each part of the model."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients.setdefault(part_of(name), []).append(parameter.grad)
    return {part: float(nn.utils.get_total_norm(found)) for part, found in gradients.items()}


def part_of(name: str) -> str:
    """The part of PARTS that a weight belongs to; a store within an attention is the store."""
    words = set(name.split("."))
    for part in ("store", "memory", "attention", "embedding"):
        if part in words:
            return part
    return "mlp" if words & {"mlp_in", "mlp_out"} else "norm"
