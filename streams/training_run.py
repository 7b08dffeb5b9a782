"""The folder of a training run: settings, metrics, checkpoints, model folders, and how it ends.

    config.yaml  run.json  metrics.csv  checkpoints/last.ckpt  last/  best/

Every file is replaced as a whole, so a run may be killed at any moment. What the checkpoint does
not know of is undone on resume: metrics.csv is cut back to its step.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import secrets
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning
from torch import nn

from wakesleep.streams.config import flat, load_config, to_yaml
from wakesleep.streams.errors import Refused
from wakesleep.streams.optimizers import make_optimizer
from wakesleep.streams.stopping import Stopped, StopSignals
from wakesleep.streams.training_config import TrainConfig
from wakesleep.streams.training_data import (
    StreamDataModule,
    answer_kinds,
    data_key,
    open_tokenizer,
    text_tokenizer,
)
from wakesleep.streams.training_metrics import SKIPPED, counted, line, measured
from wakesleep.streams.training_resume import (
    compare_settings,
    read_checkpoint,
    read_lines,
    read_record,
    unusable,
)
from wakesleep.ttl.files import write_atomically
from wakesleep.ttl.flops import token_flops
from wakesleep.ttl.model_io import model_sha256, save_model

COLUMNS = ("step", "tokens", "seconds", "tokens_per_second", "flops_per_second", "lr")
TRAINING_FLOPS = 3  # forward and backward pass, of a forward pass; nothing computed again
REMEDY = "Choose another --output."
SAVE_SECONDS = 300.0  # between checkpoints where no number of steps is given


class RunFolder(lightning.Callback):
    """Writes what a run leaves behind, every so many steps, and obeys signals."""

    def __init__(
        self, config: TrainConfig, folder: Path, data: StreamDataModule, quiet: bool = False
    ) -> None:
        self.config, self.folder, self.validation, self.quiet = (
            config,
            folder,
            data.validation,
            quiet,
        )
        self._data = [[data_key(config), data.source.fingerprint]]
        if data.validation is not None:
            held_out = data_key(config, validation=True)
            self._data.append([held_out, data.validation.fingerprint])
        self._tokenizer = open_tokenizer(config).json
        self.best: float | None = None  # lowest val_loss so far
        self.seconds = 0.0  # of training in all calls, up to the last line
        self.signals = StopSignals()
        self._step = 0  # last one that was seen
        self._mark = (0.0, 0, 0)  # clock, step and tokens of the last line
        self._saved = (0.0, 0)  # clock and step of the last checkpoint
        kinds = answer_kinds(config)
        validated = [f"val_{name}" for name in (*measured(kinds), *SKIPPED)]
        self._columns = [*COLUMNS, *counted(kinds), *validated]
        self._flops = TRAINING_FLOPS * token_flops(config.model)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    @functools.cached_property
    def run_id(self) -> str:
        """Names the run to W&B, whatever folder and machine it goes on in."""
        return self._record().get("run_id") or secrets.token_hex(4)

    def saved_step(self) -> int:
        """Steps that the checkpoint has behind it, 0 where there is none."""
        return read_checkpoint(self.checkpoint)["global_step"] if self.checkpoint.exists() else 0

    def check(self, module: lightning.LightningModule, resume: bool) -> None:
        """See whether the folder can be made or taken up.

        Raises:
            Refused: it holds a run and `resume` is false, or a run with other settings, or a file
                of it is damaged.
        """
        _check_writable(self.folder)
        saved = self.folder / "config.yaml"
        if saved.exists() or self.checkpoint.exists():
            if not resume:
                remedy = "Go on with it by --resume, or choose another --output."
                raise Refused(f"{self.folder} holds a run", "", remedy)
            if saved.exists():
                compare_settings(load_config(TrainConfig, saved)[0], self.config, self.folder)
        self._record()
        read_lines(self.folder / "metrics.csv")
        if self.checkpoint.exists():
            self._try_checkpoint(module)

    def open(self, *, write: bool = True) -> Path | None:
        """Make or take up the folder; return the checkpoint to go on from, None at the start."""
        if write:
            try:
                self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise Refused(f"{self.folder} cannot be made", str(error), REMEDY) from error
            write_atomically(self.folder / "config.yaml", to_yaml(self.config).encode())
        return self.checkpoint if self.checkpoint.exists() else None

    def close(self, model: nn.Module, step: int) -> dict[str, Any]:
        """Say what the run left; a run that was killed between two files is made whole first."""
        self._save_model("last", model, step)
        sha256 = model_sha256(self.folder / "last")
        ending = {"output": str(self.folder), "steps": step, "model_sha256": sha256}
        return {**ending, "reads_text": text_tokenizer(self.config) is not None, **self._record()}

    def state_dict(self) -> dict[str, Any]:
        since = time.monotonic() - self._mark[0]  # the last line
        return {"best": self.best, "seconds": self.seconds + since, "data": self._data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.seconds = state["best"], state["seconds"]

    def on_train_start(self, trainer, module) -> None:
        self._step = step = trainer.global_step
        self._saved = (time.monotonic(), step)
        self._mark = (*self._saved, self.config.tokens_before(module.cursor))
        self.signals.take_over()  # Lightning has put up its own
        if not trainer.is_global_zero:
            return
        resumed = [*self._record()["resumed_at"], step] if step else []
        record = json.dumps({"run_id": self.run_id, "resumed_at": resumed})
        write_atomically(self.folder / "run.json", record.encode() + b"\n")
        behind = not module.means.weights.any()  # was the checkpoint made behind its line?
        self._cut_metrics(step if behind else step - 1)
        if step:
            where = f"{self.folder}: going on at step {step:,} of {self.config.total_steps:,}"
            self._say(module, f"{where}; Ctrl-C saves and stops")
        settings = {name: str(value) for name, value in flat(self.config).items()}
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step, train = trainer.global_step, self.config.train
        if step == self._step:
            return  # gradients are still being accumulated
        self._step = step
        last = step >= self.config.total_steps
        validate = self.validation is not None and (last or step % train.validate_every == 0)
        if last or validate or step % train.log_every == 0:
            self._report(trainer, module, validate)
        stop = module.ranks.any(bool(self.signals), module.device)
        if last or stop or self._due(step, module):
            self._save(trainer, module)
        if stop:
            raise Stopped(self.signals.number or signal.SIGTERM)

    def on_train_end(self, trainer, module) -> None:
        """Keep what was trained where Lightning ends a run early: max_time, max_epochs and such."""
        if self._step != self._saved[1]:
            self._save(trainer, module)  # first: a resumed run writes the lines of a whole one
            self._report(trainer, module, validate=False)

    def _say(self, module, text: str) -> None:
        if not self.quiet:
            module.print(text, file=sys.stderr)

    def _due(self, step: int, module) -> bool:
        if self.config.train.save_every is None:
            late = time.monotonic() - self._saved[0] >= SAVE_SECONDS
            return module.ranks.any(late, module.device)
        return step % self.config.train.save_every == 0

    def _report(self, trainer, module, validate: bool) -> None:
        """Add a line to metrics.csv and say it; keep the model if it is the best so far."""
        step, (clock, before, read) = self._step, self._mark
        tokens = self.config.tokens_before(module.cursor)
        lasted = time.monotonic() - clock
        self.seconds += lasted
        row, sample = module.means.take(), None
        speed = (tokens - read) / max(lasted, 1e-9)
        row |= {
            "step": step,
            "tokens": tokens,
            "seconds": self.seconds,
            "tokens_per_second": speed,
            "flops_per_second": speed * self._flops,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
        }
        if validate:
            with trainer.precision_plugin.forward_context():
                found, sample = module.evaluate(
                    self.validation, self.config.train.validation_batches
                )
            row |= {f"val_{name}": value for name, value in found.items()}
            loss = row["val_loss"]
            if math.isfinite(loss) and (self.best is None or loss < self.best):
                self.best = loss
                if trainer.is_global_zero:
                    self._save_model("best", module.model, step)
        self._mark = (time.monotonic(), step, tokens)
        if not trainer.is_global_zero:
            return
        with open(self.folder / "metrics.csv", "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns, extrasaction="ignore").writerow(row)
        for logger in trainer.loggers:
            logger.log_metrics({name: row[name] for name in self._columns if name in row}, step)
        total = self.config.total_steps
        left = lasted / max(1, step - before) * (total - step)
        self._say(module, line(step, total, row, left))
        if sample is not None:
            self._say(module, f"  {sample}")

    def _save(self, trainer, module) -> None:
        """Replace the checkpoint, then the model folder `last`."""
        scratch = self.checkpoint.with_name(".last.ckpt.new")
        trainer.save_checkpoint(scratch)  # by all processes; the first one writes
        self._saved = (time.monotonic(), self._step)
        if not trainer.is_global_zero:
            return
        with open(scratch, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(scratch, self.checkpoint)
        self._save_model("last", module.model, self._step)

    def _save_model(self, name: str, model: nn.Module, step: int) -> None:
        save_model(self.folder / name, model, self._tokenizer, self._card(name, step))

    def _card(self, name: str, step: int) -> str:
        data = self.config.data.kind
        return (
            f"# {self.folder.name}: {name}\n\n"
            f"Trained by `wakesleep train` on data.kind={data} for {step:,} steps.\n"
            "All settings:\n\n```yaml\n" + to_yaml(self.config) + "```\n"
        )

    def _try_checkpoint(self, module) -> None:
        """Take it up as Lightning will, once more, when training starts."""
        saved = read_checkpoint(self.checkpoint)
        try:
            module.on_load_checkpoint(saved)
            module.load_state_dict(saved["state_dict"])
            optimizer = make_optimizer(module.model, self.config.optim)
            optimizer.load_state_dict(saved["optimizer_states"][0])
            self.load_state_dict(saved["callbacks"][self.state_key])
        except Refused as error:
            raise unusable(self.checkpoint, str(error)) from error
        except Exception as error:  # of a file with the right parts, anything may be wrong in them
            raise unusable(self.checkpoint, f"{type(error).__name__} in it") from error
        for key, before in saved["callbacks"][self.state_key].get("data", []):
            if [key, before] not in self._data:
                remedy = "Put them back, or choose another --output."
                raise Refused(f"{key} holds other texts than in the run", str(self.folder), remedy)

    def _record(self) -> dict[str, Any]:
        return read_record(self.folder / "run.json")

    def _cut_metrics(self, step: int) -> None:
        """Keep the lines up to `step`; what came after the checkpoint will come again."""
        path = self.folder / "metrics.csv"
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row for row in read_lines(path) if int(row["step"]) <= step)
        write_atomically(path, text.getvalue().encode())


def _check_writable(folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise Refused(f"{folder}: {there} is no folder", "", REMEDY)
    if not os.access(there, os.W_OK | os.X_OK):
        raise Refused(f"{folder} cannot be written", "", REMEDY)
