"""Step 1: train the attribute regressor on labelled conversations."""

from __future__ import annotations

import contextlib
from pathlib import Path

from nemo_steerlm.config import TrainRegressorConfig
from nemo_steerlm.conversation import read_conversations
from nemo_steerlm.data.cache import TokenCache
from nemo_steerlm.data.mixture import Mixture
from nemo_steerlm.data.regression_dataset import RegressionDataset
from nemo_steerlm.data.units import require_pairs
from nemo_steerlm.megatron import parallel
from nemo_steerlm.models.generative import GenerativeRegressor
from nemo_steerlm.models.losses import Objective, attribute_weights, mean_target
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.provenance import write_run_json
from nemo_steerlm.train.fit import train
from nemo_steerlm.train.start import start_model


def main(config: TrainRegressorConfig) -> None:
    """`steerlm train-regressor`: fill the run folder `config.output`."""
    schema = config.attributes.require()
    data, pairs = config.data, config.loss.preference != "none"
    files, held_out = data.train_files(), data.val_files()
    parallel.start(config, config.seed)
    model = start_model(AttributeRegressor, config, schema)
    Objective(model.head, config.loss)  # what makes no sense is refused before the data is read

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
        require_pairs(training.report)
    labels, draws = training.labels, training.draws
    mean = mean_target(model.head, labels, draws)
    if config.model.head_init == "mean" and model.fresh_head:
        model.start_at = model.head.start(mean)
    weights = attribute_weights(config.loss, schema, labels, draws)
    model.objective = Objective(model.head, config.loss, weights, mean)
    model.datasets = validation.datasets if validation else []
    with contextlib.closing(model):
        best = train(model, config, training, validation, model.collate)
    if parallel.is_rank_zero():
        report = {"train": training.report, "val": validation.report if validation else None}
        write_run_json(config.output, "train-regressor", config, [*files, *held_out], schema, data=report, best=best)
