"""Keep the weights of the best step, judged by one validation metric."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_steerlm.errors import ConfigError, suggest
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.integrity import listing
from nemo_steerlm.megatron import checkpoint, parallel
from nemo_steerlm.models.base import MegatronModel
from nemo_steerlm.ownership import UNFINISHED
from nemo_steerlm.train.strategy import DistributedCheckpointIO

_log = logging.getLogger(__name__)
FILE = "best.json"  # in a model folder: {"metric", "step", "value"}
_LOWER = ("loss", "mse", "mae")  # lower is better; for all others higher is


class BestStep(Callback):
    """Writes a model folder `checkpoints/best-STEP` whenever the metric is better than ever before in this run.

    The value lies inside the folder, so a kill at any moment leaves weights and value that belong together.

    Args:
        metric: name in `metrics.jsonl`.
        output: the run folder.
        io: writes checkpoints; finished before the weights are written, because both use collectives.
        resume: whether best steps already in the run folder count.
    """

    def __init__(self, metric: str, output: Path, io: DistributedCheckpointIO, resume: bool) -> None:
        self.metric, self.output, self.io = metric, output, io
        self.sign = -1.0 if metric.rpartition("/")[2] in _LOWER else 1.0
        self._prune()
        found: Any = parallel.broadcast_object(self._found() if resume else None)
        self.best: dict[str, Any] | None = found

    def _folders(self) -> list[Path]:
        """Complete folders of best steps, the newest last; each was better than those before."""
        complete = (f for f in (self.output / "checkpoints").glob("best-????????") if (f / FILE).is_file())
        return sorted(complete)

    def _prune(self) -> None:
        """Remove all but the newest, also what a kill left half written or half removed."""
        if parallel.is_rank_zero():
            for folder in set((self.output / "checkpoints").glob("best-*")) - set(self._folders()[-1:]):
                shutil.rmtree(folder)
        parallel.barrier()

    def _found(self) -> dict[str, Any] | None:
        for folder in (*reversed(self._folders()), self.output / "model"):
            if (folder / FILE).is_file():
                content = json.loads((folder / FILE).read_text(encoding="utf-8"))
                return content if content["metric"] == self.metric else None
        return None

    def on_validation_end(self, trainer: Any, model: Any) -> None:
        """Lightning's hook after each validation."""
        self.consider(model, trainer.global_step, model.validated)

    def consider(self, model: MegatronModel, step: int, metrics: dict[str, float]) -> None:
        """Keep the current weights if `metrics` of this step are the best so far; all ranks call it.

        Raises:
            ConfigError: the metric is not among them.
        """
        if self.metric not in metrics:
            raise _unknown(self.metric, list(metrics))
        value = metrics[self.metric]
        if not math.isfinite(value) or (self.best and self.sign * (value - self.best["value"]) <= 0):
            return
        self.io.finish()
        self.best = {"metric": self.metric, "step": step, "value": value}
        folder = self.output / "checkpoints" / f"best-{step:08d}"
        partial = folder.with_name(folder.name + UNFINISHED)
        model.save_pretrained(partial)
        if parallel.is_rank_zero():
            with listing(partial, FILE), atomic_writer(partial / FILE) as file:
                json.dump(self.best, file)
        checkpoint.replace_folder(partial, folder)
        self._prune()

    def place(self, model: MegatronModel) -> None:
        """Make the best step's weights the run's `model/`; the last step's where no value was a number."""
        folders: Any = parallel.broadcast_object([str(folder) for folder in self._folders()])
        if self.best is None:
            _log.warning("%s was never a number: model/ holds the last step", self.metric)
            model.save_pretrained(self.output / "model")
        elif folders:  # else an earlier call placed it
            checkpoint.replace_folder(Path(folders[-1]), self.output / "model")


def check_metric(metric: str, names: list[str]) -> None:
    """Refuse, before the training, a metric that is not in `names`; those of one dataset are not known yet.

    Raises:
        ConfigError: the name is none of the validation's metrics.
    """
    if metric not in names and metric.count("/") < 3:
        raise _unknown(metric, names)


def _unknown(metric: str, names: list[str]) -> ConfigError:
    return ConfigError(
        f"trainer.best_metric={metric}: no such metric of the validation{suggest(metric, names)}; "
        f"there are {', '.join(names)}"
    )
