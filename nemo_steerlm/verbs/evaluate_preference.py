"""`steerlm evaluate task=preference`: how often a regressor prefers what annotators prefer, beside two baselines."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import EvaluateConfig, PreferenceConfig
from nemo_steerlm.data.benchmarks import Benchmark, Comparison, check_held_out, read_benchmark
from nemo_steerlm.data.regression_dataset import fit_history
from nemo_steerlm.errors import DataError
from nemo_steerlm.evaluate import baselines
from nemo_steerlm.evaluate.preference import (
    PRESETS,
    Floats,
    accuracies,
    beside,
    check_weights,
    default_weights,
    scalar,
)
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.megatron import parallel
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.provenance import fingerprint_folder, plain, versions, write_run_json
from nemo_steerlm.report.results_page import write_report
from nemo_steerlm.report.tables import interval, number, text_table
from nemo_steerlm.verbs.commands import after_regressor

#: Counts of unusual rows, in words.
_COUNTS = {
    "contexts_differ": "rows whose answers follow different contexts: each is read after its own",
    "empty_answers": "empty answers: kept",
    "same_answers": "rows whose chosen answer is also the rejected one: kept, a tie",
    "rows_without_pair": "rows without a pair: left out",
    "shortened": "answers too long to be read whole: their oldest turns were dropped",
    "left_out": "rows with an answer that cannot be read within max_length: left out, of the baselines too",
}


def preference(model: AttributeRegressor, config: EvaluateConfig) -> str:
    """Write the report into `config.output`; returns the table. Every rank runs it.

    Raises:
        ConfigError: weights for attributes the regressor does not predict.
        DataError: a file cannot be read, or the weights are fitted on tested pairs.
    """
    started, options = time.perf_counter(), config.preference
    (source_file,) = config.inputs()
    test = read_benchmark(source_file, options.layout)
    train = _held_out(test, options)
    weights, source = _weights(model, config, train.get("fit"))
    values, counts = rate(model, test.comparisons, config)
    kept = [i for i, row in enumerate(values) if not np.isnan(row).any()]
    counts["left_out"] = len(values) - len(kept)
    if not kept:
        raise DataError(f"{test.path}: every row holds an answer of more than max_length tokens; raise max_length")
    rows = [test.comparisons[i] for i in kept]
    scores = [_split(scalar(values[i], weights, model.schema), test.comparisons[i]) for i in kept]
    if not parallel.is_rank_zero():
        return ""
    baseline = train.get("floor_train")
    tables = {"model": scores, "longer": baselines.longer(rows)}
    words = baselines.tfidf(rows, baseline.comparisons if baseline else None, config.seed)
    if words is not None:
        tables["tfidf"] = words
    table = beside({key: accuracies(test.layout, rows, one, config.seed) for key, one in tables.items()})
    score = " ".join(f"{number(weight, 2, sign=True)} × {name}" for name, weight in weights.items() if weight)
    counts = {**test.counts, **counts}
    told = " (told by its keys; preference.layout= chooses another)" if options.layout == "auto" else ""
    said = [f"layout: {test.layout}{told}", f"score: {score} ({source})"]
    if model.calibration is not None:
        said.append(f"values after the model's stored {model.calibration.method} calibration, as annotate gives them")
    notes = _notes(test, [*said, _baseline(baseline, words is not None)], counts, options)
    figures = {
        "layout": test.layout, "rows": table, "notes": notes, "weights": weights,
        "weights_from": source, "counts": counts,
    }  # fmt: skip
    _write(model, config, test, train, figures, values, time.perf_counter() - started)
    return "\n".join([_text(table), "", *notes, f"report: {Path(config.output) / 'report.html'}"])


def rate(
    model: AttributeRegressor, comparisons: list[Comparison], config: EvaluateConfig
) -> tuple[list[Floats], dict[str, int]]:
    """Predictions for every answer; a text that occurs in several rows is computed once.

    Returns:
        For each comparison `[answers, K]`, NaN for an answer that is too long; and how many answers were shortened.

    Raises:
        DataError: an answer is too long under overlong=error.
    """
    card, tokenizer = model.card, model.tokenizer
    limit = config.max_length or card.architecture.max_position_embeddings
    places = [(one, len(one.turns) - 1) for row in comparisons for one in row.answers]
    whole = card.template.encode_regressions(places, tokenizer)
    long = [i for i, ids in enumerate(whole) if len(ids) > limit]
    shorter = fit_history([places[i] for i in long], card.template, tokenizer, limit, config.overlong)
    texts = [tuple(ids) for ids in whole]
    for i, ids in zip(long, shorter, strict=True):
        texts[i] = tuple(ids)
    unique = {text: i for i, text in enumerate(dict.fromkeys(filter(None, texts)))}
    found = np.full((len(unique) + 1, len(model.schema)), np.nan)  # the last row is for answers that are too long
    found[:-1] = model.predict_over_ranks(list(unique), config.batch_tokens)
    values = found[[unique.get(text, -1) for text in texts]]
    ends = np.cumsum([len(row.answers) for row in comparisons])
    return np.split(values, ends[:-1]), {"shortened": sum(map(bool, shorter))}


def _held_out(test: Benchmark, options: PreferenceConfig) -> dict[str, Benchmark]:
    """The files to fit on, by setting."""
    files: dict[str, Benchmark] = {}
    for name in ("fit", "floor_train"):
        path = getattr(options, name)
        if path is not None:
            files[name] = read_benchmark(path)
            check_held_out(test, files[name], f"preference.{name}")
    return files


def _weights(
    model: AttributeRegressor, config: EvaluateConfig, train: Benchmark | None
) -> tuple[dict[str, float], str]:
    """The weight of each attribute, and where it comes from."""
    options, schema = config.preference, model.schema
    if options.weights:
        return check_weights(options.weights, schema, "preference.weights"), "preference.weights"
    if options.preset:
        name = f"preference.preset={options.preset}"
        return check_weights(PRESETS[options.preset], schema, name), f"the published weights {options.preset}"
    if train is None:
        return default_weights(schema), "the default; preference.weights, .preset or .fit choose others"
    return _fitted(model, config, train, schema), f"fitted on the {len(train.comparisons)} pairs of {train.path}"


def _fitted(
    model: AttributeRegressor, config: EvaluateConfig, train: Benchmark, schema: AttributeSchema
) -> dict[str, float]:
    values, _ = rate(model, train.comparisons, config)
    kept = [i for i, row in enumerate(values) if not np.isnan(row).any()]
    if not kept:
        raise DataError(f"preference.fit={train.path}: no row can be read within max_length")
    fitted = baselines.fit_pairs(np.concatenate([values[i] for i in kept]), [train.comparisons[i] for i in kept])
    return dict(zip(schema.names, map(float, fitted), strict=True))


def _split(scores: Floats, row: Comparison) -> tuple[Floats, Floats]:
    return scores[: len(row.chosen)], scores[len(row.chosen) :]


def _baseline(train: Benchmark | None, there: bool) -> str:
    if train is not None:
        return f"TF-IDF baseline: fitted on the {len(train.comparisons)} pairs of {train.path}"
    if not there:
        few = f"too few prompts to cross-fit ({baselines.FOLDS} are needed)"
        return f"TF-IDF baseline: {few}; give preference.floor_train"
    return f"TF-IDF baseline: cross-fitted on this file, {baselines.FOLDS} folds by prompt"


def _notes(test: Benchmark, said: list[str], counts: dict[str, int], options: PreferenceConfig) -> list[str]:
    notes = list(said)
    if options.preset and test.layout == "rewardbench":
        notes.append("these weights were searched on RewardBench itself (HelpSteer2, appendix H): it is not held out")
    notes += [f"{counts[name]} {text}" for name, text in _COUNTS.items() if counts.get(name)]
    notes.append("accuracy: ties at random (half for two answers); strict: ties are lost, as on leaderboards")
    return [*notes, "intervals: Wilson's for a subset (n = prompts), bootstrap over prompts for averages of subsets"]


def _text(table: list[dict[str, Any]]) -> str:
    baselines_there = ["longer", *(["TF-IDF"] if "tfidf" in table[0] else [])]
    head = ["", "accuracy", "95% interval", "n", "ties", "strict", *baselines_there]
    rows = []
    for row in table:
        model = row["model"]
        name = row["name"] if row["level"] != "subset" or len(table) == 1 else f"  {row['name']}"
        shown = [number(row[key]["accuracy"]) for key in ("longer", "tfidf") if key in row]
        ties = [model["ties"], number(model["strict"])]
        rows.append([name, number(model["accuracy"]), interval(model["interval"]), row["n"], *ties, *shown])
    return text_table(rows, head)


def _write(
    model: AttributeRegressor,
    config: EvaluateConfig,
    test: Benchmark,
    train: dict[str, Benchmark],
    figures: dict[str, Any],
    values: list[Floats],
    seconds: float,
) -> None:
    """The report, the values of every answer (scores.jsonl), and run.json."""
    folder = Path(config.output)
    write_report(folder, {
        "title": "Preferences", "summary": f"{test.path.name}, layout {test.layout}.",
        "preference": figures, "attributes": model.schema.to_dict(), "seconds": {"total": round(seconds, 2)},
        "settings": plain(config), "seed": config.seed, "versions": versions(),
    }, after_regressor(config))  # fmt: skip
    with atomic_writer(folder / "scores.jsonl") as file:
        for row, answers in zip(test.comparisons, values):
            named = [dict(zip(model.schema.names, (round(float(v), 5) for v in one))) for one in answers]
            chosen, rejected = named[: len(row.chosen)], named[len(row.chosen) :]
            readable = not np.isnan(answers).any()
            record = {"id": row.id, "subset": row.subset, "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(record if readable else {**record, "chosen": None, "rejected": None}) + "\n")
    inputs = [test.path, *(one.path for one in train.values())]
    digest = fingerprint_folder(str(config.checkpoint))
    write_run_json(folder, "evaluate", config, inputs, model.schema, label_model=digest)
