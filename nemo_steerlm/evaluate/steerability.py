"""Does a policy do what it is asked? Sweeps every attribute and compares the requested with the measured values.

`plan_requests` lists what to ask, the policy answers, an oracle or a regressor measures the answers, `steerability`
turns the measurements into figures. Means for each level say little on their own (a policy that barely reacts still
has them in order), therefore the main figure is the rank correlation over single samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nemo_steerlm.agreement import Floats, spearman
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.evaluate.metrics import bootstrap_interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One answer to ask a policy for.

    Attributes:
        attribute: the attribute that is swept.
        level: the value asked of it.
        prompt: index of the prompt, from 0.
        values: what the policy is told: `level` for `attribute`, and the others' defaults or nothing of them.
    """

    attribute: str
    level: int
    prompt: int
    values: dict[str, float]


def plan_requests(
    schema: AttributeSchema,
    prompts: int,
    defaults: Mapping[str, float] | None = None,
    levels: Mapping[str, Sequence[int]] | None = None,
    alone: bool = False,
) -> list[Request]:
    """Lists the sweep: every attribute over its levels on every prompt, the other attributes at their default.

    Args:
        schema: the attributes.
        prompts: how many prompts there are.
        defaults: values that differ from the schema's own defaults.
        levels: for some attributes, the levels to ask for instead of every whole number from low to high.
        alone: leave the other attributes out.

    Returns:
        Requests ordered by attribute (schema order), then level, then prompt.

    Raises:
        ConfigError: no prompt, or a name in `levels` that the schema does not have.
        DataError: a default or level outside its range.
    """
    if prompts < 1:
        raise ConfigError(f"a steerability sweep needs at least 1 prompt, got {prompts}")
    levels = {schema[name].name: chosen for name, chosen in (levels or {}).items()}
    base = {} if alone else {**schema.defaults(), **schema.check(defaults or {}, "defaults of the sweep")}
    requests = []
    for attribute in schema:
        for level in levels.get(attribute.name, range(attribute.low, attribute.high + 1)):
            values = schema.check({**base, attribute.name: level}, "levels of the sweep")
            requests += [
                Request(attribute=attribute.name, level=level, prompt=prompt, values=values)
                for prompt in range(prompts)
            ]
    return requests


def steerability(
    requests: Sequence[Request],
    measured: ArrayLike,
    schema: AttributeSchema,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Compares what was asked with what was measured.

    Args:
        requests: what was asked, any order; attributes that are never swept are left out of the result.
        measured: values `[n, K]` of the answers in schema order, NaN where there is none.
        schema: the K attributes.
        seed: of the bootstrap, which resamples prompts with all their answers.
        confidence: mass inside the intervals.
        resamples: number of draws.

    Returns:
        Two keys that go into report.json as they are.
        "steerability": for each name: spearman (requested vs measured over single samples), interval, n, monotone
        (whether the means rise strictly from level to level), curve: [{level, mean, interval, n}] by rising level.
        "cross_talk": cross_talk[i][j] = slope of measured j for each step of the requested level of i (least squares
        over single samples).
    """
    measured_NK = np.asarray(measured, np.float64)
    assert measured_NK.shape == (len(requests), len(schema)), (measured_NK.shape, len(requests), len(schema))
    result: dict[str, Any] = {"steerability": {}, "cross_talk": {}}
    for k, name in enumerate(schema.names):
        rows = [row for row, request in enumerate(requests) if request.attribute == name]
        if not rows:
            continue
        asked = [requests[row] for row in rows]
        level_N = np.array([request.level for request in asked], np.float64)
        result["cross_talk"][name] = {
            other: _slope(level_N, measured_NK[rows, j]) for j, other in enumerate(schema.names)
        }
        level_PM, measured_PM = _by_prompt([request.prompt for request in asked], level_N, measured_NK[rows, k])
        levels = sorted({request.level for request in asked})

        def statistics(level: Floats, value: Floats, levels: Sequence[int] = tuple(levels)) -> list[float]:
            return [_spearman(level, value), *_means(level, value, levels)]

        whole = statistics(level_PM, measured_PM)
        low, high = bootstrap_interval(
            level_PM, measured_PM, statistic=statistics, seed=seed, confidence=confidence, resamples=resamples
        )
        there = ~np.isnan(measured_PM)
        result["steerability"][name] = {
            "spearman": whole[0],
            "interval": [float(low[0]), float(high[0])],
            "n": int(there.sum()),
            "monotone": bool(len(levels) > 1 and np.all(np.diff(whole[1:]) > 0)),
            "curve": [
                {
                    "level": level,
                    "mean": whole[i],
                    "interval": [float(low[i]), float(high[i])],
                    "n": int((there & (level_PM == level)).sum()),
                }
                for i, level in enumerate(levels, start=1)
            ],
        }
    return result


def describe_answers(answers: Sequence[str]) -> dict[str, Any]:
    """Counts what makes answers useless whatever they were asked for.

    Returns:
        n; empty, the number without a word; distinct_2, the share of an answer's word pairs that occur once or for the
        first time in it, on average over the answers that have pairs (distinct-n of arXiv 1510.03055, by answer).
    """
    pairs = [list(zip(words, words[1:])) for words in (answer.lower().split() for answer in answers)]
    shares = [len(set(found)) / len(found) for found in pairs if found]
    return {
        "n": len(answers),
        "empty": sum(not answer.strip() for answer in answers),
        "distinct_2": fmean(shares) if shares else None,
    }


def _by_prompt(prompts: Sequence[int], *columns: Floats) -> list[Floats]:
    """Lays columns `[n]` out as `[prompts, most rows of a prompt]`, filled up with NaN."""
    rows: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    width = max(map(len, rows.values()))
    tables = [np.full((len(rows), width), np.nan) for _ in columns]
    for line, members in enumerate(rows.values()):
        for table, column in zip(tables, columns):
            table[line, : len(members)] = column[members]
    return tables


def _spearman(level: Floats, value: Floats) -> float:
    there = ~np.isnan(value)
    return spearman(level[there], value[there])


def _means(level: Floats, value: Floats, levels: Sequence[int]) -> list[float]:
    there = ~np.isnan(value)
    chosen = [value[there & (level == one)] for one in levels]
    return [float(values.mean()) if len(values) else np.nan for values in chosen]


def _slope(level: Floats, value: Floats) -> float:
    there = ~np.isnan(value)
    x, y = level[there], value[there]
    if len(x) < 2 or np.ptp(x) == 0:
        return float("nan")
    x = x - x.mean()
    return float(x @ (y - y.mean()) / (x @ x))
