"""`steerlm evaluate task=label_noise`: predicted against human labels, from an annotated file or from a model."""

from __future__ import annotations

import numpy as np

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import EvaluateConfig
from nemo_steerlm.data.parts import batched
from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.evaluate.label_noise import measure
from nemo_steerlm.evaluate.samples import Samples, collect, labelled_responses
from nemo_steerlm.megatron import parallel
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.provenance import annotated_with, plain, versions, write_run_json
from nemo_steerlm.report.label_noise_page import summary_table, write_report
from nemo_steerlm.verbs.commands import after_label_noise
from nemo_steerlm.verbs.evaluate_regressor import predict

_BATCH = 4096


def label_noise(model: AttributeRegressor | None, config: EvaluateConfig) -> str:
    """Write the report into `config.output`; without a model the rows must hold `label_predicted` beside their label.

    Raises:
        ConfigError: no model, and no run.json beside the file says which attributes it was annotated with.
        DataError: no response carries both labels.
    """
    if model is None:
        schema = annotated_with(config.inputs())
        if schema is None:
            raise ConfigError(
                f"{config.inputs()[0]}: no run.json beside it says which attributes it was annotated with; "
                "give checkpoint=, the model folder of the regressor"
            )
        samples = _annotated(config, schema)
    else:
        schema, samples = model.schema, predict(model, config)
    if not parallel.is_rank_zero():
        return ""
    parts = measure(samples, schema, seed=config.seed, resamples=config.resamples)
    write_report(
        config.output,
        {
            "task": "label_noise", "attributes": schema.to_dict(), "parts": parts, "seed": config.seed,
            "summary": _summary(model, samples), "settings": plain(config), "versions": versions(),
        },
        after_label_noise(config),
    )  # fmt: skip
    write_run_json(config.output, "evaluate", config, config.inputs(), schema)
    return summary_table(parts)


def _summary(model: AttributeRegressor | None, samples: Samples) -> str:
    paired = (~np.isnan(samples.predicted + samples.label)).any(axis=1)
    told = samples.language[paired] != ""
    text = f"{paired.sum()} responses with a human label and a prediction; {told.sum()} of them tell their language."
    if model is None or model.calibration is None:
        return text
    return text + f" Predictions are those after the model's stored {model.calibration.method} calibration."


def _annotated(config: EvaluateConfig, schema: AttributeSchema) -> Samples:
    parts = []
    for part in batched(labelled_responses(config.inputs(), schema), _BATCH):
        turns = [one.conversation.turns[one.turn] for one in part]
        predicted = np.array([schema.vector(turn.label_predicted) for turn in turns], np.float64)
        parts.append(collect(part, predicted, schema))
    samples = Samples.join(parts)
    if np.isnan(samples.predicted + samples.label).all():
        raise DataError(
            f"{config.inputs()[0]}: no response has a label_predicted beside its human label; annotate the file first"
            ", or give checkpoint="
        )
    return samples
