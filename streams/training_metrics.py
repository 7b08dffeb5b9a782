"""What a step tells besides its loss: answers by kind, by age and by where their facts are.

Sums are kept since the last line of metrics.csv; they are part of the checkpoint, so that a resumed
run writes the lines of an undisturbed one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from torch import Tensor

from wakesleep.streams.ranks import Ranks
from wakesleep.streams.training_batch import Answers, Batch

DECADES = ("age_1", "age_10", "age_100", "age_1k", "age_10k", "age_100k")
PLACES = ("inside", "outside", "outside_kept", "outside_selected")
TAUGHT = ("loss_blind", "loss_admission", "precision", "recall", "needed", "noise_above")
MEASURED = ("loss", "loss_answers", "loss_rest", "noise_above_facts", "facts_kept")


class Means:
    """Weighted means by name since the last `take`."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}  # name: [sum, weight]

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        cell = self.sums.setdefault(name, [0.0, 0.0])
        cell[0] += float(value) * weight
        cell[1] += weight

    def merge(self, ranks: Ranks) -> Means:
        """What all ranks counted."""
        merged = Means()
        for sums in ranks.objects(self.sums):
            for name, (total, weight) in sums.items():
                cell = merged.sums.setdefault(name, [0.0, 0.0])
                cell[0] += total
                cell[1] += weight
        return merged

    def take(self) -> dict[str, float]:
        """The means so far; start again."""
        means = {name: total / weight for name, (total, weight) in self.sums.items() if weight}
        self.sums = {}
        return means


def answer_columns(kinds: Iterable[str]) -> list[str]:
    """Names of all values that `add_answers` may add."""
    return ["answers", *PLACES, *DECADES, "nothing", "stale", *(f"kind_{kind}" for kind in kinds)]


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
            means.add(name, hit[members].mean(), int(members.sum()))
    changed = (batch.stale >= 0).cpu()
    if changed.any():
        means.add("stale", float(stale.cpu()[changed].float().mean()), int(changed.sum()))


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
    ):
        if name in row:
            parts.append(f"{name.replace('_', ' ')} {row[name]:.3f}")
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    minutes = seconds_left / 60
    parts.append(f"{minutes / 60:.1f} h left" if minutes >= 100 else f"{minutes:.1f} min left")
    return "  ".join(parts)
