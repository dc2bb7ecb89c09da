"""How often a score prefers what annotators prefer, by the rules of each benchmark.

A comparison counts as the probability that its best score is a chosen answer's, ties broken at random: 1, 0, and one
half for a pair with equal scores. The interval of a subset is Wilson's at the number of its prompts (which does not
collapse where all are right); averages of subsets have a bootstrap interval that resamples prompts.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import PreferenceConfig, choices
from nemo_steerlm.data.benchmarks import PRIOR_SETS, RM_BENCH, Comparison
from nemo_steerlm.errors import ConfigError, suggest

Floats = NDArray[np.float64]
#: Of each comparison the scores of the chosen answers and of the rejected ones.
Scores = Sequence[tuple[Floats, Floats]]

RESAMPLES = 1000
TIES = "ties"

#: RewardBench (arXiv 2403.13787; allenai/reward-bench, rewardbench/constants.py): a section is the mean of its
#: subsets weighted by their rows, math-prm counted 984 times (it has 447 rows) so that mathematics weighs as much as
#: code. The two xstest subsets have the rows of the published data (154 unsafe prompts, 250 safe ones); constants.py
#: had them exchanged when it was read (commit a32e272).
REWARDBENCH: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
    "Prior Sets": dict.fromkeys(PRIOR_SETS, 1),
}  # fmt: skip
#: The leaderboard's average over the sections that are there (analysis/get_benchmark_results.py).
REWARDBENCH_WEIGHTS = {"Chat": 2, "Chat Hard": 2, "Safety": 2, "Reasoning": 2, "Prior Sets": 1}

#: Weights that combine HelpSteer2's attributes into one reward: appendix H of arXiv 2406.08673 and the model cards of
#: Nemotron-4-340B-Reward and Llama3-70B-SteerLM-RM. They were searched on RewardBench itself.
PRESETS: dict[str, dict[str, float]] = {
    "nemotron_4_340b": {
        "helpfulness": 0.3, "correctness": 0.74, "coherence": 0.46, "complexity": 0.47, "verbosity": -0.33,
    },
    "llama3_70b": {
        "helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45, "complexity": 0.55, "verbosity": -0.4,
    },
}  # fmt: skip
assert tuple(PRESETS) == choices(PreferenceConfig, "preset")
#: The default, which suits every benchmark here. Helpfulness alone beats five attributes on RewardBench
#: (arXiv 2410.01257).
_DEFAULT = {"quality": 1.0, "helpfulness": 1.0, "toxicity": -1.0}


def default_weights(schema: AttributeSchema) -> dict[str, float]:
    """Quality and helpfulness for, toxicity against, as far as the schema has them; else all attributes alike."""
    return {name: weight for name, weight in _DEFAULT.items() if name in schema} or dict.fromkeys(schema.names, 1.0)


def check_weights(weights: Mapping[str, float], schema: AttributeSchema, key: str) -> dict[str, float]:
    """Return the weights after checking their names.

    Args:
        weights: by attribute.
        schema: the regressor's attributes.
        key: the setting they come from, begins the message.

    Raises:
        ConfigError: an attribute that the regressor does not predict, or no weight but zero.
    """
    for name in weights:
        if name not in schema:
            raise ConfigError(
                f"{key}: the regressor predicts no '{name}'{suggest(name, schema.names)} (it predicts "
                f"{', '.join(schema.names)}); give others, e.g. preference.weights={{{schema.names[0]}: 1}}"
            )
    if not any(weights.values()):
        raise ConfigError(f"{key}: every weight is zero; no answer would be preferred to another")
    return {name: float(weight) for name, weight in weights.items()}


def scalar(values: Floats, weights: Mapping[str, float], schema: AttributeSchema) -> Floats:
    """One score `[n]` from attribute values `[n, K]` in schema order."""
    return np.asarray(values, np.float64) @ np.array([weights.get(name, 0.0) for name in schema.names])


# -- figures with intervals -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, its values over resampled prompts `[RESAMPLES]`, and its interval.

    Attributes:
        value: the figure.
        draws: the figure of each resample.
        interval: 95 %, low and high.
        n: comparisons behind it.
        ties: comparisons in which a chosen and a rejected answer share the best score.
        strict: the figure with ties counted as lost, as on most leaderboards.
    """

    value: float
    draws: Floats
    interval: tuple[float, float]
    n: int
    ties: int
    strict: float


def wilson(accuracy: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean of n values in [0, 1]; for values between 0 and 1 it is rather too wide."""
    z = 1.959963984540054
    middle = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def combine(parts: Sequence[Estimate], weights: Sequence[float] | None = None) -> Estimate:
    """The weighted mean of figures of different prompts; of one figure it is that figure, with its interval.

    Where no resample differs from another, as when all is right, the interval is the weighted mean of the parts'.
    """
    if len(parts) == 1:
        return parts[0]
    shares = np.asarray([1.0] * len(parts) if weights is None else weights) / (sum(weights) if weights else len(parts))
    draws = shares @ np.array([part.draws for part in parts])
    value = float(shares @ [part.value for part in parts])
    low, high = _percentiles(draws) if np.ptp(draws) > 1e-9 else shares @ [part.interval for part in parts]
    n, ties, strict = sum(p.n for p in parts), sum(p.ties for p in parts), float(shares @ [p.strict for p in parts])
    return Estimate(value, draws, (float(low), float(high)), n, ties, strict)


def win(chosen: Floats, rejected: Floats) -> float:
    """The probability that the best score is a chosen answer's, ties broken at random."""
    best = max(chosen.max(), rejected.max())
    wins = np.count_nonzero(chosen == best)
    return float(wins / (wins + np.count_nonzero(rejected == best)))


def _percentiles(draws: Floats) -> tuple[float, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def _units(rows: Sequence[Comparison]) -> tuple[NDArray[np.int64], int]:
    """Of each row the number of its unit, and how many units there are."""
    number: dict[str, int] = {}
    return np.array([number.setdefault(row.unit, len(number)) for row in rows]), len(number)


def _resamples(units: int, seed: int, subset: str) -> NDArray[np.int64]:
    """How often each unit is drawn, `[RESAMPLES, units]`; subsets of one size are drawn independently."""
    random = np.random.default_rng([seed, zlib.crc32(subset.encode())])
    return random.multinomial(units, np.full(units, 1 / units), RESAMPLES)


def _mean(
    rows: Sequence[Comparison], values: Sequence[float], strict: Sequence[float], ties: int, seed: int
) -> Estimate:
    unit, units = _units(rows)
    total, size = np.bincount(unit, values, units), np.bincount(unit, minlength=units)
    times = _resamples(units, seed, rows[0].subset)
    accuracy = float(np.mean(values))
    draws = (times @ total) / (times @ size)
    return Estimate(accuracy, draws, wilson(accuracy, units), len(rows), ties, float(np.mean(strict)))


def _wins(rows: Sequence[Comparison], scores: Scores, seed: int) -> Estimate:
    values = [win(*pair) for pair in scores]
    return _mean(rows, values, [value == 1 for value in values], sum(0 < value < 1 for value in values), seed)


def _ties_score(rows: Sequence[Comparison], scores: Scores, seed: int) -> Estimate:
    """RewardBench 2's figure for prompts with many right answers (arXiv 2506.01937; rewardbench/utils.py).

    `tied` rows have several right answers, the `ref` row of the same number one. 30 % each for all right answers
    above all wrong ones in `tied` and in `ref`; 20 % each for a gap between right and wrong in `tied`, and the smaller
    of both rows' gaps, wider than the spread among the right answers; 1 % for how much wider, through tanh.
    """
    number, units = _units(rows)
    table = np.full((units, 3), np.nan)  # gap of ref, gap of tied, spread of tied
    for row, unit, (right, wrong) in zip(rows, number, scores):
        gap = right.min() - wrong.max()
        if row.id.startswith("ref"):
            table[unit, 0] = gap
        else:
            table[unit, 1:] = gap, right.max() - right.min()
    times = np.concatenate([np.ones((1, units), np.int64), _resamples(units, seed, rows[0].subset)])
    ref, tied, spread = table.T
    both = ~np.isnan(ref + tied)
    smaller = np.minimum(ref, tied)
    with np.errstate(invalid="ignore", divide="ignore"):
        margin = np.nan_to_num(np.tanh(smaller / spread - 1))

    def share(hits: NDArray[Any], there: NDArray[np.bool_]) -> Floats:
        return (times @ np.where(there, hits, 0)) / np.maximum(times @ there.astype(np.int64), 1)

    figure = 0.3 * share(tied > 0, ~np.isnan(tied)) + 0.3 * share(ref > 0, ~np.isnan(ref))
    figure += 0.2 * share(tied > spread, both) + 0.2 * share(smaller > spread, both) + 0.01 * share(margin, both)
    ties = sum(float(right.min()) == float(wrong.max()) for right, wrong in scores)
    value = float(figure[0])  # strict by its definition
    return Estimate(value, figure[1:], _percentiles(figure[1:]), len(rows), ties, value)


# -- one function a layout: rows of the table -------------------------------------------------------------------------

Table = list[tuple[str, str, Estimate]]  # name, level (subset, section or overall), figure


def accuracies(layout: str, comparisons: Sequence[Comparison], scores: Scores, seed: int = 0) -> Table:
    """The table of a benchmark.

    Args:
        layout: one of `data.benchmarks.LAYOUTS`.
        comparisons: the rows.
        scores: of each row the scores of its chosen and rejected answers.
        seed: of the resampling.

    Returns:
        (name, level, figure) in display order: subsets, then their section, overall figures last.
    """
    assert len(comparisons) == len(scores), (len(comparisons), len(scores))
    groups: dict[str, tuple[list[Comparison], list[tuple[Floats, Floats]]]] = {}
    for row, pair in zip(comparisons, scores):
        members = groups.setdefault(row.subset, ([], []))
        members[0].append(row)
        members[1].append(pair)
    if layout == "rm_bench":
        return _rm_bench(groups, seed)
    judge: Callable[..., Estimate]
    subsets = {}
    for name, members in groups.items():
        judge = _ties_score if layout == "rewardbench2" and name.lower() == TIES else _wins
        subsets[name] = judge(*members, seed)
    if layout == "rewardbench2":
        return [*_listed(subsets), ("average", "overall", combine(list(subsets.values())))]
    if layout == "rewardbench" and any(name in section for section in REWARDBENCH.values() for name in subsets):
        return _rewardbench(subsets)
    named = _listed(dict(sorted(subsets.items()))) if list(subsets) != [""] else []
    return [*named, ("all", "overall", _wins(comparisons, scores, seed))]


def _listed(subsets: Mapping[str, Estimate]) -> Table:
    return [(name or "(no subset)", "subset", figure) for name, figure in subsets.items()]


def _rewardbench(subsets: dict[str, Estimate]) -> Table:
    table: Table = []
    sections: dict[str, Estimate] = {}
    left = dict(subsets)
    for section, weights in REWARDBENCH.items():
        there = [name for name in weights if name in subsets]
        table += _listed({name: left.pop(name) for name in there})
        if there:
            sections[section] = combine([subsets[name] for name in there], [weights[name] for name in there])
            table.append((section, "section", sections[section]))
    overall = combine(list(sections.values()), [REWARDBENCH_WEIGHTS[name] for name in sections])
    others = _listed({f"{name} (in no section)": figure for name, figure in left.items()})
    return [*others, *table, ("average", "overall", overall)]


def _rm_bench(groups: Mapping[str, tuple[Sequence[Comparison], Scores]], seed: int) -> Table:
    """Easy, normal and hard: a fancier, equal or plainer style of the chosen answer (arXiv 2410.16184, section 3.4).

    A domain is the mean of the three, the average that of the domains. The rows of all domains that begin alike, as
    safety-refuse and safety-response do, are one domain (THU-KEG/RM-Bench, scripts/utils.py).
    """
    pooled: dict[str, tuple[list[Comparison], list[tuple[Floats, Floats]]]] = {}
    for name, (rows, scores) in sorted(groups.items()):
        domain = next((known for known in RM_BENCH if name.startswith(known)), name)
        members = pooled.setdefault(domain, ([], []))
        members[0].extend(rows)
        members[1].extend(scores)
    domains = {name: _three(*members, seed) for name, members in pooled.items()}
    table: Table = []
    for name, kinds in domains.items():
        table += [(f"{name or 'all'} {kind}", "subset", kinds[kind]) for kind in _KINDS]
        table.append((name or "all", "section", kinds["mean"]))
    averages = {kind: combine([kinds[kind] for kinds in domains.values()]) for kind in (*_KINDS, "mean")}
    return [*table, *(("average" if k == "mean" else f"average {k}", "overall", e) for k, e in averages.items())]


_KINDS = ("easy", "normal", "hard")


def _three(rows: Sequence[Comparison], scores: Scores, seed: int) -> dict[str, Estimate]:
    cells: dict[str, Callable[[Any], Any]] = {
        "easy": lambda m: np.tril(m, -1), "normal": np.diag, "hard": lambda m: np.triu(m, 1),
    }  # fmt: skip
    values, strict = ({kind: list[float]() for kind in _KINDS} for _ in range(2))
    ties = dict.fromkeys(_KINDS, 0)
    for chosen, rejected in scores:
        size = len(chosen)
        above = np.sign(chosen[:, None] - rejected[None, :])  # [chosen style, rejected style]
        count = {"easy": size * (size - 1) / 2, "normal": size, "hard": size * (size - 1) / 2}
        for kind, cut in cells.items():
            values[kind].append(0.5 + 0.5 * float(cut(above).sum()) / count[kind])
            strict[kind].append(float(cut((above > 0).astype(np.int64)).sum()) / count[kind])
            ties[kind] += int(cut((above == 0).astype(np.int64)).any())
    found = {kind: _mean(rows, values[kind], strict[kind], ties[kind], seed) for kind in _KINDS}
    mean, strictly = (np.mean([of[kind] for kind in _KINDS], axis=0).tolist() for of in (values, strict))
    return {**found, "mean": _mean(rows, mean, strictly, sum(ties.values()), seed)}


def beside(tables: Mapping[str, Table]) -> list[dict[str, Any]]:
    """One table from the tables of several scores: rows with name, level, n, and the figures of each score."""
    first = next(iter(tables.values()))
    figures: dict[str, Iterable[Estimate]] = {key: [e for _, _, e in table] for key, table in tables.items()}
    rows = []
    for (name, level, figure), *each in zip(first, *figures.values()):
        row: dict[str, Any] = {"name": name, "level": level, "n": figure.n}
        for key, one in zip(figures, each):
            row[key] = {"accuracy": one.value, "interval": list(one.interval), "ties": one.ties, "strict": one.strict}
        rows.append(row)
    return rows
