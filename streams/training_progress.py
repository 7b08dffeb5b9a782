"""What people see while a model is trained: a bar on a terminal."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.callbacks import ProgressBar

from wakesleep.streams.bar import Bar
from wakesleep.streams.quantities import duration
from wakesleep.streams.training_config import TrainConfig


class StepBar(ProgressBar):
    """Show step, loss, tokens per second and the time left; lines that are printed go above."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self._total = config.total_steps
        self._tokens = config.tokens_before(config.accumulate)  # of a step
        self._bar: Bar | None = Bar(self._total)

    @property
    def is_enabled(self) -> bool:
        return self._bar is not None

    def disable(self) -> None:
        self._bar = None

    def enable(self) -> None:
        self._bar = Bar(self._total)

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._bar:
            self._bar.print(" ".join(map(str, args)))

    def on_train_start(self, trainer, pl_module) -> None:
        if self._bar:
            self._show(trainer)
            self._bar.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self._bar:
            self._show(trainer)

    def on_train_end(self, trainer, pl_module) -> None:
        self._stop()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()

    def _show(self, trainer) -> None:
        step, speed = trainer.global_step, self._bar.speed
        place = [f"step {step:,} of {self._total:,}"]
        loss = self.trainer.progress_bar_metrics.get("loss", math.nan)
        figures = [f"loss {loss:.3f}"] if math.isfinite(loss) else []
        if speed:
            place.append(f"{duration((self._total - step) / speed)} left")
            figures.append(f"{speed * self._tokens:,.0f} tokens/s")
        self._bar.move(step, ", ".join(place), "  ".join(figures))
