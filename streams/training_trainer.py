"""Lightning's Trainer with the settings of a run."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from wakesleep.streams.bar import on_terminal
from wakesleep.streams.errors import Refused
from wakesleep.streams.training_config import TrainConfig
from wakesleep.streams.training_loggers import open_loggers
from wakesleep.streams.training_progress import StepBar
from wakesleep.streams.training_run import RunFolder

UNUSED = "ddp_find_unused_parameters_true"
# values of trainer.* that training was tried with; None: the key is left out
TRIED = {
    "precision": (None, "32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16", 32, 16),
    "strategy": (None, "auto", "ddp", UNUSED),
    "gradient_clip_algorithm": (None, "norm"),  # ours is by the norm of the whole gradient
}


def make_trainer(config: TrainConfig, folder: RunFolder) -> lightning.Trainer:
    """A quiet Trainer with this run's settings; `config.trainer` wins over all of them.

    Raises:
        Refused: Lightning does not know a key, or its value; it was never tried with this
            training; the package of a logger is missing.
    """
    for key, tried in TRIED.items():
        if (value := config.trainer.get(key)) not in tried:
            remedy = f"Use one of {', '.join(str(name) for name in tried[1:])}."
            raise Refused(f"trainer.{key}={value} does not work here", "", remedy)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    given = dict(config.trainer)
    bar = given.pop("enable_progress_bar", on_terminal() and not folder.quiet)
    callbacks: list[lightning.Callback] = [folder]
    if bar:
        callbacks.append(StepBar(config))
    settings = {
        "max_steps": config.total_steps,
        "max_epochs": -1,
        "accelerator": device,
        "devices": 1,
        "precision": "bf16-mixed" if config.train.bf16 else "32-true",
        "gradient_clip_val": config.optim.clip,
        "logger": open_loggers(config, folder.folder, folder.saved_step, folder.run_id) or False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": bar,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,  # the folder validates by train.validate_every
        "log_every_n_steps": 0,  # loggers get the lines of metrics.csv
        "default_root_dir": str(folder.folder),
    }
    settings |= given
    trainer = _open_trainer(settings, callbacks)
    if trainer.world_size > 1 and settings.get("strategy", "auto") in ("auto", "ddp"):
        # in most steps some weight has no gradient, such as those that admit
        settings["strategy"] = UNUSED
        trainer = _open_trainer(settings, callbacks)
    return trainer


def _open_trainer(
    settings: dict[str, Any], callbacks: list[lightning.Callback]
) -> lightning.Trainer:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return lightning.Trainer(**settings, callbacks=callbacks)
    except (TypeError, ValueError, ImportError, MisconfigurationException) as error:
        raise Refused("Lightning does not take these trainer.* keys", str(error)) from error
