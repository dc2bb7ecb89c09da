"""Logs of a training: `metrics.jsonl`, TensorBoard, W&B and MLflow, progress on the terminal."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, MLFlowLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from nemo.utils import logging as nemo_log
from nemo.utils.exp_manager import exp_manager

from nemo_steerlm.config import LoggingConfig, TrainerConfig
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.megatron import parallel
from nemo_steerlm.progress import Progress
from nemo_steerlm.yaml_file import read_yaml

nemo_log.setLevel(nemo_log.ERROR)  # dozens of lines about their own set-up
# exp_manager logs an error for every multi-node run that SLURM did not start through Lightning; such runs are tested.
logging.getLogger("nemo_logger").addFilter(lambda record: "without SLURM handling" not in record.getMessage())
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class JSONLLogger(Logger):
    """Appends `{"step": n, name: value, ...}` lines to `metrics.jsonl`, n optimizer steps done.

    A resumed run first drops the lines after the step it resumes from, so that every step stands there once.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "jsonl"

    @property
    def version(self) -> str:
        """There is only one."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line; a NaN is written as null."""
        values = {k: v for k, v in metrics.items() if k != "epoch"}
        row = {"step": int(step or 0), **{k: None if not math.isfinite(v) else v for k, v in values.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the lines after the checkpoint of `step`: later steps, and the validation that follows it."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the half line of a killed run
            if row["step"] < step or (row["step"] == step and ("train/loss" in row or "straggler/rank" in row)):
                kept.append(line + "\n")
        with atomic_writer(self.path) as file:
            file.writelines(kept)


class ShowProgress(Callback):
    """Shows the progress of a training: step, losses, learning rate, speed, time left.

    A log gets a line after the first step, after each validation, every 30 seconds, and every `trainer.log_every`
    steps where that is more than 1.
    """

    def __init__(self, name: str, config: TrainerConfig, start: int, last: int) -> None:
        self.every, self.trained, self.validated, self.speed = config.log_every, "", "", ""
        shown = parallel.is_rank_zero()
        self.progress = Progress(name, last, "steps", shown=shown, bar=config.progress_bar, start=start)

    def on_train_start(self, *_: Any) -> None:
        """Lightning's hook once the checkpoint is loaded, which is no part of a step."""
        self.progress.begin(self.progress.start)

    def on_train_batch_end(self, trainer: Any, model: Any, *_: Any) -> None:
        """Lightning's hook after each optimizer step."""
        figures = model.trained
        self.trained = f"loss {figures['train/loss']:.4g}"
        self.speed = f"rate {figures['train/learning_rate']:.3g}, {figures['train/tokens_per_second']:,.0f} tokens/s"
        first = self.progress.done == self.progress.start
        self._show(1, now=first or (self.every > 1 and trainer.global_step % self.every == 0))

    def on_validation_end(self, trainer: Any, model: Any) -> None:
        """Lightning's hook after each validation."""
        names = ("val/loss", "val/label_information")
        shown = {name: model.validated[name] for name in names if name in model.validated}
        self.validated = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self._show(0, now=True)

    def _show(self, count: int, now: bool) -> None:
        self.progress.update(count, ", ".join(filter(None, (self.trained, self.validated, self.speed))), now)

    def on_train_end(self, *_: Any) -> None:
        """Lightning's hook after the last step."""
        self.progress.close()

    def on_exception(self, *_: Any) -> None:
        """Lightning's hook when the training fails."""
        self.progress.close(failed=True)


def add_loggers(trainer: Any, config: LoggingConfig, output: Path) -> None:
    """TensorBoard and W&B through NeMo's exp_manager, and MLflow, in `output/logs`; all show `output/config.yaml`."""
    if config.wandb and config.wandb_offline:
        os.environ.setdefault("WANDB_MODE", "offline")
    exp_manager(
        trainer,
        {
            "explicit_log_dir": str(output / "logs"),
            "create_tensorboard_logger": config.tensorboard,
            "create_wandb_logger": config.wandb,
            "wandb_logger_kwargs": {
                "name": config.name or output.name, "project": config.wandb_project, "save_dir": str(output / "logs"),
            },
            "create_checkpoint_callback": False,
            "resume_if_exists": False,
            "log_step_timing": False,
            "files_to_copy": None,
            "disable_validation_on_resume": False,
            "seconds_to_sleep": 0,  # 5 on every rank but the first, for files that it moves with resume_if_exists
        },
    )  # fmt: skip
    if config.mlflow:
        trainer.loggers = [*trainer.loggers, _mlflow(config, output)]
    config_file = output / "config.yaml"
    if config_file.is_file():  # `fit` called from Python may have none
        for logger in trainer.loggers:
            logger.log_hyperparams(read_yaml(config_file, ConfigError))


def _mlflow(config: LoggingConfig, output: Path) -> MLFlowLogger:
    """Lightning's logger itself: nemo_toolkit 3.0.0's exp_manager passes the name of the run twice, a TypeError."""
    folder = (output / "logs").absolute()
    place = config.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
    own = {} if place else {"artifact_location": f"file:{folder}/mlflow"}
    place = place or f"sqlite:///{folder}/mlflow.db"
    return MLFlowLogger(config.mlflow_experiment, config.name or output.name, place, **own)
