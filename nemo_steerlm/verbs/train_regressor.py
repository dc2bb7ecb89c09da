"""Step 1: train the attribute regressor on labelled conversations."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from nemo_steerlm.config import TrainRegressorConfig
from nemo_steerlm.conversation import read_conversations
from nemo_steerlm.data.cache import TokenCache
from nemo_steerlm.data.mixture import Mixture
from nemo_steerlm.data.regression_dataset import RegressionDataset
from nemo_steerlm.data.units import require_pairs
from nemo_steerlm.megatron import parallel
from nemo_steerlm.models.generative import GenerativeRegressor
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.provenance import write_run_json
from nemo_steerlm.train.fit import train
from nemo_steerlm.train.losses import attribute_weights, check_loss, mean_target
from nemo_steerlm.train.start import start_model
from nemo_steerlm.train.tasks import GenerativeTask, RegressionTask, Task


def main(config: TrainRegressorConfig) -> None:
    """`steerlm train-regressor`: fill the run folder `config.output`."""
    schema = config.attributes.require()
    data, pairs = config.data, config.loss.preference != "none"
    files, held_out = data.train_files(), data.val_files()
    parallel.start(config, config.seed)
    model = start_model(AttributeRegressor, config, schema)
    check_loss(model.head, config.loss)  # before the data is read

    strings = model.strings if isinstance(model, GenerativeRegressor) else None

    def tokenised(path: str, singles: bool = True) -> RegressionDataset:
        return RegressionDataset.build(
            read_conversations(path, schema), schema, model.card.template, model.tokenizer, data.max_length,
            data.overlong, TokenCache(path, data.cache, writer=parallel.is_rank_zero(), wait=parallel.barrier),
            name=Path(path).name.split(".")[0], singles=singles, pairs=pairs,
            strings=strings,
        )  # fmt: skip

    singles = config.loss.kind != "none"
    training = Mixture([tokenised(path, singles) for path in files], data.weights, files)
    validation = Mixture([tokenised(path) for path in held_out], names=held_out) if held_out else None
    if pairs:
        require_pairs(training.counts)
    task = _task(model, config, training, validation.datasets if validation else [])
    with contextlib.closing(model):
        best = train(task, config, training, validation)
    if parallel.is_rank_zero():
        report = {"train": training.report, "val": validation.report if validation else None}
        write_run_json(config.output, "train-regressor", config, [*files, *held_out], schema, data=report, best=best)


def _task(model: AttributeRegressor, config: TrainRegressorConfig, training: Mixture, datasets: Sequence[str]) -> Task:
    """The task of the model's head, with weights and mean target from the training labels."""
    if isinstance(model, GenerativeRegressor):
        return GenerativeTask(model, datasets)
    mean = mean_target(model.head, training.labels, training.draws)
    moved = config.model.head_init == "mean" and model.fresh_head
    weights = attribute_weights(config.loss, model.schema, training.labels, training.draws)
    return RegressionTask(model, datasets, config.loss, weights, mean, model.head.start(mean) if moved else None)
