"""Predicted against human labels by dataset, language and number of annotators: what the labels' noise allows.

The SteerLM paper (arXiv 2310.05344, section 3.2) holds that a regressor denoises the crowd's labels and leaves open
how far predicted and human labels agree. By classical test theory a correlation with noisy labels is at most the root
of their reliability, so r squared on rows the regressor was not trained on is a lower bound of the reliability. Where
rows tell how many people a label is the mean of, m, the squared residual is on average (error of the prediction) +
(variance of one person) / m: its slope on 1/m is the noise of one person, and gives the ceiling itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nemo_steerlm.agreement import Floats, levels
from nemo_steerlm.attributes import Attribute, AttributeSchema
from nemo_steerlm.calibration import least_squares
from nemo_steerlm.evaluate.grouped import figures, folds
from nemo_steerlm.evaluate.metrics import bootstrap_interval, json_ready
from nemo_steerlm.evaluate.page import picture, render, settings_section, table, write_folder
from nemo_steerlm.evaluate.pictures import Theme, both_themes, draw_arms
from nemo_steerlm.evaluate.regressor import with_bounds
from nemo_steerlm.evaluate.samples import Samples
from nemo_steerlm.evaluate.tables import interval, number, text_table

LEAST_ROWS = 30  # a language or number of annotators with fewer has no line of its own
KINDS = {"dataset": "Datasets", "language": "Languages", "annotators": "Numbers of annotators"}


def measure(samples: Samples, schema: AttributeSchema, *, seed: int = 0, resamples: int = 1000) -> dict[str, Any]:
    """`part_figures` by kind of part: {"dataset" | "language" | "annotators": {PART: {NAME: figures}}}."""
    people = np.array(["" if np.isnan(count) else f"{count:g}" for count in samples.people])
    columns = {"dataset": samples.dataset, "language": samples.language, "annotators": people}
    result: dict[str, Any] = {}
    for kind, column in columns.items():
        result[kind] = {}
        names, counts = np.unique(column[column != ""], return_counts=True)
        for name in names[np.argsort(-counts, kind="stable")].tolist():
            part = samples.where(column == name)
            if kind == "dataset" or len(part) >= LEAST_ROWS:
                result[kind][name] = _part(part, schema, seed, resamples)
    return result


def _part(samples: Samples, schema: AttributeSchema, seed: int, resamples: int) -> dict[str, Any]:
    result, fold = {}, folds(samples.group)
    for k, attribute in enumerate(schema):
        both = ~np.isnan(samples.predicted[:, k] + samples.label[:, k])
        if both.any():
            result[attribute.name] = part_figures(
                samples.where(both), k, attribute, fold[both], seed=seed, resamples=resamples
            )
    return result


def part_figures(
    samples: Samples, k: int, attribute: Attribute, fold: np.ndarray, *, seed: int, resamples: int
) -> dict[str, Any]:
    """One attribute of one part, whose rows all have a prediction and a label.

    Returns:
        n, groups, pearson, spearman, mae, kappa, bias with `interval`; higher, lower (share of rows whose prediction
        rounds above, below the label); entropy (bits of the rounded labels; log2 of the levels is the most); ties
        (share of labels at an exact half, which rounding decides); reliability_least (r squared); and where the number
        of annotators varies noise (standard deviation of one person's label, with interval) and ceiling (correlation
        that a perfect predictor would reach, NaN where no noise was found: residuals then do not shrink with people).
    """
    x, y = samples.predicted[:, k], samples.label[:, k]
    one = figures(x, y, samples.length, samples.group, fold, attribute, seed=seed, resamples=resamples)
    keys = ("n", "groups", "pearson", "spearman", "mae", "kappa", "bias")
    result: dict[str, Any] = {key: one[key] for key in keys}
    if "interval" in one:
        result["interval"] = {key: one["interval"][key] for key in keys if key in one["interval"]}
    x_level, y_level = levels(x, attribute), levels(y, attribute)
    share = np.unique(y_level, return_counts=True)[1] / len(y)
    result |= {
        "higher": float((x_level > y_level).mean()),
        "lower": float((x_level < y_level).mean()),
        "entropy": float(-(share * np.log2(share)).sum()) + 0.0,
        "ties": float((np.abs(y % 1 - 0.5) < 1e-9).mean()),
        "reliability_least": one["pearson"] ** 2,
    }
    return result | _noise(x, y, samples.people, samples.group, seed, resamples)


def _noise(x: Floats, y: Floats, people: Floats, group: np.ndarray, seed: int, resamples: int) -> dict[str, Any]:
    """Noise of one person and the ceiling, from how residuals shrink with the number of people; {} where it is one."""
    known = ~np.isnan(people)
    counts = np.unique(people[known], return_counts=True)[1]
    if (counts >= LEAST_ROWS).sum() < 2:
        return {}
    x, y, share, group = x[known], y[known], 1 / people[known], group[known]
    slope, intercept = least_squares(x, y)
    residual = (y - slope * x - intercept) ** 2
    variance, _ = least_squares(share, residual)
    noise = float(np.sqrt(max(variance, 0.0)))
    reliability = 1 - noise**2 * share.mean() / y.var() if variance > 0 and y.var() > 0 else np.nan
    result: dict[str, Any] = {"noise": noise, "ceiling": float(np.sqrt(np.clip(reliability, 0, 1)))}
    if resamples:
        place = np.unique(group, return_inverse=True)[1].reshape(-1)
        moments = (np.ones(len(x)), share, share**2, residual, share * residual)
        sums = [np.bincount(place, weights=column) for column in moments]

        def slope_of(*columns: Floats) -> float:
            n, u, uu, w, uw = (column.sum() for column in columns)
            spread = uu - u * u / n
            return float(np.sqrt(max(0.0, (uw - u * w / n) / spread))) if spread > 1e-12 else float("nan")

        result["noise_interval"] = bootstrap_interval(*sums, seed=seed, statistic=slope_of, resamples=resamples)
    return result


def summary_table(parts: Mapping[str, Any]) -> str:
    """The figures for a terminal: a line a part and attribute."""
    keys = ("spearman", "mae", "kappa", "higher", "lower", "entropy", "ties", "ceiling")
    rows = [
        [kind, name, attribute, one["n"], one["pearson"], interval((one.get("interval") or {}).get("pearson"), 2)]
        + [one.get(key) for key in keys]
        for kind, named in parts.items()
        for name, attributes in named.items()
        for attribute, one in attributes.items()
    ]
    head = ["by", "part", "attribute", "n", "Pearson", "95%", "Spearman", "MAE", "kappa", "higher", "lower", "entropy"]
    return text_table(rows, [*head, "ties", "ceiling"])


def write_report(folder: str | Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.html, report.json and the pictures.

    Args:
        folder: where to.
        data: `parts` (from `measure`), `attributes` (the schema's dict), `summary` (plain text), `settings`, `seed`,
            `versions`; all of it goes into report.json.

    Returns:
        The content of report.json.
    """
    report: dict[str, Any] = json_ready(data)
    parts = {kind: named for kind, named in report["parts"].items() if named}
    pictures = both_themes({kind: partial(_draw, named) for kind, named in parts.items() if any(named.values())})
    sections = [(kind, KINDS[kind], _section(kind, named, pictures.get(kind))) for kind, named in parts.items()]
    sections.append(("settings", "Settings", "".join(settings_section(report))))
    html = render("Predicted against human labels", str(report.get("summary") or ""), sections)
    write_folder(folder, html, report, pictures)
    return report


_TEXTS = {
    "dataset": (
        "Of rows the regressor was trained on the agreement is too good. Higher and lower: share of responses whose "
        "prediction rounds above or below the label. Entropy of the labels in bits. Ties: labels at an exact half, "
        "where rounding decides. The reliability of the labels is at least r squared; the ceiling is the correlation "
        "that a perfect predictor would reach, estimated where labels are means of different numbers of people."
    ),
    "language": f"All datasets together, by the row's own language; those with at least {LEAST_ROWS} responses.",
    "annotators": "By how many people a label is the mean of: where people are noisy, more of them agree better.",
}


def _section(kind: str, named: Mapping[str, Any], pair: tuple[bytes, bytes] | None) -> str:
    first = ["Attribute", KINDS[kind].removesuffix("s")]
    agreement = [*first, "#Pearson", "#Spearman", "#MAE", "#Kappa", "#Bias", "#Higher", "#Lower", "#n"]
    noise = [*first, "#Entropy", "#Ties", "#Reliability at least", "#Noise of one person", "#Ceiling"]
    agreement_rows, noise_rows = [], []
    for name, attributes in named.items():
        for attribute, one in attributes.items():
            start = [escape(attribute), escape(name)]
            bounded = [with_bounds(one, key) for key in ("pearson", "spearman", "mae", "kappa", "bias")]
            shares = [number(one[key], 2) for key in ("higher", "lower")]
            agreement_rows.append([*start, *bounded, *shares, number(one["n"])])
            labels = [number(one[key], 2) for key in ("entropy", "ties", "reliability_least")]
            person = with_bounds({**one, "interval": {"noise": one.get("noise_interval")}}, "noise")
            noise_rows.append([*start, *labels, person, number(one.get("ceiling"))])
    alt = f"Pearson correlation for each attribute by {kind}; figures in the table below"
    body = picture(alt, pair) + table(agreement, agreement_rows)
    return f"<p>{_TEXTS[kind]}</p>{body}<h3>What the labels allow</h3>" + table(noise, noise_rows)


def _draw(named: Mapping[str, Any], theme: Theme) -> Any:
    looks = zip((theme.blue, theme.orange, theme.green, theme.pink, theme.quiet), "Dso^v")
    arms = {}
    for (name, attributes), (colour, marker) in zip(named.items(), looks):  # five at most; the table has them all
        points = {
            attribute: {"pearson": one["pearson"], "interval": (one.get("interval") or {}).get("pearson")}
            for attribute, one in attributes.items()
        }
        arms[name] = (colour, marker, points)
    names = list(dict.fromkeys(attribute for attributes in named.values() for attribute in attributes))
    return draw_arms(names, arms, "pearson", "Pearson correlation of prediction and human label", theme)
