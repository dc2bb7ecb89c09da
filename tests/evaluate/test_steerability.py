"""The sweep's plan, and its figures on policies whose behaviour is known."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy import stats

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.evaluate.steerability import (
    Request,
    describe_answers,
    label_information,
    plan_requests,
    setting_costs,
    steerability,
    verdict,
)

SCHEMA = AttributeSchema.load(
    {
        "quality": {"high": 4, "default": 4}, "length": {"low": 1, "high": 3, "default": 1},
        "humor": {"high": 4, "default": 0},
    }
)  # fmt: skip


def answer(requests: list[Request], seed: int = 0, noise: float = 0.0) -> np.ndarray:
    """A policy that does as told, except that half of the humor asked for also shows in length."""
    rows = [list(request.values.values()) for request in requests]
    measured = np.array(rows) + np.random.default_rng(seed).normal(0, noise, (len(rows), 3))
    measured[:, 1] += 0.5 * measured[:, 2]
    return measured


def steer(requests: list[Request], measured: np.ndarray, **settings: Any) -> Any:
    return steerability(requests, dict(zip(SCHEMA.names, measured.T)), SCHEMA, seed=0, **settings)


def test_plan_sweeps_one_attribute_at_a_time_in_a_fixed_order() -> None:
    plan = plan_requests(SCHEMA, 2, defaults={"humor": 1})
    assert len(plan) == 2 * (5 + 3 + 5)
    assert [(request.attribute, request.level, request.prompt) for request in plan[8:13]] == [
        ("quality", 4, 0),
        ("quality", 4, 1),
        ("length", 1, 0),
        ("length", 1, 1),
        ("length", 2, 0),
    ]
    assert plan[10].values == {"quality": 4, "length": 1, "humor": 1}
    assert list(plan[-1].values.items()) == [("quality", 4), ("length", 1), ("humor", 4)]
    assert plan == plan_requests(SCHEMA, 2, defaults={"humor": 1})


def test_plan_takes_chosen_levels_and_refuses_impossible_ones() -> None:
    plan = plan_requests(SCHEMA, 1, levels={"quality": [0, 4], "length": []})
    assert [request.level for request in plan] == [0, 4, 0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="at least 1 prompt"):
        plan_requests(SCHEMA, 0)
    with pytest.raises(ConfigError, match="did you mean 'humor'"):
        plan_requests(SCHEMA, 1, levels={"humour": [1]})
    with pytest.raises(DataError, match="'length' is 4"):
        plan_requests(SCHEMA, 1, levels={"length": [4]})
    with pytest.raises(DataError, match="defaults of the sweep"):
        plan_requests(SCHEMA, 1, defaults={"humor": 9})


def test_an_obedient_policy() -> None:
    plan = plan_requests(SCHEMA, 10)
    result = steer(plan, answer(plan), resamples=50)
    for name, levels in {"quality": range(5), "length": range(1, 4), "humor": range(5)}.items():
        figures = result["steerability"][name]
        assert figures["spearman"] == pytest.approx(1) and figures["monotone"] is True
        assert figures["interval"] == pytest.approx([1, 1]) and figures["n"] == 10 * len(levels)
        assert [point["level"] for point in figures["curve"]] == list(levels)
        assert [point["mean"] for point in figures["curve"]] == pytest.approx(list(levels))
        assert all(point["n"] == 10 for point in figures["curve"])
    cross_talk = result["cross_talk"]
    for i in SCHEMA.names:
        for j in SCHEMA.names:
            wanted = 1 if i == j else 0.5 if (i, j) == ("humor", "length") else 0
            assert cross_talk[i][j] == pytest.approx(wanted, abs=1e-12), (i, j)


def test_figures_of_a_noisy_policy_against_scipy() -> None:
    plan = plan_requests(SCHEMA, 30)
    measured = answer(plan, noise=1.0)
    measured[np.random.default_rng(1).random(measured.shape) < 0.1] = math.nan
    order = list(range(len(plan)))
    random.Random(0).shuffle(order)
    result = steer([plan[i] for i in order], measured[order], resamples=300)
    rows = [i for i, request in enumerate(plan) if request.attribute == "humor"]
    asked = np.array([plan[i].level for i in rows])
    there = ~np.isnan(measured[rows, 2])
    humor = result["steerability"]["humor"]
    assert humor["n"] == there.sum() < 150
    assert humor["spearman"] == pytest.approx(stats.spearmanr(asked[there], measured[rows, 2][there])[0])
    assert humor["interval"][0] < humor["spearman"] < humor["interval"][1]
    for point in humor["curve"]:
        chosen = measured[rows, 2][there & (asked == point["level"])]
        assert point["mean"] == pytest.approx(chosen.mean()) and point["n"] == len(chosen)
        half = 1.96 * chosen.std() / math.sqrt(len(chosen))
        assert point["interval"] == pytest.approx([point["mean"] - half, point["mean"] + half], abs=0.15)
    there = ~np.isnan(measured[rows, 1])
    slope = np.polyfit(asked[there], measured[rows, 1][there], 1)[0]
    assert result["cross_talk"]["humor"]["length"] == pytest.approx(slope)


def test_the_interval_resamples_prompts_not_answers() -> None:
    """Answers of one prompt that err together carry less information than as many independent ones."""
    plan = plan_requests(SCHEMA, 20, levels={"quality": [], "length": []})
    shift = np.random.default_rng(0).normal(0, 2, 20)
    together = np.array([[0, 0, request.level + shift[request.prompt]] for request in plan])
    apart = together.copy()
    apart[:, 2] = [request.level + shift[(request.prompt + 4 * (request.level or 0)) % 20] for request in plan]
    widths = []
    for measured in (together, apart):
        curve = steer(plan, measured, resamples=400)["steerability"]["humor"]
        widths.append(curve["interval"][1] - curve["interval"][0])
    assert widths[0] != pytest.approx(widths[1], rel=0.05)


def test_an_indifferent_policy_and_one_that_says_nothing() -> None:
    plan = plan_requests(SCHEMA, 4)
    result = steer(plan, np.ones((len(plan), 3)), resamples=20)["steerability"]["quality"]
    assert math.isnan(result["spearman"]) and result["monotone"] is False
    assert [point["mean"] for point in result["curve"]] == [1] * 5
    result = steer(plan, np.full((len(plan), 3), math.nan), resamples=20)
    humor = result["steerability"]["humor"]
    assert humor["n"] == 0 and humor["monotone"] is False and math.isnan(humor["curve"][0]["mean"])
    assert math.isnan(result["cross_talk"]["humor"]["quality"])


def test_a_tie_or_a_step_back_is_not_monotone() -> None:
    plan = plan_requests(SCHEMA, 1, levels={"quality": [], "length": []})
    for values, wanted in (([0, 1, 2, 2, 3], False), ([0, 1, 3, 2, 4], False), ([0, 0.1, 0.2, 3, 4], True)):
        measured = np.array([[0, 0, value] for value in values])
        result = steer(plan, measured, resamples=5)
        assert list(result["steerability"]) == ["humor"]
        assert result["steerability"]["humor"]["monotone"] is wanted


def test_one_attribute_can_be_asked_for_alone() -> None:
    plan = plan_requests(SCHEMA, 2, way="alone")
    assert len(plan) == len(plan_requests(SCHEMA, 2))
    assert all(request.values == {request.attribute: request.level} for request in plan)


def test_empty_and_repetitive_answers_are_counted() -> None:
    found = describe_answers(["Stir it. Stir it. Stir it.", "One two three", "word", " \n", ""])
    assert (found["n"], found["empty"]) == (5, 2)
    assert found["distinct_2"] == pytest.approx((2 / 5 + 1) / 2)  # stir it., it. stir, again and again; no repetition
    assert describe_answers([""])["distinct_2"] is None


def test_all_attributes_are_asked_for_at_every_level_in_independent_orders() -> None:
    plan = plan_requests(SCHEMA, 200, way="all", seed=3)
    assert len(plan) == 200 * 5 and all(request.attribute is None for request in plan)
    for prompt in range(200):
        own = [request.values for request in plan if request.prompt == prompt]
        assert Counter(values["quality"] for values in own) == Counter(range(5))  # each level once
        assert set(values["length"] for values in own) == {1, 2, 3}
    asked = np.array([[request.values[name] for name in SCHEMA.names] for request in plan])
    assert abs(np.corrcoef(asked.T)[np.triu_indices(3, 1)]).max() < 0.1
    result = steer(plan, answer(plan), resamples=20)
    assert result["steerability"]["quality"]["spearman"] == pytest.approx(1)
    assert 0.4 < result["cross_talk"]["humor"]["length"] < 0.6


def test_what_was_reached_and_how_answers_move_within_a_prompt() -> None:
    """Prompts differ by more than levels: over single answers the correlation is weak, within a prompt it is whole."""
    plan = plan_requests(SCHEMA, 50, levels={"quality": [], "length": []})
    shift = np.random.default_rng(0).normal(0, 5, 50)
    measured = np.array([[0, 0, 0.5 * request.values["humor"] + shift[request.prompt]] for request in plan])
    humor = steer(plan, measured, resamples=200)["steerability"]["humor"]
    assert humor["spearman"] < 0.3 and humor["per_prompt"] == pytest.approx(1)
    assert humor["per_prompt_interval"] == pytest.approx([1, 1])
    assert humor["slope"] == pytest.approx(0.5) and humor["slope_interval"] == pytest.approx([0.5, 0.5])
    assert humor["reached"] == pytest.approx([shift.mean(), 2 + shift.mean()])
    measured[:, 2] = [shift[request.prompt] for request in plan]  # nothing moves
    assert steer(plan, measured, resamples=20)["steerability"]["humor"]["per_prompt"] == 0


def test_other_scores_show_in_cross_talk_and_what_is_not_measured_is_left_out() -> None:
    plan = plan_requests(SCHEMA, 5)
    words = [10.0 ** request.values["length"] for request in plan]
    result = steerability(plan, {"humor": answer(plan)[:, 2], "words": words}, SCHEMA, seed=0, resamples=5)
    assert list(result["steerability"]) == ["humor"]
    assert list(result["cross_talk"]["quality"]) == ["humor", "words"]
    assert result["cross_talk_rank"]["length"]["words"] == pytest.approx(1)
    assert math.isnan(result["cross_talk_rank"]["length"]["humor"])  # a constant


def test_the_same_answer_at_another_level_is_counted() -> None:
    plan = plan_requests(SCHEMA, 2, levels={"quality": [0, 4], "length": [], "humor": [0, 2, 4]})
    texts = ["same" if request.attribute == "quality" else str(max(request.level or 0, 2)) for request in plan]
    steered = steer(plan, answer(plan), resamples=5, answers=texts)["steerability"]
    assert steered["quality"]["identical"] == 1
    assert steered["humor"]["identical"] == pytest.approx(1 / 3)  # of 0, 2 and 4 the first two


def test_what_a_setting_costs_is_paired_by_prompt() -> None:
    plan = plan_requests(SCHEMA, 30)
    hard = np.random.default_rng(0).normal(0, 3, 30)
    quality = [hard[request.prompt] - 0.5 * request.values["humor"] for request in plan]
    costs = setting_costs(plan, quality, SCHEMA, seed=0)
    assert [point["level"] for point in costs["humor"]] == [0, 1, 2, 3, 4]
    for point in costs["humor"]:
        assert point["gain"] == pytest.approx(-0.5 * point["level"]) and point["n"] == 30
        assert point["interval"] == pytest.approx([point["gain"]] * 2)  # the prompts' difference is gone
    assert all(point["gain"] == pytest.approx(0) for point in costs["length"])
    sparse = plan_requests(SCHEMA, 3, levels={"quality": [0], "length": [3], "humor": [4]})
    assert setting_costs(sparse, [1.0] * len(sparse), SCHEMA, seed=0) == {}


def test_what_labels_are_worth_is_counted_by_response() -> None:
    found = label_information([10.0, 20.0], [12.0, 26.0], [1, 3], seed=0)
    assert (found["gain"], found["n"]) == (2.0, 4)
    random_ = np.random.default_rng(1)
    true = random_.gamma(20, 5, 400)
    deaf = label_information(true, true + random_.normal(0, 2, 400), np.ones(400), seed=0)
    assert deaf["interval"][0] < 0 < deaf["interval"][1]
    heard = label_information(true, true + random_.normal(1, 2, 400), np.ones(400), seed=0)
    assert heard["interval"][0] > 0.7 and heard["gain"] == pytest.approx(1, abs=0.3)


def test_verdicts_in_words() -> None:
    def steered(**spearman: float) -> dict[str, Any]:
        return {name: {"spearman": value, "interval": [value - 0.1, value + 0.1]} for name, value in spearman.items()}

    heard: Any = {"gain": 1.0, "interval": [0.5, 1.5]}
    deaf: Any = {"gain": 0.1, "interval": [-0.2, 0.4]}
    nan = float("nan")
    for listening, found, words in (
        (heard, steered(quality=0.9, humor=0.5), "listens and obeys"),
        (heard, steered(quality=0.9, humor=0.2), "listens, obeys in quality, does not obey yet in humor: more steps"),
        (heard, steered(quality=0.05, humor=nan), "listens, does not obey yet: more steps"),
        (heard, {}, "listens; whether it obeys was not measured"),
        (deaf, steered(quality=0.05), "does not listen"),
        (deaf, {}, "does not listen"),
        (deaf, steered(quality=0.9), "listens and obeys"),  # it could not without listening
        (None, steered(quality=0.9), "listens and obeys"),
        (None, steered(quality=0.1), "does not obey"),
    ):
        assert verdict(listening, found)["words"] == words
