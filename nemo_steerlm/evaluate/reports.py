"""The types of a report.json: evaluate/ measures them, verbs/ combine them, and report/ shows them."""

from __future__ import annotations

from typing import Any, TypedDict

Figure = Any  # a float, NaN where there is none; None for NaN after `metrics.json_ready`, as on disk
Interval = list[Figure]  # [low, high]
Matrix = dict[str, dict[str, Figure]]  # requested, measured


class Change(TypedDict):
    """A mean difference of two measurements, over n prompts or responses."""

    gain: Figure
    interval: Interval
    n: int


# -- steering ---------------------------------------------------------------------------------------------------------


class Cost(Change):
    """The change of quality where this level of one attribute is requested."""

    level: int


class Point(TypedDict):
    """The mean measured value at one requested level."""

    level: int
    mean: Figure
    interval: Interval
    n: int


class _Response(TypedDict):
    spearman: Figure
    interval: Interval
    n: int
    per_prompt: Figure
    per_prompt_interval: Interval
    slope: Figure
    slope_interval: Interval
    reached: Interval
    monotone: bool
    curve: list[Point]


class Response(_Response, total=False):
    """How one attribute responds to requests; `steerability.steerability` defines each figure."""

    identical: Figure


class Sweep(TypedDict):
    """Requested against measured values, by attribute."""

    steerability: dict[str, Response]
    cross_talk: Matrix
    cross_talk_rank: Matrix


class Listening(TypedDict):
    """Label information of held-out responses to a policy, in nats per response."""

    rows: int
    loss: Figure
    permuted: Change
    none: Change
    attributes: dict[str, Change]


class Verdict(TypedDict):
    """Whether a policy listens and obeys, in words and by attribute; None: it was not measured."""

    words: str
    listens: bool | None
    obeys: list[str]
    disobeys: list[str]


class Answers(TypedDict):
    """Figures of useless answers, whatever was requested."""

    n: int
    empty: int
    distinct_2: Figure


class Asked(Answers, total=False):
    """The same of one way of asking."""

    asked: str
    spearman: Figure


class Sample(TypedDict):
    """An answer for people to read."""

    prompt: str
    requested: dict[str, float]
    response: str
    measured: dict[str, float] | None


class Steering(TypedDict, total=False):
    """The figures of a policy's sweeps; the first sweep in full."""

    steerability: dict[str, Response]
    cross_talk: Matrix
    cross_talk_rank: Matrix
    ways: dict[str, dict[str, Response]]
    requests: list[Asked]
    costs: dict[str, list[Cost]]
    samples: list[Sample]


# -- the regressor ----------------------------------------------------------------------------------------------------


class DatasetReport(TypedDict):
    """A regressor on one dataset, or on all of them together; `grouped.figures` defines an attribute's figures."""

    n: int
    groups: int
    attributes: dict[str, dict[str, Any]]


# -- step 4 -----------------------------------------------------------------------------------------------------------


class ArmChange(Change):
    """The change by one arm of step 4: of the mean of the target attributes, and of each attribute."""

    attributes: dict[str, Change]


class BootstrapReport(ArmChange, total=False):
    """The report.json of a bootstrap: its change, that of the control arm, and the counts of each round."""

    rounds: list[dict[str, Any]]
    control: ArmChange


# -- a page of results ------------------------------------------------------------------------------------------------


class Bar(TypedDict):
    """A line about a bar.

    Attributes:
        name: of the figure.
        detail: the attribute that decided.
        value: the figure.
        text: the figure as shown.
        wanted: the bar as shown.
        reached: None for a figure that is shown without a bar.
    """

    name: str
    detail: str
    value: Figure
    text: str
    wanted: str
    reached: bool | None


class Results(Steering, total=False):
    """The content of `report.results_page.write_report`; a part that is absent or empty has no section.

    Attributes:
        title, summary: text at the top of the page.
        attributes: `AttributeSchema.to_dict()`: order, ranges, defaults.
        regressor: `agreement.attribute_metrics`, with that of the human labels under "human", if there are any.
        listening: `steering.listening`.
        measured_by: the scorer of the answers; the oracle when absent.
        scales: the score that measures an attribute, where it has another scale.
        quality: the score whose change `costs` are.
        label_source: steerability by the source of the labels: none, permuted, human, predicted.
        bootstrap: its numbers and texts other than the change are shown in a line.
        preference: {rows: [{name, level, n, model | longer | tfidf: {accuracy, interval, ties, strict}}],
            notes: [text]}.
        seconds: of each step, and "total".
        settings: nested, with seed and versions (of packages).
        bars: as `bars.check_bars` returns them; computed when absent.
        samples: those of one prompt that follow each other are shown together. Not in report.json.
        arrays: {regressor: {predicted, target, human or None}}, each [n, K] in the order of `attributes`; trainings:
            {NAME: what `report.training.losses` returns}. Not in report.json.
    """

    title: str
    summary: str
    attributes: dict[str, dict[str, Any]]
    regressor: dict[str, dict[str, Any]]
    verdict: Verdict
    listening: Listening | None
    measured_by: str
    scales: dict[str, str]
    quality: str | None
    label_source: dict[str, dict[str, Response]]
    bootstrap: BootstrapReport
    preference: dict[str, Any]
    seconds: dict[str, float]
    settings: dict[str, Any]
    seed: int
    versions: dict[str, str]
    bars: list[Bar]
    arrays: dict[str, Any]
