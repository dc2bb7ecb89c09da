"""A bar is reached when the figures say so, and never otherwise."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nemo_steerlm.report.bars import Bars, bar_rows, check_bars


def steering(*values: float | None, monotone: bool = True) -> dict[str, Any]:
    return {f"a{i}": {"spearman": value, "monotone": monotone} for i, value in enumerate(values)}


def verdicts(data: dict[str, Any], bars: Bars | None = None) -> list[tuple[bool | None, str]]:
    return [(line["reached"], line["detail"]) for line in check_bars(data, bars)]


@pytest.mark.parametrize(
    ("pearsons", "wanted"),
    [
        ((0.9, 0.95), [(True, "quality"), (True, "humor")]),
        ((0.899, 0.95), [(False, "quality"), (True, "humor")]),
        ((0.95, 0.9), [(True, "humor"), (False, "humor")]),  # as good as the human labels is not above them
        ((0.95, math.nan), [(False, "humor"), (False, "humor")]),
    ],
)
def test_regressor(pearsons: tuple[float, float], wanted: list[tuple[bool, str]]) -> None:
    human = {"quality": 0.8, "humor": 0.9}
    if pearsons[0] == 0.9:
        human["humor"] = 0.87
    data = {
        n: {"pearson": p, "human": {"pearson": human[n]}} for n, p in zip(("quality", "humor"), pearsons, strict=True)
    }
    assert verdicts({"regressor": data}) == wanted


def test_regressor_without_human_labels_has_one_line() -> None:
    assert verdicts({"regressor": {"quality": {"pearson": 0.91}}}) == [(True, "quality")]
    assert verdicts({"regressor": {"quality": {"pearson": 0.91}}}, Bars(pearson=0.95)) == [(False, "quality")]


def test_steering() -> None:
    assert verdicts({"steerability": steering(0.8, 0.97)}) == [(True, "a0"), (True, "2 attributes"), (True, "")]
    assert [one for one, _ in verdicts({"steerability": steering(0.79, 0.9)})] == [False, False, True]
    assert [one for one, _ in verdicts({"steerability": steering(None, 0.99)})] == [False, False, True]
    assert verdicts({"steerability": steering(0.9, monotone=False)})[2] == (False, "not a0")


def test_cross_talk_looks_beside_the_diagonal_only() -> None:
    table = {"a": {"a": 0.9, "b": 0.1}, "b": {"a": -0.2, "b": 0.05}}
    assert verdicts({"cross_talk": table}) == [(True, "b → a")]
    table["b"]["a"] = -0.201
    assert verdicts({"cross_talk": table}) == [(False, "b → a")]
    table["a"]["b"] = math.nan
    assert verdicts({"cross_talk": table}) == [(False, "a → b")]
    assert verdicts({"cross_talk": {"a": {"a": 0.9}}}) == []


def test_label_sources() -> None:
    sources = {"none": steering(0.0), "human": steering(0.8), "predicted": steering(0.85), "permuted": steering(0.1)}
    assert [one for one, _ in verdicts({"label_source": sources})] == [True, True, True]
    sources["predicted"] = steering(0.83)
    assert [one for one, _ in verdicts({"label_source": sources})] == [True, False, True]
    sources |= {"predicted": steering(0.79), "permuted": steering(-0.2)}
    assert [one for one, _ in verdicts({"label_source": sources})] == [False, False, False]
    sources["none"] = steering(None)
    assert verdicts({"label_source": sources})[0][0] is False
    assert verdicts({"label_source": {"predicted": steering(0.9)}}) == []


def test_step_four_is_shown_and_not_judged() -> None:
    arm = {"gain": -0.05, "interval": [-0.1, 0.01]}
    lines = check_bars({"bootstrap": {**arm, "control": arm}})
    assert bar_rows(lines) == [
        ["Step 4: gain", "−0.050", "–", "no bar"],
        ["Step 4: gain of the control arm", "−0.050", "–", "no bar"],
    ]
    assert lines[0]["detail"] == "−0.100 to +0.010" and lines[0]["value"] == -0.05


def test_nothing_measured_is_nothing_judged() -> None:
    assert check_bars({}) == check_bars({"regressor": {}, "bootstrap": None}) == []
