"""Where else the lines of metrics.csv go: a file of W&B or TensorBoard in the run's folder.

Nothing is sent anywhere: W&B runs offline, and `wandb sync --append` sends what it wrote. Every
call writes a part, all under the id in run.json, which makes one run of them; what a killed call
had logged behind its checkpoint is there twice. TensorBoard shows one curve.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from wakesleep.streams.errors import Refused
from wakesleep.streams.training_config import TrainConfig


def open_loggers(
    config: TrainConfig, folder: Path, saved_step: Callable[[], int], run_id: str
) -> list[Logger]:
    """The loggers that `config.logger` names; none of them writes before it is used.

    Args:
        saved_step: of the checkpoint that the run goes on from; what came after it comes again.
        run_id: of the run, the same after every resume.

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
            keys = {"project": "wakesleep", "name": folder.resolve().name, "resume": "allow"}
            return [WandbLogger(save_dir=folder, id=run_id, offline=True, **keys)]
        case "tensorboard":
            keys = {"name": "tensorboard", "version": "", "default_hp_metric": False}
            step = saved_step()
            return [TensorBoardLogger(folder, **keys, purge_step=step + 1 if step else None)]
