"""What a step tells besides its loss: answers by kind, by age and by where their facts are.

Sums are kept since the last line of metrics.csv; they are part of the checkpoint, so that a resumed
run writes the lines of an undisturbed one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from wakesleep.streams.optimizers import NORMS
from wakesleep.streams.training_batch import Answers, Batch
from wakesleep.streams.training_health import HEALTH
from wakesleep.streams.unroll import TokenLoss

DECADES = ("age_1", "age_10", "age_100", "age_1k", "age_10k", "age_100k")
PLACES = ("inside", "outside", "outside_kept", "outside_selected")
TAUGHT = ("loss_blind", "loss_admission", "precision", "recall", "needed", "noise_above")
LOSSES = ("loss", "loss_answers", "loss_rest", "bits_per_byte", "bits_per_byte_far")
SKIPPED = ("nonfinite_rows",)  # of a validation batch; in training one of them stops the run
FACTS = ("noise_above_facts", "facts_kept")


class Means(Metric):
    """Weighted means by name since the last `take`, over all processes of a run."""

    full_state_update = False

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.rows = {name: row for row, name in enumerate(names)}
        self.add_state("sums", torch.zeros(len(self.rows)), dist_reduce_fx="sum")
        self.add_state("weights", torch.zeros(len(self.rows)), dist_reduce_fx="sum")

    def update(self, name: str, value: float, weight: float = 1.0) -> None:
        """Count a value."""
        self.sums[self.rows[name]] += float(value) * weight
        self.weights[self.rows[name]] += weight

    def compute(self) -> dict[str, float]:
        """The means of what was counted."""
        sums, weights = self.sums.tolist(), self.weights.tolist()
        return {name: sums[row] / weights[row] for name, row in self.rows.items() if weights[row]}

    def take(self) -> dict[str, float]:
        """The means so far; start again."""
        means = self.compute() if self.update_called else {}
        self.reset()
        return means


def measured(kinds: Iterable[str]) -> list[str]:
    """Names of what a step and a validation count alike."""
    answers = ["answers", *PLACES, *DECADES, "nothing", "stale", *(f"kind_{k}" for k in kinds)]
    return [*LOSSES, *FACTS, *answers]


def counted(kinds: Iterable[str]) -> list[str]:
    """Names of all that a step counts."""
    return ["grad_norm", *NORMS, *HEALTH, *TAUGHT, *measured(kinds)]


def add_losses(
    means: Means, batch: Batch, tokens: TokenLoss, token_bytes: Tensor | None, reach: int
) -> None:
    """Count the losses of a step; those of single tokens, but for answers, also in bits per byte.

    Args:
        token_bytes: [V] UTF-8 bytes of every token; None where ids stand for no text.
        reach: tokens; what was read longer ago has left the window.
    """
    asked = batch.asked > 0
    rest = (batch.weight > 0) & ~asked
    means.update("loss", float(tokens.loss.detach()))
    if num_asked := int(asked.sum()):
        means.update("loss_answers", float(tokens.nats[asked].mean()), num_asked)
    if num_rest := int(rest.sum()):
        means.update("loss_rest", float(tokens.nats[rest].mean()), num_rest)
    if bool(tokens.blind.isfinite()):
        means.update("loss_blind", float(tokens.blind))
    if token_bytes is None:
        return
    lengths = token_bytes[batch.targets]
    far = rest & (batch.repeat > reach)
    for name, group in (("bits_per_byte", rest), ("bits_per_byte_far", far)):
        if num_bytes := int(lengths[group].sum()):
            bits = float(tokens.nats[group].double().sum()) / math.log(2)
            means.update(name, bits / num_bytes, num_bytes)


def add_answers(
    means: Means,
    batch: Batch,
    right: Tensor,
    stale: Tensor,
    kinds: tuple[str, ...],
    reach: int,
    keep_all: bool,
) -> None:
    """Count the answers of a batch that are right in all their tokens.

    Args:
        right: [B, T] bool, the likeliest next token is the target.
        stale: [B, T] bool, it is the first one of the value before.
        reach: an answer to a fact of at most this age may have come from the window.
        keep_all: the store evicted nothing in this step.
    """
    answers = Answers(*(part.cpu().numpy() for part in batch.answers))
    if not len(answers.lane):
        return
    count = np.pad(right.cpu().numpy().cumsum(1), ((0, 0), (1, 0)))
    hit = count[answers.lane, answers.stop] - count[answers.lane, answers.start]
    hit = hit == answers.stop - answers.start
    fact = answers.age >= 0
    outside = fact & (answers.age > reach)
    groups = {
        "answers": np.ones_like(fact),
        "inside": fact & ~outside,
        "outside": outside,
        "outside_kept" if keep_all else "outside_selected": outside,
        "nothing": ~fact,
    }
    decade = np.log10(np.maximum(answers.age, 1)).astype(np.int64)
    for number, name in enumerate(DECADES):
        groups[name] = fact & (np.minimum(decade, len(DECADES) - 1) == number)
    for number, name in enumerate(kinds):
        groups[f"kind_{name}"] = answers.kind == number
    for name, members in groups.items():
        if members.any():
            means.update(name, hit[members].mean(), int(members.sum()))
    changed = (batch.stale >= 0).cpu()
    if changed.any():
        means.update("stale", float(stale.cpu()[changed].float().mean()), int(changed.sum()))


def line(step: int, total: int, row: dict[str, float], seconds_left: float) -> str:
    """One line for people."""
    parts = [f"step {step:,}/{total:,}", f"loss {row.get('loss', math.nan):.3f}"]
    for name in (
        "answers",
        "outside_kept",
        "outside_selected",
        "noise_above_facts",
        "facts_kept",
        "val_answers",
        "val_bits_per_byte",
    ):
        if name in row:
            parts.append(f"{name.replace('_', ' ')} {row[name]:.3f}")
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    minutes = seconds_left / 60
    parts.append(f"{minutes / 60:.1f} h left" if minutes >= 100 else f"{minutes:.1f} min left")
    return "  ".join(parts)
