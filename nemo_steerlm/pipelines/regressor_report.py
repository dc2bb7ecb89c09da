"""`steerlm evaluate task=regressor`: predict every labelled response once, measure, correct, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nemo_steerlm import calibration
from nemo_steerlm.agreement import Floats
from nemo_steerlm.calibration import Calibration
from nemo_steerlm.config import EvaluateConfig
from nemo_steerlm.data.parts import chunks
from nemo_steerlm.data.regression_dataset import fit_history
from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.evaluate.regressor import cross_fitted, measure, summary_table, write_report
from nemo_steerlm.evaluate.samples import Response, Samples, collect, labelled_responses
from nemo_steerlm.megatron import parallel
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.provenance import check_attributes, plain, sha256_file, versions, write_run_json

_CHUNK = 4096  # responses read, tokenised and predicted at a time


def regressor(model: AttributeRegressor, config: EvaluateConfig) -> str:
    """Write the report of a regressor into `config.output`; with `config.calibrate` store a correction with the model.

    Raises:
        ConfigError: a correction shall be stored in an archive.
        DataError: no response carries a human label, or none is left within `max_length`.
    """
    if config.calibrate and not Path(config.checkpoint or "").is_dir():
        raise ConfigError(f"calibrate={config.calibrate} writes into the model folder; {config.checkpoint} is none")
    stored, model.calibration = model.calibration, None  # the raw values are what a correction starts from
    samples = predict(model, config)
    schema, about = model.schema, _about(config, samples)
    corrected, sentence = None, None
    if config.calibrate:
        corrected = cross_fitted(samples, schema, config.calibrate)
        stored = calibration.fit(config.calibrate, samples.predicted, samples.label, schema, about)
        sentence = f"The {stored.method} correction below is cross-fitted; the one stored is fitted on all rows."
    elif stored is not None:
        corrected = stored.apply(samples.predicted, schema)
        sentence = _origin(stored, about)
    model.calibration = stored
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
    )  # fmt: skip
    if config.calibrate and stored is not None:
        stored.write(str(config.checkpoint))
    write_run_json(config.output, "evaluate", config, config.inputs(), schema)
    return summary_table(datasets)


def predict(model: AttributeRegressor, config: EvaluateConfig) -> Samples:
    """Every labelled response of the input with the model's values: each predicted once, on one data-parallel rank.

    Returns:
        The same samples on every rank; NaN as prediction of a response that does not fit `max_length`.
    """
    for path in config.inputs():
        check_attributes(path, model.schema)
    parts = []
    for part in chunks(labelled_responses(config.inputs(), model.schema), _CHUNK):
        parts.append(collect(part, _predict_part(model, part, config), model.schema))
    samples = Samples.join(parts)
    if np.isnan(samples.predicted).all():
        raise DataError(f"all {len(samples)} labelled responses are over-long; raise max_length or change overlong")
    return samples


def _predict_part(model: AttributeRegressor, part: list[Response], config: EvaluateConfig) -> Floats:
    """Values `[n, K]` of one part, NaN where a text is too long."""
    places = [(one.conversation, one.turn) for one in part]
    limit = config.max_length or model.card.architecture.max_position_embeddings
    texts = fit_history(places, model.card.template, model.tokenizer, limit, config.overlong)
    readable = [i for i, ids in enumerate(texts) if ids]
    values = np.full((len(part), len(model.schema)), np.nan)
    values[readable] = model.predict_over_ranks([texts[i] for i in readable], config.batch_tokens)
    return values


def _about(config: EvaluateConfig, samples: Samples) -> dict[str, Any]:
    inputs = [{"path": path, "sha256": sha256_file(path)} for path in config.inputs()]
    return {"rows": len(samples), "inputs": inputs}


def _origin(stored: Calibration, about: dict[str, Any]) -> str:
    """Says what the stored correction was fitted on, and a warning where that is what it is judged on."""
    theirs = {one["sha256"]: one["path"] for one in stored.about.get("inputs") or ()}
    files = ", ".join(theirs.values()) or "unknown rows"
    text = f"The model's stored {stored.method} correction was fitted on {files}."
    if any(one["sha256"] in theirs for one in about["inputs"]):
        text += " These are rows of this very report: its corrected figures are too good."
    return text


def _summary(config: EvaluateConfig, samples: Samples, lost: int) -> str:
    names = sorted(set(samples.dataset.tolist()))
    prompts = len(np.unique(samples.group))
    text = f"{len(samples)} labelled responses to {prompts} prompts from {', '.join(names)}."
    return text + (f" {lost} were too long to read." if lost else "")
