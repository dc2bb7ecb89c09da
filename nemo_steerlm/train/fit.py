"""Run a training: Lightning's loop, checkpoints, resume."""

from __future__ import annotations

import logging
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state
from nemo.lightning.callback_group import CallbackGroup

from nemo_steerlm.config import DataConfig, LoggingConfig, TrainConfig, TrainerConfig
from nemo_steerlm.data.mixture import Mixture
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.megatron import checkpoint, cpu, gpt, lora, parallel
from nemo_steerlm.megatron.checkpoint import CheckpointFolder
from nemo_steerlm.megatron.local_disk import LocalDisk
from nemo_steerlm.models.base import MegatronModel
from nemo_steerlm.train.bad_steps import BadSteps
from nemo_steerlm.train.batches import MicroBatching, StepBatches, once_through, shuffled
from nemo_steerlm.train.best import BestStep, check_metric
from nemo_steerlm.train.global_batches import GlobalBatches
from nemo_steerlm.train.logs import JSONLLogger, ShowProgress, add_loggers
from nemo_steerlm.train.run_folder import enter_run_folder
from nemo_steerlm.train.saving import Checkpoints, TimeLimit
from nemo_steerlm.train.stragglers import Stragglers
from nemo_steerlm.train.strategy import DistributedCheckpointIO, MegatronStrategy
from nemo_steerlm.train.tasks import Task

_log = logging.getLogger(__name__)


class _ReturnMemory(Callback):
    """Gives freed memory back to the system while a training runs on a CPU."""

    def __init__(self) -> None:
        self.give_back = cpu.MemoryReturn()

    def on_train_batch_end(self, *_: Any) -> None:
        """Lightning's hook after each optimizer step."""
        self.give_back()


def train(
    task: Task,
    config: TrainConfig,
    training: Mixture,
    validation: Mixture | None,
    beside: Mapping[str, Mixture] | None = None,
) -> dict[str, Any] | None:
    """Fill the run folder `config.output`: train, then write `model/`.

    Args:
        task: the task of a model with its initial weights.
        config: the verb's configuration.
        training, validation: the data.
        beside: data that the task's metrics read at every validation, by name.

    Returns:
        With `trainer.best_metric` the metric, step and value of the weights in `model/`.

    Raises:
        ConfigError: the folder holds the run of another configuration, there is no such `trainer.best_metric`, or a
            preference pair does not fit into a packed row.
    """
    output, trainer, model = Path(config.output), config.trainer, task.model
    size = trainer.global_batch_size
    order = GlobalBatches(training.unit_lengths, size, config.seed, shares=training.shares)
    steps = trainer.max_steps or _steps_of(trainer, len(order))
    if trainer.best_metric is not None:
        check_metric(trainer.best_metric, task.metric_names())
    enter_run_folder(output, config)
    cutting = micro_batching(config, model, _row_length(config.data, (training, validation, *(beside or {}).values())))

    def batches(data: Mixture, plan: Any, steps: int) -> StepBatches:
        return StepBatches(plan, data.item, data.lengths, task.collate, cutting, steps, data.units)

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


def micro_batching(config: TrainConfig, model: MegatronModel, pack_length: int | None) -> MicroBatching:
    """How this rank's share of a global batch is cut into micro-batches for a built model; see `MicroBatching`."""
    layout = config.parallel
    return MicroBatching(
        micro_batch_size=config.trainer.micro_batch_size,
        rank=parallel_state.get_data_parallel_rank(),
        ranks=parallel_state.get_data_parallel_world_size(),
        multiple=gpt.row_multiple(model.chunks[0].config),
        equal_lengths=layout.pipeline > 1,
        pack_length=pack_length,
        count_multiple=layout.pipeline if layout.virtual_pipeline else 1,
    )


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
    assert trainer.max_epochs is not None, "TrainerConfig.validate refuses that"
    return max(1, math.ceil(trainer.max_epochs * items / trainer.global_batch_size))


def _local_disk(directory: str | None, folder: CheckpointFolder, name: str) -> LocalDisk | None:
    """The folder of this run below `trainer.checkpoint_local_dir`.

    Its name is drawn once and kept beside the checkpoints, so that another run at the same place has another folder.
    """
    if directory is None:
        return None

    def drawn() -> str:
        path = folder.folder / "local_folder"
        if not path.is_file():
            with atomic_writer(path) as file:
                file.write(uuid.uuid4().hex)
        return "".join(filter(str.isalnum, path.read_text(encoding="utf-8")))

    return LocalDisk(Path(directory) / f"{name}-{parallel.on_rank_zero(drawn)}", folder)


def _reports(config: LoggingConfig, model: MegatronModel) -> list[Callback]:
    if config.straggler_every is None:
        return []
    model.training_batches.phases = model.phases
    return [Stragglers(config.straggler_every, model.phases)]


def fit(
    model: MegatronModel, trainer_config: TrainerConfig, logging_config: LoggingConfig, output: Path, resume: bool
) -> BestStep | None:
    """Train a model after `begin`, up to `model.cfg.max_steps`; checkpoints go to `output/checkpoints`.

    A killed run resumes from its newest complete checkpoint; a finished run is left unchanged.

    Returns:
        The callback that kept the best step's weights, with `trainer.best_metric`.

    Raises:
        Stopped: by a signal or `trainer.max_time`; the state after the last step is saved.
        DataError: `trainer.max_bad_steps` in a row had a loss or gradient norm that is not finite.
        CheckpointError: the weights are not finite; they are not saved.
    """
    last = int(model.cfg.max_steps)
    trained, total = lora.count_parameters(model.chunks)
    _log.info("trained parameters: %s of %s (%.2f%%)", f"{trained:,}", f"{total:,}", 100 * trained / total)
    folder = CheckpointFolder(output / "checkpoints", keep=trainer_config.keep_checkpoints)
    local = _local_disk(trainer_config.checkpoint_local_dir, folder, output.name)
    if local is not None:
        local.recover()
    start = folder.latest() if resume else None
    step = int(start.name.removeprefix("step-")) if start is not None else 0
    validates = model.validation_batches is not None
    io = DistributedCheckpointIO(trainer_config.async_checkpoint, local)
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
    limit = TimeLimit(trainer_config.max_seconds())
    checkpoints = Checkpoints(folder, trainer_config.checkpoint_every, last, io, limit)
    trainer = lightning.Trainer(
        num_nodes=int(os.environ.get("WORLD_SIZE", 1)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        strategy=MegatronStrategy(io),  # knows accelerator and devices
        max_steps=last,
        max_epochs=1,  # the step number alone determines the data; `GlobalBatches` counts epochs
        logger=False,
        callbacks=[
            checkpoints,
            *([best] if best is not None else []),
            *_reports(logging_config, model),
            ShowProgress(output.name, trainer_config, step, last),
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
    add_loggers(trainer, logging_config, output)
    trainer.loggers = [*trainer.loggers, metrics]
    # NeMo attaches telemetry that nothing here reads. After a failed training its spans stay open, and it would refuse
    # the next training of the same process, as in a notebook. (nemo_toolkit 3.0.0, nemo/lightning/callback_group.py.
    # Remove when it closes its spans after an error.)
    CallbackGroup.get_instance().callbacks.clear()
    model.set_trainer(trainer)
    # Lightning would answer SIGTERM by an exception with exit code 0 on the process that got it (2.4.0,
    # pytorch/trainer/connectors/signal_connector.py). Remove when it has an argument for that.
    trainer._signal_connector.register_signal_handlers = lambda: None
    with checkpoints.listening():
        trainer.fit(model, ckpt_path=None if start is None else str(start))
    return best
