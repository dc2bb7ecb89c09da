"""Run a training: the run folder, Lightning's loop, NeMo's loggers, atomic checkpoints, resume."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from megatron.core import parallel_state
from nemo.lightning.callback_group import CallbackGroup
from nemo.utils import logging as nemo_log
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf

from nemo_steerlm.config import DataConfig, LoggingConfig, TrainerConfig, TrainRegressorConfig, TrainSftConfig
from nemo_steerlm.data.mixture import Mixture
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.megatron import checkpoint, cpu, gpt, lora, parallel
from nemo_steerlm.megatron.checkpoint import CheckpointFolder
from nemo_steerlm.models.base import MegatronModel
from nemo_steerlm.progress import Progress
from nemo_steerlm.provenance import plain
from nemo_steerlm.train.bad_steps import BadSteps
from nemo_steerlm.train.batches import Layout, StepBatches, once_through, shuffled
from nemo_steerlm.train.best import BestStep, check_metric
from nemo_steerlm.train.global_batches import GlobalBatches
from nemo_steerlm.train.saving import Checkpoints
from nemo_steerlm.train.strategy import DistributedCheckpointIO, MegatronStrategy
from nemo_steerlm.train.tasks import Task
from nemo_steerlm.yaml_file import read_yaml

_log = logging.getLogger(__name__)
nemo_log.setLevel(nemo_log.ERROR)  # dozens of lines about their own set-up
# exp_manager calls every run on several nodes an error that SLURM did not start through Lightning; ours are tested.
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
        """Forget what comes after the checkpoint of `step`: later steps, and the validation that follows it."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the half line of a killed run
            if row["step"] < step or (row["step"] == step and "train/loss" in row):
                kept.append(line + "\n")
        with atomic_writer(self.path) as file:
            file.writelines(kept)


class _ShowProgress(Callback):
    """Says where a training is: step, losses, learning rate, speed, time left.

    A log gets a line after the first step, after each validation, every half a minute, and every `trainer.log_every`
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


class _ReturnMemory(Callback):
    """Gives freed memory back to the system while a training runs on a CPU."""

    def __init__(self) -> None:
        self.give_back = cpu.MemoryReturn()

    def on_train_batch_end(self, *_: Any) -> None:
        """Lightning's hook after each optimizer step."""
        self.give_back()


def _loggers(trainer: Any, config: LoggingConfig, output: Path) -> None:
    """TensorBoard and W&B through NeMo's exp_manager, under `output/logs`."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("logging.wandb=true needs the package wandb: pip install 'nemo_steerlm[wandb]'")
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
        },
    )  # fmt: skip


def train(
    task: Task,
    config: TrainRegressorConfig | TrainSftConfig,
    training: Mixture,
    validation: Mixture | None,
    beside: Mapping[str, Mixture] | None = None,
) -> dict[str, Any] | None:
    """Fill the run folder `config.output`: train, then write `model/`.

    Args:
        task: of a model with its first weights.
        config: of the verb.
        training, validation: the data.
        beside: data that the task's metrics read at every validation, by name.

    Returns:
        With `trainer.best_metric` the metric, step and value of what `model/` holds.

    Raises:
        ConfigError: the folder holds the run of another configuration, the batch sizes do not divide, or a preference
            pair does not fit into a packed row.
    """
    output, trainer, model = Path(config.output), config.trainer, task.model
    size = trainer.global_batch_size
    order = GlobalBatches(training.unit_lengths, size, config.seed, shares=training.shares)
    steps = trainer.max_steps or _steps_of(trainer, len(order))
    if trainer.best_metric is not None:
        check_metric(trainer.best_metric, task.metric_names(), validation is not None)
    _enter_run_folder(output, config)
    layout = Layout(
        micro_batch_size=trainer.micro_batch_size,
        rank=parallel_state.get_data_parallel_rank(),
        ranks=parallel_state.get_data_parallel_world_size(),
        multiple=gpt.row_multiple(model.chunks[0].config),
        equal_lengths=config.parallel.pipeline > 1,
        pack_length=_row_length(config.data, (training, validation, *(beside or {}).values())),
        unit=config.parallel.pipeline if config.parallel.virtual_pipeline else 1,
    )
    if layout.pack_length is None:
        check_batch_sizes(trainer, layout.ranks)

    def batches(data: Mixture, plan: Any, steps: int) -> StepBatches:
        return StepBatches(plan, data.item, data.lengths, task.collate, layout, steps, data.units)

    def once(data: Mixture) -> StepBatches:
        return batches(data, once_through(data.unit_lengths, size), -(-len(data.units) // size))

    held_out = None if validation is None else once(validation)
    extra = {name: once(data) for name, data in (beside or {}).items()}
    model.begin(
        task, batches(training, shuffled(order), steps), held_out, extra,
        bad_steps=BadSteps(trainer.max_bad_steps), max_steps=steps,
    )  # fmt: skip
    best = fit(model, trainer, config.logging, output, config.resume)
    if best is None:
        model.save_pretrained(output / "model")
        return None
    best.place(model)
    return best.best


def _row_length(data: DataConfig, sets: Sequence[Mixture | None]) -> int | None:
    """Most tokens of a packed row, None without packing; both responses of a preference pair go into one row."""
    length = data.row_length()
    longest = max(int(found.unit_lengths.max()) for found in sets if found is not None)
    if length is None or longest <= length:
        return length
    if data.pack_length is None:
        return longest
    raise ConfigError(
        f"data.pack_length={data.pack_length} does not hold the longest preference pair, {longest} tokens; raise it, "
        "or leave it out"
    )


def _steps_of(trainer: TrainerConfig, items: int) -> int:
    if trainer.max_epochs is None:
        raise ConfigError("trainer.max_steps is missing; give it, or trainer.max_epochs=2")
    return max(1, math.ceil(trainer.max_epochs * items / trainer.global_batch_size))


def check_batch_sizes(trainer: TrainerConfig, ranks: int) -> None:
    """Refuse a global batch that cannot be cut into equal micro-batches on every rank (ConfigError)."""
    unit = trainer.micro_batch_size * ranks
    if trainer.global_batch_size % unit:
        raise ConfigError(
            f"trainer.global_batch_size={trainer.global_batch_size} is not a multiple of trainer.micro_batch_size="
            f"{trainer.micro_batch_size} x {ranks} data-parallel processes; use a multiple of {unit}"
        )


# What a resumed run must share with the run it goes on from; layout, packing, steps and logging may change.
_IDENTITY = (
    "data", "attributes", "model", "head", "loss", "template", "optimizer", "seed", "trainer.global_batch_size"
)  # fmt: skip
_FREE = ("packing", "pack_length", "cache")  # of data


def _identity(config: Any, key: str) -> Any:
    section: Any = OmegaConf.to_container(OmegaConf.create({"of": OmegaConf.select(config, key)}))
    return {k: v for k, v in section["of"].items() if k not in _FREE} if key == "data" else section["of"]


def _first_difference(one: Any, two: Any, key: str) -> str | None:
    """The first value that differs in two parts of a configuration: "optimizer.lr=0.1, now 0.2"."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        found = (_first_difference(one.get(name), two.get(name), f"{key}.{name}") for name in {**one, **two})
        return next((text for text in found if text), None)
    return None if one == two else f"{key}={one}, now {two}"


def _enter_run_folder(output: Path, config: Any) -> None:
    """Write config.yaml, or check that the folder's own says the same run."""
    mine = OmegaConf.create(plain(config))
    path = output / "config.yaml"
    if config.resume and path.is_file():
        try:
            theirs = OmegaConf.create(read_yaml(path, ConfigError))
        except ConfigError as error:
            raise ConfigError(
                f"{error}; without it nobody knows what this run is: put it back, choose another output, or start "
                "over with resume=false"
            ) from None
        for key in _IDENTITY:
            difference = _first_difference(_identity(theirs, key), _identity(mine, key), key)
            if difference:
                raise ConfigError(
                    f"{output} holds another run: {difference}; choose another output, or resume=false to start over"
                )
        steps = OmegaConf.select(theirs, "trainer.max_steps"), config.trainer.max_steps
        if None not in steps and steps[1] < steps[0]:
            _log.info("%s: trainer.max_steps was %d and is %d now", output, *steps)
        before, now = OmegaConf.select(theirs, "trainer.precision"), config.trainer.precision
        if before != now and not config.optimizer.distributed:
            raise ConfigError(
                f"{output} was trained in {before}, now {now} is asked for, which optimizer.distributed=false cannot "
                f"go on from; give trainer.precision={before}, or resume=false to start over"
            )
        if before != now:
            _log.info("%s was trained in %s until now and goes on in %s (trainer.precision)", output, before, now)
    parallel.barrier()
    if parallel.is_rank_zero():
        if not config.resume:
            for name in ("checkpoints", "model", "logs"):
                shutil.rmtree(output / name, ignore_errors=True)
            (output / "metrics.jsonl").unlink(missing_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path) as file:
            file.write(OmegaConf.to_yaml(mine))
    parallel.barrier()


def fit(
    model: MegatronModel, trainer_config: TrainerConfig, logging_config: LoggingConfig, output: Path, resume: bool
) -> BestStep | None:
    """Train a model that has begun, up to `model.cfg.max_steps`; checkpoints go to `output/checkpoints`.

    A run that was killed goes on from its newest complete checkpoint; one that had ended changes nothing.

    Returns:
        What kept the best step's weights, with `trainer.best_metric`.

    Raises:
        Stopped: by a signal; the state after the last step is saved.
        DataError: `trainer.max_bad_steps` in a row had a loss or gradient norm that is not finite.
        CheckpointError: the weights are not finite; they are not saved.
    """
    last = int(model.cfg.max_steps)
    trained, total = lora.count_parameters(model.chunks)
    _log.info("trained parameters: %s of %s (%.2f%%)", f"{trained:,}", f"{total:,}", 100 * trained / total)
    folder = CheckpointFolder(output / "checkpoints", keep=trainer_config.keep_checkpoints)
    start = folder.latest() if resume else None
    step = int(start.name.removeprefix("step-")) if start is not None else 0
    validates = model.validation_batches is not None
    io = DistributedCheckpointIO(background=trainer_config.async_checkpoint)
    best = None
    if trainer_config.best_metric is not None:
        best = BestStep(trainer_config.best_metric, output, io, resume)
    metrics = JSONLLogger(output / "metrics.jsonl")
    val_every = min(trainer_config.val_every or last, last)
    if start is not None and step > last:
        _log.info("%s is trained up to step %d already: trainer.max_steps=%d changes nothing", output, step, last)
    if start is not None and step >= last:
        complete = parallel.broadcast_object((output / "model").is_dir())
        metrics.rewind(step + 1 if complete else step)
        model.load_training_state(checkpoint.load(start, model.training_state(), verify=False))
        if validates and not complete and last % val_every == 0:  # killed between the last checkpoint and model/
            model.validate(trainer_config.val_batches)
            metrics.log_metrics({k: float(np.float32(v)) for k, v in model.validated.items()}, last)  # as Lightning
            if best is not None:
                best.consider(model, last, model.validated)
        return best
    metrics.rewind(step)
    checkpoints = Checkpoints(folder, trainer_config.checkpoint_every, last, io)
    trainer = lightning.Trainer(
        num_nodes=int(os.environ.get("WORLD_SIZE", 1)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        strategy=MegatronStrategy(io),  # knows accelerator and devices
        max_steps=last,
        max_epochs=1,  # the step number alone says which data comes next; epochs are counted there
        logger=False,
        callbacks=[
            checkpoints,
            *([best] if best is not None else []),
            _ShowProgress(output.name, trainer_config, step, last),
            _ReturnMemory(),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        val_check_interval=val_every if validates else None,
        check_val_every_n_epoch=None if validates else 1,
        limit_val_batches=(trainer_config.val_batches or 1.0) if validates else 0,
        log_every_n_steps=trainer_config.log_every,
    )
    _loggers(trainer, logging_config, output)
    trainer.loggers = [*trainer.loggers, metrics]
    # NeMo attaches its telemetry, which nothing here reads. After a training that failed its spans stay open, and it
    # would refuse the next one of the same process: in a notebook, the one with the mistake mended.
    CallbackGroup.get_instance().callbacks.clear()
    model.set_trainer(trainer)
    # Lightning (2.4) would answer SIGTERM by an exception with exit code 0 on the process that got it.
    trainer._signal_connector.register_signal_handlers = lambda: None
    with checkpoints.listening():
        trainer.fit(model, ckpt_path=None if start is None else str(start))
    return best
