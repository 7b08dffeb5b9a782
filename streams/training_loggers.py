"""Where else the lines of metrics.csv go: a file of W&B or TensorBoard in the run's folder.

Nothing is sent anywhere: W&B runs offline, and `wandb sync` sends what it wrote. It has one run for
each call, all in the group of the folder's name; TensorBoard shows one curve.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from wakesleep.streams.errors import Refused
from wakesleep.streams.training_config import TrainConfig


def open_loggers(config: TrainConfig, folder: Path, saved_step: Callable[[], int]) -> list[Logger]:
    """The loggers that `config.logger` names; none of them writes before it is used.

    Args:
        saved_step: of the checkpoint that the run goes on from; what came after it comes again.

    Raises:
        Refused: the package is not installed.
    """
    name = config.logger
    if name != "csv" and find_spec(name) is None:
        raise Refused(f"logger={name}: {name} is not installed", "", f"pip install {name}")
    match name:
        case "csv":  # metrics.csv is written in any case
            return []
        case "wandb":
            group = folder.resolve().name
            return [WandbLogger(save_dir=folder, project="wakesleep", group=group, offline=True)]
        case "tensorboard":
            keys = {"name": "tensorboard", "version": "", "default_hp_metric": False}
            step = saved_step()
            return [TensorBoardLogger(folder, **keys, purge_step=step + 1 if step else None)]
