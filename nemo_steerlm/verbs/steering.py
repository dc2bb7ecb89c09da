"""Does a policy listen to its labels, and does it do what it is asked? Runs the models for `evaluate.steerability`.

Listening is measured on held-out labelled rows, without generating anything; obeying is measured on answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from nemo_steerlm.agreement import Floats
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import ComputeConfig, ParallelConfig, SteeringConfig
from nemo_steerlm.conversation import Conversation, Turn, read_conversations
from nemo_steerlm.data.policy_dataset import trained_turns, with_other_labels
from nemo_steerlm.data.tokenise import draw
from nemo_steerlm.errors import ConfigError, DataError, suggest
from nemo_steerlm.evaluate import scorers
from nemo_steerlm.evaluate.reports import Listening
from nemo_steerlm.evaluate.scorers import Scores
from nemo_steerlm.evaluate.steerability import Request, label_information
from nemo_steerlm.formats import model_folder
from nemo_steerlm.megatron import parallel
from nemo_steerlm.megatron.drawing import SamplingSettings
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.progress import Progress
from nemo_steerlm.speakers import ASSISTANT


def held_out(
    model: AttributeConditionedGPT, files: Sequence[str], config: SteeringConfig, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Labelled rows to compute losses of, and prompts to answer, each at most as many as `config` asks for.

    A prompt is a row up to its last user turn; one that leaves no room for an answer is left out.

    Raises:
        DataError: a damaged file.
    """
    schema, longest = _schema(model), model.card.architecture.max_position_embeddings

    def rows() -> Iterable[Conversation]:
        for path in files:
            yield from read_conversations(path, schema)

    def fits(prompt: Conversation) -> bool:
        return len(model.prompt_tokens(prompt, schema.defaults())) + config.max_new_tokens <= longest

    labelled = draw((row for row in rows() if row.type and trained_turns(row)), config.rows, seed)
    questions = {tuple(turn.text for turn in one.turns): one for row in rows() if (one := prompt_of(row))}
    chosen = draw(questions.values(), 2 * config.prompts, seed)  # twice as many: some may not fit
    return labelled, [prompt for prompt in chosen if fits(prompt)][: config.prompts]


def prompt_of(row: Conversation) -> Conversation | None:
    """A row up to the last turn that a model may answer, None where there is none."""
    last = max((i for i, turn in enumerate(row.turns) if turn.speaker in row.masked_speakers), default=-1)
    return dataclasses.replace(row, turns=row.turns[: last + 1]) if last >= 0 else None


def listening(
    model: AttributeConditionedGPT, rows: Sequence[Conversation], seed: int, by_attribute: bool = True
) -> Listening | None:
    """Label information of held-out responses to a policy, teacher-forced; nothing is generated.

    Args:
        model: the policy.
        rows: labelled conversations that it was not trained on.
        seed: of the permutation of labels, and of the intervals.
        by_attribute: also permute each attribute alone.

    Returns:
        loss (nats a response at the true labels); permuted, none: `label_information` with the labels of other
        responses, and with no attribute string; attributes: {NAME: the same with this attribute's values permuted};
        and how many rows were read. None where no row is short enough.
    """
    template, schema, longest = model.card.template, _schema(model), model.card.architecture.max_position_embeddings
    encode = partial(template.encode_policies, schema=schema, tokenizer=model.tokenizer)
    rows = [row for row, (ids, _) in zip(rows, encode([(row, True) for row in rows])) if len(ids) <= longest]
    labels = [turn.label or {} for row in rows for turn in row.turns]
    names = [name for name in schema.names if by_attribute and any(name in label for label in labels)]
    shown = {
        "true": [(row, True) for row in rows], "none": [(row, False) for row in rows],
        **{way: [(row, True) for row in with_other_labels(rows, seed, name)]
           for way, name in (("permuted", None), *((f"attribute {name}", name) for name in names))},
    }  # fmt: skip
    texts = [pair for way in shown.values() for pair in encode(way)]
    if not texts:
        return None
    ranks = parallel.data_parallel()[1]
    with Progress("listening", len(texts), "texts read", shown=parallel.is_rank_zero()) as bar:
        sums = model.losses(texts, progress=lambda count: bar.update(min(count * ranks, len(texts) - bar.done)))
    table = dict(zip(shown, sums.reshape(len(shown), len(rows))))
    responses = np.array([len(trained_turns(row)) for row in rows])
    found = {
        way: label_information(table["true"], losses, responses, seed=seed)
        for way, losses in table.items()
        if way != "true"
    }
    return {
        "rows": len(rows),
        "loss": float(table["true"].sum() / responses.sum()),
        "permuted": found["permuted"],
        "none": found["none"],
        "attributes": {name: found[f"attribute {name}"] for name in names},
    }


def answer(
    model: AttributeConditionedGPT, prompts: Sequence[Conversation], requests: Sequence[Request],
    settings: SamplingSettings, batch_size: int,
) -> list[str]:  # fmt: skip
    """One answer to each request; in greedy decoding equal requests are answered once.

    Each data-parallel rank answers its share.
    """
    keys = [
        (request.prompt, tuple(request.values.items()), 0 if settings.temperature == 0 else number)
        for number, request in enumerate(requests)
    ]
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    wanted = sorted(first.values())
    rank, ranks = parallel.data_parallel()
    mine = [requests[number] for number in wanted[rank::ranks]]
    tokens = [model.prompt_tokens(prompts[request.prompt], request.values or None) for request in mine]
    with Progress("answering", len(wanted), "answers", shown=parallel.is_rank_zero()) as bar:
        drawn = model.sample(
            tokens, settings, seeds=[settings.seed + number for number in wanted[rank::ranks]], batch_size=batch_size,
            progress=lambda count, _: bar.update(min(count * ranks, len(wanted) - bar.done)),
        )  # fmt: skip
    shares = parallel.gather_data_parallel([model.response(one) for one in drawn])
    texts = {number: shares[i % ranks][i // ranks] for i, number in enumerate(wanted)}
    return [texts[first[key]] for key in keys]


def answered(prompts: Sequence[Conversation], requests: Sequence[Request], texts: Sequence[str]) -> list[Conversation]:
    """Each request's prompt with its answer, as a scorer reads it."""
    found = []
    for request, text in zip(requests, texts, strict=True):
        prompt = prompts[request.prompt]
        name = next((prompt.turns[index].speaker for index in prompt.response_indices), ASSISTANT)
        found.append(dataclasses.replace(prompt, turns=[*prompt.turns, Turn(name, text)]))
    return found


def measure(
    rows: Sequence[Conversation], names: Sequence[str], measures: Mapping[str, str], schema: AttributeSchema,
    model: AttributeConditionedGPT, compute: ComputeConfig, layout: ParallelConfig,
) -> dict[str, Floats]:  # fmt: skip
    """Scores `[n]` of answered conversations by name, that of the attribute where a score measures one.

    Args:
        rows: each ends with the answer.
        names: the scorers, see `SteeringConfig.scorers`.
        measures: attribute to the score that stands for it.
        schema: the attributes.
        model: the policy, whose tokenizer counts (its weights are not needed).
        compute, layout: for regressors.

    Raises:
        ConfigError: no such scorer or score, or two scorers give the same one.
    """
    columns: dict[str, Floats] = {}
    for name in names:
        found = _scores(name, rows, model, compute, layout)
        for key in dict.fromkeys(key for one in found for key in one):
            if key in columns:
                raise ConfigError(f"scorers: {name} gives '{key}', which another one gives too; leave one out")
            columns[key] = np.array([one.get(key, np.nan) for one in found], np.float64)
    for attribute, key in measures.items():
        if key not in columns:
            hint = suggest(key, list(columns))
            raise ConfigError(f"measures.{attribute}={key}: no scorer gives it{hint}; there are {', '.join(columns)}")
        columns[schema[attribute].name] = columns[key]
    ordered = [name for name in schema.names if name in columns]
    return {name: columns[name] for name in (*ordered, *(key for key in columns if key not in ordered))}


def check_scorers(names: Sequence[str]) -> None:
    """Refuse an unusable scorer before anything is computed.

    Raises:
        ConfigError: there is no such scorer, or a library of the text measures is missing.
        CheckpointError: the model folder is damaged, or not of a regressor.
    """
    for name in names:
        kind = _kind(name)
        if kind == "text":
            scorers.text_measures([], len)
        elif kind == "python":
            scorers.from_python(name)
        elif kind == "regressor" and Path(name).is_dir():
            AttributeRegressor.check_kind(model_folder.read(name), Path(name))


def _kind(name: str) -> str:
    if name in ("text", "oracle"):
        return name
    if name.startswith(("http://", "https://")):
        return "service"
    if model_folder.is_model_folder(name) or (name.endswith(".nemo") and Path(name).is_file()):
        return "regressor"
    if ":" in name and not Path(name).exists():
        return "python"
    raise ConfigError(
        f"scorer {name}: expected the model folder of a regressor, text, oracle, MODULE:FUNCTION or http://..."
    )


def _scores(
    name: str, rows: Sequence[Conversation], model: AttributeConditionedGPT, compute: ComputeConfig,
    layout: ParallelConfig,
) -> Scores:  # fmt: skip
    kind = _kind(name)
    if kind == "regressor":
        return _regressor_scores(name, rows, compute, layout)
    if kind == "text":
        return scorers.text_measures(rows, lambda text: len(model.tokenizer.encode(text)))
    if kind == "oracle":
        return scorers.oracle_scores(rows)
    return (scorers.from_service if kind == "service" else scorers.from_python)(name)(rows)


def _regressor_scores(
    folder: str, rows: Sequence[Conversation], compute: ComputeConfig, layout: ParallelConfig
) -> Scores:
    judge = AttributeRegressor.from_pretrained(folder, parallel=layout, precision=compute.precision)
    longest = judge.card.architecture.max_position_embeddings
    with contextlib.closing(judge):
        texts = judge.card.template.encode_regressions([(row, len(row.turns) - 1) for row in rows], judge.tokenizer)
        fit = [number for number, ids in enumerate(texts) if len(ids) <= longest]
        values = judge.predict_over_ranks([texts[number] for number in fit])
    found: Scores = [{} for _ in rows]
    for number, row in zip(fit, values):
        found[number] = dict(zip(judge.schema.names, map(float, row), strict=True))
    if not fit:
        raise DataError(f"scorer {folder}: every answer is longer than its {longest} tokens")
    return found


def _schema(model: AttributeConditionedGPT) -> AttributeSchema:
    if model.card.schema is None:
        raise ConfigError("this is a plain language model, which knows no attributes to steer; run train-sft first")
    return model.card.schema
