"""`steerlm evaluate task=steerability`: requested levels against measured ones, in every way of asking."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_steerlm.agreement import Floats
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import EvaluateConfig
from nemo_steerlm.conversation import Conversation, read_conversations, write_conversations
from nemo_steerlm.errors import ConfigError, DataError, suggest
from nemo_steerlm.evaluate.metrics import json_ready
from nemo_steerlm.evaluate.reports import Asked, Listening, Sample, Steering, Verdict
from nemo_steerlm.evaluate.steerability import (
    WAYS,
    Request,
    describe_answers,
    mean_spearman,
    plan_requests,
    setting_costs,
    steerability,
    verdict,
)
from nemo_steerlm.megatron import parallel
from nemo_steerlm.megatron.drawing import SamplingSettings
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.provenance import plain, versions, write_run_json
from nemo_steerlm.report.results_page import write_report
from nemo_steerlm.report.tables import interval, number, text_table
from nemo_steerlm.verbs.commands import after_steerability
from nemo_steerlm.verbs.steering import answer, answered, check_scorers, held_out, listening, measure

_SHOWN_PROMPTS = 3  # whose answers stand on the page
NOTHING = "nothing"  # a way of asking that is no sweep


@dataclass(frozen=True)
class Swept:
    """The requests of one way of asking, and the answers."""

    requests: list[Request]
    texts: list[str]


def sweep(
    model: AttributeConditionedGPT,
    prompts: Sequence[Conversation],
    ways: Sequence[str],
    settings: SamplingSettings,
    batch_size: int,
    levels: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Swept]:
    """Ask in each of these ways (of `WAYS`), or for nothing at all ("nothing")."""
    swept = {}
    for way in ways:
        if way == NOTHING:
            requests = [Request(attribute=None, level=None, prompt=i, values={}) for i in range(len(prompts))]
        else:
            requests = plan_requests(model.schema, len(prompts), levels=levels, way=way, seed=settings.seed)
        swept[way] = Swept(requests, answer(model, prompts, requests, settings, batch_size))
    return swept


def figures(
    prompts: Sequence[Conversation],
    swept: Mapping[str, Swept],
    columns: Mapping[str, Floats],
    schema: AttributeSchema,
    seed: int,
    quality: str | None = None,
) -> Steering:
    """The figures of sweeps that `write_report` shows; the first sweep in full.

    Args:
        prompts: the prompts that were answered.
        swept: the sweeps.
        columns: scores of all their answers by name, one sweep after another.
        schema: the attributes.
        seed: of the intervals.
        quality: the score by which the cost of a request is measured, if any.
    """
    found: Steering = {"requests": [], "ways": {}}
    start = 0
    for way, one in swept.items():
        own = {name: values[start : start + len(one.texts)] for name, values in columns.items()}
        start += len(one.texts)
        row: Asked = {"asked": WAYS.get(way, way), **describe_answers(one.texts)}
        if way != NOTHING:
            full = steerability(one.requests, own, schema, seed=seed, answers=one.texts)
            found["ways"][way] = full["steerability"]
            row["spearman"] = mean_spearman(full["steerability"])
            if "steerability" not in found:
                found |= full
                found["samples"] = _samples(prompts, one, own, schema)
                if quality is not None and way == "default":
                    found["costs"] = setting_costs(one.requests, own[quality], schema, seed=seed)
        found["requests"].append(row)
    return found


def _samples(
    prompts: Sequence[Conversation], swept: Swept, columns: Mapping[str, Floats], schema: AttributeSchema
) -> list[Sample]:
    """The answers of a few prompts at the lowest and the highest level of each attribute, prompt by prompt."""
    ends = {attribute.name: (attribute.low, attribute.high) for attribute in schema}
    rows = [
        (request.prompt, number)
        for number, request in enumerate(swept.requests)
        if request.prompt < _SHOWN_PROMPTS and request.attribute and request.level in ends[request.attribute]
    ]
    return [
        {
            "prompt": prompts[prompt].turns[-1].text,
            "requested": swept.requests[number].values,
            "response": swept.texts[number],
            "measured": {name: float(values[number]) for name, values in columns.items() if name in schema},
        }
        for prompt, number in sorted(rows)
    ]


# -- evaluate ---------------------------------------------------------------------------------------------------------


def evaluate(config: EvaluateConfig) -> str:
    """`task=steerability`: write the report into `config.output`, return its table and the verdict.

    Raises:
        ConfigError: a scorer or score that does not exist, or a model without attributes.
        DataError: no labelled row and no prompt is short enough.
    """
    settings, started = config.steerability, time.perf_counter()
    names = settings.scorers or ["text"]
    if settings.prompts:
        check_scorers(names)
    parallel.start(config)
    model = AttributeConditionedGPT.from_pretrained(
        str(config.checkpoint), parallel=config.parallel, precision=config.trainer.precision
    )
    with contextlib.closing(model):
        rows, prompts = held_out(model, config.inputs(), settings, config.seed)
        heard = listening(model, rows, config.seed) if rows else None
        sampling = SamplingSettings(
            max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, top_k=settings.top_k,
            stop=model.card.template.stops, seed=config.seed,
        )  # fmt: skip
        ways = [*settings.ways, NOTHING] if prompts else []
        swept = sweep(model, prompts, ways, sampling, settings.batch_size)
    if not rows and not prompts:
        raise DataError(f"{config.inputs()[0]}: no row with labels, and no prompt, is short enough for the model")
    answers = [row for one in swept.values() for row in answered(prompts, one.requests, one.texts)]
    columns: dict[str, Floats] = {}
    if answers:
        columns = measure(answers, names, settings.measures, model.schema, model, config.trainer, config.parallel)
    if not parallel.is_rank_zero():
        return ""
    quality = _quality(settings.quality, columns)
    found: Steering = figures(prompts, swept, columns, model.schema, config.seed, quality) if swept else {}
    told = verdict(heard and heard["permuted"], found.get("steerability", {}))
    scales = {name: key for name, key in settings.measures.items() if name != key}
    write_report(
        config.output,
        {
            "title": f"Steering of {plain(config.checkpoint)}", "summary": f"The policy {told['words']}.",
            "attributes": model.schema.to_dict(), "verdict": told, "listening": heard, **found,
            "measured_by": ", ".join(names), "scales": scales, "quality": quality,
            "seconds": {"total": round(time.perf_counter() - started, 1)}, "seed": config.seed,
            "settings": plain(config), "versions": versions(), "bars": [],
        },
        after_steerability(config, quality if quality and quality in model.schema else model.schema.names[0]),
    )  # fmt: skip
    _write_answers(Path(config.output) / "answers.jsonl", swept, answers, columns)
    write_run_json(config.output, "evaluate", config, config.inputs(), model.schema)
    return summary(told, heard, found, scales)


def _quality(asked: str | None, columns: Mapping[str, Floats]) -> str | None:
    if asked is not None and columns and asked not in columns:
        hint = suggest(asked, list(columns))
        raise ConfigError(f"steerability.quality={asked}: no scorer gives it{hint}; there are {', '.join(columns)}")
    return asked or next((name for name in ("quality", "helpfulness") if name in columns), None)


def _write_answers(
    path: Path, swept: Mapping[str, Swept], answers: Sequence[Conversation], columns: Mapping[str, Floats]
) -> None:
    """Write every answer with its request and scores, for people to read."""
    requests = [(way, request) for way, one in swept.items() for request in one.requests]
    rows = []
    for place, ((way, request), row) in enumerate(zip(requests, answers, strict=True)):
        measured = {name: json_ready(float(values[place])) for name, values in columns.items()}
        extra = {"way": way, "attribute": request.attribute, "requested": request.values, "measured": measured}
        rows.append(dataclasses.replace(row, id=f"{row.id}/{place}", extra=extra))
    write_conversations(path, rows)


def read_answers(path: str | Path, way: str) -> tuple[list[Request], list[Conversation]]:
    """The requests of one way of asking, and the rows of `answers.jsonl` for them, with their scores in `extra`."""
    rows = [row for row in read_conversations(path) if row.extra["way"] == way]
    places: dict[tuple[str, ...], int] = {}
    requests = []
    for row in rows:
        name, values = row.extra["attribute"], row.extra["requested"]
        prompt = places.setdefault(tuple(turn.text for turn in row.turns[:-1]), len(places))
        level = None if name is None else int(values[name])
        requests.append(Request(attribute=name, level=level, prompt=prompt, values=values))
    return requests, rows


def summary(told: Verdict, heard: Listening | None, found: Steering, scales: Mapping[str, str]) -> str:
    """The main figures as a table for the terminal, and the verdict below it."""
    lines = []
    worth = heard["attributes"] if heard else {}
    steered = found.get("steerability", {})
    names = list(dict.fromkeys([*worth, *steered]))
    if names:
        rows = []
        for name in names:
            one: Mapping[str, Any] = steered.get(name, {})
            label: Mapping[str, Any] = worth.get(name, {})
            reached = f"{number(one['reached'][0], 2)} to {number(one['reached'][1], 2)}" if one else ""
            identical = f"{one['identical']:.0%}" if one.get("identical") is not None else ""
            shown = f"{name} ({scales[name]})" if name in scales else name
            told_worth = [number(label.get("gain"), 2, sign=True)] if worth else []
            found_ = [number(one.get("spearman")), interval(one.get("interval")), one.get("monotone")]
            rows.append([shown, *told_worth, *found_, reached, identical])
        heads = ["attribute", *(["label worth, nats"] if worth else [])]
        heads += ["asked/measured ρ", "95% interval", "means rise", "means reached", "same answer"]
        lines.append(text_table(rows, heads))
    if heard is not None:
        bounds = interval(heard["permuted"]["interval"], 2)
        lines.append(
            f"labels are worth {number(heard['permuted']['gain'], 2)} nats a response ({bounds}) over those of other "
            f"responses, {number(heard['none']['gain'], 2)} over none"
        )
    for row in found.get("requests", []):
        if row["empty"]:
            lines.append(f"empty answers: {row['empty']} of {row['n']}, asked for {row['asked']}")
    lines.append(f"verdict: {told['words']}")
    return "\n".join(lines)
