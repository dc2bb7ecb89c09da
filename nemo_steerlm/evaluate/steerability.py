"""Does a policy do what it is asked? Sweeps every attribute and compares the requested with the measured values.

`plan_requests` lists the requests, the policy answers them, scorers measure the answers, `steerability` computes the
figures. Means for each level say little on their own (a policy that barely reacts still has them in order), therefore
the main figure is the rank correlation over single samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import numpy as np
from numpy.typing import ArrayLike

from nemo_steerlm import config
from nemo_steerlm.agreement import Floats, spearman
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.evaluate.metrics import bootstrap_interval, paired_difference
from nemo_steerlm.evaluate.reports import Answers, Change, Cost, Interval, Response, Sweep, Verdict

#: The ways of asking, and their names in a report.
WAYS = {
    "default": "one attribute, the others at their default",
    "alone": "one attribute alone",
    "all": "all attributes, each at a random level",
}
assert tuple(WAYS) == config.WAYS
OBEYS = 0.4  # least rank correlation of an attribute that is obeyed; its interval must be above 0 too


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One answer to ask a policy for.

    Attributes:
        attribute: the attribute that is swept; None where all are.
        level: the requested value.
        prompt: index of the prompt, from 0.
        values: the whole request: `level` for `attribute`, the others at their defaults or left out.
    """

    attribute: str | None
    level: int | None
    prompt: int
    values: dict[str, float]


def plan_requests(
    schema: AttributeSchema,
    prompts: int,
    defaults: Mapping[str, float] | None = None,
    levels: Mapping[str, Sequence[int]] | None = None,
    way: str = "default",
    seed: int = 0,
) -> list[Request]:
    """Lists the sweep: every attribute over its levels on every prompt.

    Args:
        schema: the attributes.
        prompts: how many prompts there are.
        defaults: values that differ from the schema's own defaults.
        levels: for some attributes, the levels to request instead of all from low to high.
        way: of `WAYS`. With "all", a prompt is asked as many times as the longest range has levels, and every
            attribute goes through its levels in an order of its own.
        seed: of these orders.

    Returns:
        Requests ordered by attribute (schema order), then level, then prompt; with "all" by prompt.

    Raises:
        ConfigError: no prompt, or a name in `levels` that the schema does not have.
        DataError: a default or level outside its range.
    """
    if prompts < 1:
        raise ConfigError(f"a steerability sweep needs at least 1 prompt, got {prompts}")
    chosen = {a.name: list(range(a.low, a.high + 1)) for a in schema}
    chosen |= {schema[name].name: list(own) for name, own in (levels or {}).items()}
    if way == "all":
        return _random_settings(schema, prompts, {name: own for name, own in chosen.items() if own}, seed)
    base = {} if way == "alone" else {**schema.defaults(), **schema.check(defaults or {}, "defaults of the sweep")}
    requests = []
    for name in schema.names:
        for level in chosen[name]:
            values = schema.check({**base, name: level}, "levels of the sweep")
            requests += [
                Request(attribute=name, level=level, prompt=prompt, values=values) for prompt in range(prompts)
            ]
    return requests


def _random_settings(
    schema: AttributeSchema, prompts: int, levels: Mapping[str, Sequence[int]], seed: int
) -> list[Request]:
    random, count = np.random.default_rng(seed), max(map(len, levels.values()))
    requests = []
    for prompt in range(prompts):
        orders = {name: np.resize(random.permutation(own), count) for name, own in levels.items()}
        orders = {name: random.permutation(order) for name, order in orders.items()}
        for number in range(count):
            values = schema.check({name: int(order[number]) for name, order in orders.items()}, "levels of the sweep")
            requests.append(Request(attribute=None, level=None, prompt=prompt, values=values))
    return requests


def steerability(
    requests: Sequence[Request],
    measured: Mapping[str, ArrayLike],
    schema: AttributeSchema,
    *,
    seed: int,
    answers: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> Sweep:
    """Compares requested with measured values.

    Args:
        requests: in any order; attributes that are never swept are left out of the result.
        measured: values `[n]` of the answers by name, NaN = missing. An attribute that is not among them is left out;
            other scores appear in the cross-talk alone.
        schema: the attributes.
        seed: of the bootstrap, which resamples prompts with all their answers.
        answers: their texts `[n]`, for "identical".
        confidence: mass inside the intervals.
        resamples: number of draws.

    Returns:
        Three keys that go into report.json as they are.
        "steerability": for each name: spearman (requested vs measured over single answers), interval, n; per_prompt
        (mean over the prompts of the rank correlation within each, 0 where all are equal) and per_prompt_interval;
        slope (of measured, for each level) and slope_interval; reached: [lowest, highest mean]; monotone (whether the
        means rise strictly from level to level); curve: [{level, mean, interval, n}] by rising level; identical (share
        of pairs of answers to one prompt, for different levels, that are the same text).
        "cross_talk": cross_talk[i][j] = slope of measured j for each step of the requested level of i (least squares
        over single answers). "cross_talk_rank": their rank correlation, which needs no common scale.
    """
    columns = {name: np.asarray(values, np.float64) for name, values in measured.items()}
    assert all(values.shape == (len(requests),) for values in columns.values()), "one value an answer"
    result: Sweep = {"steerability": {}, "cross_talk": {}, "cross_talk_rank": {}}
    for name in schema.names:
        rows = [row for row, request in enumerate(requests) if request.attribute in (name, None)]
        if not rows:
            continue
        level = np.array([requests[row].values[name] for row in rows], np.float64)
        result["cross_talk"][name] = {other: _slope(level, values[rows]) for other, values in columns.items()}
        result["cross_talk_rank"][name] = {other: _spearman(level, values[rows]) for other, values in columns.items()}
        if name in columns:
            prompts = [requests[row].prompt for row in rows]
            figures = _response(prompts, level, columns[name][rows], (seed, confidence, resamples))
            if answers is not None:
                figures["identical"] = _identical(prompts, level, [answers[row] for row in rows])
            result["steerability"][name] = figures
    return result


def _response(prompts: Sequence[int], level: Floats, value: Floats, draws: tuple[int, float, int]) -> Response:
    """How one attribute responds: the figures of one entry of "steerability" that are computed from values."""
    level_PM, value_PM = _by_prompt(prompts, level, value)
    each_P = np.array([_within(*pair) for pair in zip(level_PM, value_PM)])
    levels = sorted({int(one) for one in level})

    def statistics(level: Floats, value: Floats, each: Floats) -> list[float]:
        there = each[~np.isnan(each)]
        mean = float(there.mean()) if len(there) else np.nan
        return [_spearman(level, value), mean, _slope(level, value), *_means(level, value, levels)]

    seed, confidence, resamples = draws
    whole = statistics(level_PM, value_PM, each_P)
    low, high = bootstrap_interval(
        level_PM, value_PM, each_P, statistic=statistics, seed=seed, confidence=confidence, resamples=resamples
    )
    bounds: list[Interval] = [[float(one), float(other)] for one, other in zip(low, high)]
    means = np.array(whole[3:])
    there = ~np.isnan(value_PM)
    return {
        "spearman": whole[0],
        "interval": bounds[0],
        "n": int(there.sum()),
        "per_prompt": whole[1],
        "per_prompt_interval": bounds[1],
        "slope": whole[2],
        "slope_interval": bounds[2],
        "reached": [float(means.min()), float(means.max())],
        "monotone": bool(len(levels) > 1 and np.all(np.diff(means) > 0)),
        "curve": [
            {"level": one, "mean": whole[i], "interval": bounds[i], "n": int((there & (level_PM == one)).sum())}
            for i, one in enumerate(levels, start=3)
        ],
    }


def _within(level: Floats, value: Floats) -> float:
    """Rank correlation over the answers to one prompt: 0 where they all measure the same, NaN without two levels."""
    there = ~np.isnan(value)
    if len(set(level[there])) < 2:
        return float("nan")
    return _spearman(level, value) if np.ptp(value[there]) else 0.0


def _identical(prompts: Sequence[int], level: Floats, answers: Sequence[str]) -> float | None:
    by_prompt: dict[int, list[tuple[float, str]]] = {}
    for prompt, one, answer in zip(prompts, level, answers, strict=True):
        by_prompt.setdefault(prompt, []).append((one, answer))
    same = [
        one[1] == other[1] for found in by_prompt.values() for one, other in combinations(found, 2)
        if one[0] != other[0]
    ]  # fmt: skip
    return fmean(same) if same else None


def setting_costs(
    requests: Sequence[Request], quality: ArrayLike, schema: AttributeSchema, *, seed: int
) -> dict[str, list[Cost]]:
    """The change of the answers' quality at each level, against the defaults of all attributes.

    Args:
        requests: a sweep in the way "default", with the default among the levels.
        quality: measured values `[n]`, NaN = missing.
        schema: the attributes.
        seed: of the bootstrap over prompts.

    Returns:
        For each attribute [{level, gain, interval, n}] by rising level; empty without an answer at the defaults.
    """
    values, default = np.asarray(quality, np.float64), schema.defaults()
    base: dict[int, float] = {}
    for row, request in enumerate(requests):
        if request.values == default:
            base.setdefault(request.prompt, float(values[row]))
    costs: dict[str, list[Cost]] = {}
    for name in schema.names if base else []:
        asked = [(request, value) for request, value in zip(requests, values) if request.attribute == name]
        costs[name] = []
        for level in sorted({request.level for request, _ in asked if request.level is not None}):
            now = [(request.prompt, float(value)) for request, value in asked if request.level == level]
            found = paired_difference(
                list(base.values()), [value for _, value in now], seed=seed,
                prompts_before=list(base), prompts_after=[prompt for prompt, _ in now],
            )  # fmt: skip
            costs[name].append({"level": level, **found})
    return costs


def label_information(true: ArrayLike, other: ArrayLike, responses: ArrayLike, *, seed: int) -> Change:
    """How much less likely responses are to a policy under labels other than their own.

    With l(y | x, a) the negative log-likelihood of response y at labels a, the mean over the responses of
    l(y | x, a') - l(y | x, a). With the labels of other responses as a' it estimates the information that the policy
    takes from labels; a policy that does not listen has 0.

    Args:
        true: summed loss of each row at its own labels, `[n]` nats.
        other: at other labels.
        responses: number of responses of each row.
        seed: of the bootstrap over rows.

    Returns:
        gain in nats a response, interval, n (responses).
    """
    table = np.stack([np.asarray(other, np.float64) - np.asarray(true, np.float64), np.asarray(responses)], axis=1)

    def mean(rows: Floats) -> float:
        return float(rows[:, 0].sum() / rows[:, 1].sum())

    interval = bootstrap_interval(table, seed=seed, statistic=mean)
    return {"gain": mean(table), "interval": interval, "n": int(table[:, 1].sum())}


def verdict(listening: Change | None, steered: Mapping[str, Response]) -> Verdict:
    """Says in words whether a policy listens to its labels and obeys them.

    It listens where the label information (`label_information`) has an interval above 0, and it obeys an attribute
    whose rank correlation is at least `OBEYS` with an interval above 0.

    Args:
        listening: the label information; None where it was not measured.
        steered: "steerability" of the sweep.

    Returns:
        words, listens (bool, or None), obeys: [names], disobeys: [names].
    """
    obeys = [name for name, one in steered.items() if one["interval"][0] > 0 and one["spearman"] >= OBEYS]
    rest = [name for name in steered if name not in obeys]
    listens = None if listening is None else listening["interval"][0] > 0
    if listens is False and not obeys:
        words = "does not listen"
    elif not steered:
        words = "listens; whether it obeys was not measured" if listens else "was not measured"
    elif not obeys:
        words = "listens, does not obey yet: more steps" if listens else "does not obey"
    elif rest:
        words = f"listens, obeys in {', '.join(obeys)}, does not obey yet in {', '.join(rest)}: more steps"
    else:
        words = "listens and obeys"
    return {"words": words, "listens": listens, "obeys": obeys, "disobeys": rest}


def describe_answers(answers: Sequence[str]) -> Answers:
    """Measures signs of useless answers, whatever was requested.

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
    """Reshapes columns `[n]` to `[prompts, most rows of a prompt]`, padded with NaN."""
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


def mean_spearman(figures: Mapping[str, Response]) -> float | None:
    """Mean of the attributes' "spearman"; None when one of them does not exist."""
    values = [one["spearman"] for one in figures.values()]
    return fmean(values) if values and None not in values else None
