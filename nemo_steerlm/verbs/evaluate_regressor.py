"""`steerlm evaluate task=regressor`: predict every labelled response once, measure, correct, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_steerlm import calibration, hub
from nemo_steerlm.agreement import Floats
from nemo_steerlm.calibration import Calibration
from nemo_steerlm.config import EvaluateConfig
from nemo_steerlm.data.parts import batched
from nemo_steerlm.data.regression_dataset import fit_history
from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.evaluate.regressor import cross_fitted, measure
from nemo_steerlm.evaluate.samples import Response, Samples, collect, labelled_responses
from nemo_steerlm.megatron import parallel
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.provenance import plain, sha256_file, versions, write_run_json
from nemo_steerlm.report.regressor_page import summary_table, write_report
from nemo_steerlm.report.tables import number
from nemo_steerlm.verbs.commands import after_regressor

_BATCH = 4096  # responses read, tokenised and predicted at a time


def regressor(model: AttributeRegressor, config: EvaluateConfig) -> str:
    """Write the report of a regressor into `config.output`; with `config.calibrate` calibrate the model.

    Raises:
        ConfigError: a calibration cannot be stored in an archive, or the head has no distribution for a temperature.
        DataError: no response carries a human label, all are too long, or too few are left to calibrate an attribute.
    """
    if config.calibrate == "temperature":
        model.level_head()
    where = hub.named(config.checkpoint or "")  # the cache of the hub is not the user's folder
    if config.calibrate and not Path(where).is_dir():
        raise ConfigError(f"calibrate={config.calibrate} writes into the model folder; {where} is none")
    stored, model.calibration = model.calibration, None  # raw values are calibrated
    samples, schema = predict(model, config), model.schema
    model.calibration, corrected, sentence = _calibrated(model, config, samples, stored)
    if not parallel.is_rank_zero():
        return ""
    datasets = measure(samples, schema, corrected=corrected, seed=config.seed, resamples=config.resamples)
    lost = int(np.isnan(samples.predicted).all(axis=1).sum())
    write_report(
        config.output,
        {
            "task": "regressor", "summary": _summary(config, samples, lost), "attributes": schema.to_dict(),
            "datasets": datasets, "overlong": lost, "correction": sentence, "seed": config.seed,
            "settings": plain(config), "versions": versions(),
        },
        after_regressor(config),
    )  # fmt: skip
    if config.calibrate and model.calibration is not None:
        model.calibration.write(str(config.checkpoint))
    write_run_json(config.output, "evaluate", config, config.inputs(), schema)
    return summary_table(datasets)


def _calibrated(
    model: AttributeRegressor, config: EvaluateConfig, samples: Samples, stored: Calibration | None
) -> tuple[Calibration | None, Floats | None, str | None]:
    """The new or `stored` calibration, predictions `[n, K]` after it, and a sentence about it."""
    about, method = _about(config, samples), config.calibrate
    if method:
        inputs = _distributions(model, config) if method == "temperature" else list(samples.predicted.T)
        fitted = calibration.fit(method, inputs, samples.label, model.schema, about)
        return fitted, cross_fitted(samples, model.schema, method, inputs), _fitted(fitted, model.schema.names)
    if stored is None:
        return None, None, None
    if stored.method != "temperature":
        return stored, stored.apply(samples.predicted, model.schema), _origin(stored, about)
    model.calibration = stored  # temperatures act before the mean is taken, so raw values are not enough
    return stored, predict(model, config).predicted, _origin(stored, about)


def predict(model: AttributeRegressor, config: EvaluateConfig) -> Samples:
    """Every labelled response of the input with the model's values: each predicted once, on one data-parallel rank.

    Returns:
        The same samples on every rank; the prediction is NaN for a response that is too long.
    """
    parts = []
    for part in batched(labelled_responses(config.inputs(), model.schema), _BATCH):
        texts, readable = _texts(model, part, config)
        values = np.full((len(part), len(model.schema)), np.nan)
        values[readable] = model.predict_over_ranks(texts, config.batch_tokens)
        parts.append(collect(part, values, model.schema))
    samples = Samples.join(parts)
    if np.isnan(samples.predicted).all():
        raise DataError(f"all {len(samples)} labelled responses are too long; raise max_length or change overlong")
    return samples


def _distributions(model: AttributeRegressor, config: EvaluateConfig) -> list[Floats]:
    """Of each attribute the probabilities of its levels `[n, levels]`, rows as `predict`'s."""
    parts = []
    for part in batched(labelled_responses(config.inputs(), model.schema), _BATCH):
        texts, readable = _texts(model, part, config)
        columns = list(model.distribution_over_ranks(texts, config.batch_tokens).values())
        whole = [np.full((len(part), column.shape[1]), np.nan) for column in columns]
        for one, column in zip(whole, columns, strict=True):
            one[readable] = column
        parts.append(whole)
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _texts(
    model: AttributeRegressor, part: list[Response], config: EvaluateConfig
) -> tuple[list[Sequence[int]], list[int]]:
    """The token ids of those responses that can be read within `max_length`, and their places in the part."""
    places = [(one.conversation, one.turn) for one in part]
    limit = config.max_length or model.card.architecture.max_position_embeddings
    texts = fit_history(places, model.card.template, model.tokenizer, limit, config.overlong)
    readable = [i for i, ids in enumerate(texts) if ids]
    return [texts[i] for i in readable], readable


def _about(config: EvaluateConfig, samples: Samples) -> dict[str, Any]:
    inputs = [{"path": path, "sha256": sha256_file(path)} for path in config.inputs()]
    return {"rows": len(samples), "inputs": inputs}


def _fitted(fitted: Calibration, names: Sequence[str]) -> str:
    """Says how the calibration was fitted, and which attributes it skips (raises DataError if all)."""
    left = [name for name in names if name not in fitted.attributes]
    why = f"fewer than {calibration.LEAST_ROWS} responses have a label, or all have the same prediction"
    if len(left) == len(names):
        raise DataError(f"calibrate={fitted.method}: nothing can be corrected: {why}; give more labelled rows")
    text = f"The {fitted.method} calibration below is cross-fitted; the one stored is fitted on all rows."
    if fitted.method == "temperature":
        found = ", ".join(f"{name} {number(one['temperature'], 2)}" for name, one in fitted.attributes.items())
        text += f" Temperatures (above 1: it was too sure): {found}."
    return text + (f" Left as predicted, because {why}: {', '.join(left)}." if left else "")


def _origin(stored: Calibration, about: dict[str, Any]) -> str:
    """Says what the stored calibration was fitted on, with a warning where it is evaluated on the same rows."""
    theirs = {one["sha256"]: one["path"] for one in stored.about.get("inputs") or ()}
    files = ", ".join(theirs.values()) or "unknown rows"
    text = f"The model's stored {stored.method} calibration was fitted on {files}."
    if any(one["sha256"] in theirs for one in about["inputs"]):
        text += " These rows are also in this report: its corrected figures are too good."
    return text


def _summary(config: EvaluateConfig, samples: Samples, lost: int) -> str:
    names = sorted(set(samples.dataset.tolist()))
    prompts = len(np.unique(samples.group))
    text = f"{len(samples)} labelled responses to {prompts} prompts from {', '.join(names)}."
    return text + (f" {lost} were too long to read." if lost else "")
