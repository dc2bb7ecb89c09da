"""Two training steps of one rank at full size: the job of `dry_run.measure`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import OmegaConf

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import TrainConfig, TrainRegressorConfig, TrainSftConfig
from nemo_steerlm.fake_gpu import steps
from nemo_steerlm.fake_gpu.mode import FakeGpu
from nemo_steerlm.fake_gpu.parts import OTHER
from nemo_steerlm.formats import hf_folder, model_folder
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.megatron import parallel
from nemo_steerlm.models.base import MegatronModel
from nemo_steerlm.models.generative import GenerativeRegressor
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.models.training import MicroBatch
from nemo_steerlm.tokenizer import Tokenizer, load_tokenizer
from nemo_steerlm.train.bad_steps import BadSteps
from nemo_steerlm.train.batches import Item, StepBatches
from nemo_steerlm.train.fit import micro_batching
from nemo_steerlm.train.start import make_model
from nemo_steerlm.train.strategy import DistributedCheckpointIO, MegatronStrategy
from nemo_steerlm.train.tasks import ConditionedSFTTask, GenerativeTask, RegressionTask, Task

CONFIGS: dict[str, type[TrainConfig]] = {"train-sft": TrainSftConfig, "train-regressor": TrainRegressorConfig}


class AnyTokenizer:
    """Stands for the tokenizer of a model that is not here: every text it is asked about is one token."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.eos_id, self.holes = vocab_size, None, ()
        self._ids: dict[str, int] = {}

    def token_id(self, text: str) -> int:
        """An id of its own for every text."""
        return self._ids.setdefault(text, len(self._ids) + 1)

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """One id a text."""
        return [[self.token_id(text)] for text in texts]

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """The ids."""
        return " ".join(map(str, ids))


def measure(gpu: FakeGpu, verb: str, settings: dict[str, Any], stage: int, loss_share: float) -> dict[str, Any]:
    """The fields of `dry_run.Measured`, but for its seconds.

    Args:
        verb, settings: a key of `CONFIGS`, and the plain values of that configuration.
        stage, loss_share: as `dry_run.measure`'s.
    """
    config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CONFIGS[verb]), settings))
    parallel.initialize(config.parallel, config.seed)
    if stage < config.parallel.pipeline - 1:
        steps.speak_for_the_last_stage()
    model = _model(config)
    model.build(initialise=config.model.init is None)
    task = _task(model, config)
    batch = _batch(task, config, stage, loss_share)
    least = config.parallel.pipeline if config.parallel.virtual_pipeline else 1
    model.begin(task, [batch], bad_steps=BadSteps(), max_steps=2)
    sizes = [(p.numel(), p.requires_grad) for chunk in model.chunks for p in chunk.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, grad in sizes if grad)
    steps.prepare(model)
    steps.train(model, batch[:least])  # makes the optimizer's state
    resting, waits, sent = dict(gpu.memory.now), gpu.waits.copy(), gpu.sent.copy()
    gpu.memory.restart()
    steps.train(model, batch)
    found = dict(
        stage=stage, parameters=total, trained=trained, peak=gpu.memory.peak, parts=_parts(gpu.memory.at_peak),
        resting=_parts(resting), sent=gpu.sent - sent, waits=gpu.waits - waits, assumed=gpu.assumed,
        micro_batches=len(batch),
    )  # fmt: skip
    gpu.memory.restart()
    strategy = MegatronStrategy(DistributedCheckpointIO())
    strategy.connect(model)
    state = strategy._sharded_state()
    del state
    return {**found, "saving": gpu.memory.peak}


def _parts(parts: dict[str, int]) -> dict[str, int]:
    return {part: size for part, size in parts.items() if size or part == OTHER}


def _model(config: TrainConfig) -> Any:
    """The model as `train.start` makes it, before it is built."""
    cls: type[MegatronModel] = AttributeConditionedGPT if isinstance(config, TrainSftConfig) else AttributeRegressor
    card, tokenizer = _origin(config, config.attributes.require(), cls.kind)
    return make_model(cls, config, card, tokenizer)


def _origin(config: TrainConfig, schema: AttributeSchema, kind: str) -> tuple[ModelCard, Tokenizer]:
    """Metadata and tokenizer of the model to start from: as `model.architecture` or the folder `model.init` says."""
    architecture, source = config.model.architecture, Path(config.model.init or "")
    if architecture is None:
        theirs = hf_folder.is_folder(source)
        origin = hf_folder.read_card(source) if theirs else model_folder.read(source)
        tokenizer = (load_tokenizer if theirs else model_folder.read_tokenizer)(source)
        return dataclasses.replace(origin, kind=kind, schema=schema), tokenizer
    size = architecture.vocab_size or load_tokenizer(str(config.model.tokenizer)).vocab_size
    card = ModelCard(kind=kind, architecture=dataclasses.replace(architecture, vocab_size=size), schema=schema)
    return card, cast(Tokenizer, AnyTokenizer(size))


def _task(model: Any, config: TrainConfig) -> Task:
    if model.kind == "policy":
        return ConditionedSFTTask(model)
    assert isinstance(config, TrainRegressorConfig)
    if isinstance(model, GenerativeRegressor):
        return GenerativeTask(model)
    return RegressionTask(model, loss=config.loss)


def _batch(task: Task, config: TrainConfig, stage: int, loss_share: float) -> list[MicroBatch]:
    """As many full micro-batches as the stage needs to reach its peak."""
    data, layout = config.data, config.parallel
    pairs = isinstance(config, TrainRegressorConfig) and config.loss.preference != "none"
    row = data.row_length()
    samples = config.trainer.micro_batch_size * (1 + pairs)  # of a micro-batch
    length = data.max_length
    if row is not None:  # at least two: one alone takes another kernel of attention
        samples = max(2, math.ceil(row / length))
        samples += samples % 2 if pairs else 0
        length = row // samples
    cutting = micro_batching(config, task.model, row)
    most = max(1, config.trainer.global_batch_size * (1 + pairs) // (samples * cutting.ranks))
    count = min(2 * layout.pipeline if layout.virtual_pipeline else layout.pipeline - stage, most)
    count = math.ceil(count / cutting.count_multiple) * cutting.count_multiple
    items = samples * count * cutting.ranks
    units = np.arange(items).reshape(-1, 2) if pairs else None
    order = [(unit, 0) for unit in range(items // (1 + pairs))]
    item = partial(_item, task.model, length, loss_share)
    return StepBatches(lambda _: order, item, np.full(items, length), task.collate, cutting, 1, units)[0]


def _item(model: Any, length: int, loss_share: float, index: int, epoch: int) -> Item:
    """A sample of `length` tokens, of which a share carries loss; every label is there."""
    tokens = np.ones(length, np.int32)
    if model.kind == "policy":
        return {"tokens": tokens, "loss_mask": np.arange(length) >= max(1, round(length * (1 - loss_share)))}
    labels = np.array([attribute.low for attribute in model.schema], np.float32)
    if isinstance(model, GenerativeRegressor):
        ids, _ = model.strings.encode(labels.tolist())
        tokens[-len(ids) :] = ids
    return {"tokens": tokens, "labels": labels, "strength": np.array(np.nan if index % 2 else 1.0)}
