"""Label noise: what is known of simulated annotators is found again."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.evaluate.label_noise import measure
from nemo_steerlm.evaluate.samples import Samples
from nemo_steerlm.report.label_noise_page import summary_table, write_report

SCHEMA = AttributeSchema.load({"quality": {"low": 0, "high": 4}, "humor": {"low": 0, "high": 4}})
NOISE = 0.9


def crowd(n: int = 4000) -> Samples:
    """Labels that are means over one to four people with noise of their own; predictions that see the truth dimly."""
    random = np.random.default_rng(0)
    truth = random.normal(2, 0.6, (n, 2))
    people = random.integers(1, 5, n).astype(float)
    label = truth + random.normal(0, NOISE, (n, 2)) / np.sqrt(people)[:, None]
    predicted = truth + random.normal(0, 0.3, (n, 2))
    label[:, 1] = np.rint(label[:, 1] * 2) / 2
    label[:100, 1] = np.nan
    dataset = np.where(np.arange(n) % 2, "one", "two")
    language = np.array(["en", "de", "en", ""] * (n // 4))
    language[:5] = "fr"  # too few for a line
    return Samples(predicted, label, np.full(n, 50.0), dataset, language, people, np.arange(n) // 2)


@pytest.fixture(scope="module")
def parts() -> dict:
    return measure(crowd(), SCHEMA, resamples=60)


def test_parts_and_their_rows(parts: dict) -> None:
    assert list(parts["dataset"]) == ["one", "two"] and list(parts["language"]) == ["en", "de"]
    assert sorted(parts["annotators"]) == ["1", "2", "3", "4"]
    assert sum(part["humor"]["n"] for part in parts["dataset"].values()) == 3900
    samples = crowd()
    quality = parts["annotators"]["3"]["quality"]
    chosen = samples.annotators == 3
    expected = np.corrcoef(samples.predicted[chosen, 0], samples.label[chosen, 0])[0, 1]
    assert quality["pearson"] == pytest.approx(expected)


def test_the_noise_of_one_person_and_the_ceiling_are_found(parts: dict) -> None:
    samples = crowd()
    for name, rows in (("one", samples.dataset == "one"), ("two", samples.dataset == "two")):
        quality = parts["dataset"][name]["quality"]
        low, high = quality["noise_interval"]
        assert low < NOISE < high and quality["noise"] == pytest.approx(NOISE, abs=0.1)
        truth_alone = math.sqrt(0.36 / samples.label[rows, 0].var())
        assert quality["ceiling"] == pytest.approx(truth_alone, abs=0.05)
        assert quality["pearson"] < quality["ceiling"] and quality["reliability_least"] < quality["ceiling"] ** 2
    assert "noise" not in parts["annotators"]["3"]["quality"]  # one number of people tells nothing
    agreement = [parts["annotators"][count]["quality"]["pearson"] for count in "1234"]
    assert agreement == sorted(agreement)


def test_no_ceiling_is_claimed_where_no_noise_is_found() -> None:
    """Labels of many people that are further from the prediction than those of few."""
    samples = crowd()
    samples.label[:, 0] = samples.predicted[:, 0] + np.tile([-0.1, -0.1, 0.1, 0.1], 1000) * samples.annotators
    quality = measure(samples, SCHEMA, resamples=0)["dataset"]["one"]["quality"]
    assert quality["noise"] == 0.0 and math.isnan(quality["ceiling"])


def test_disagreement_entropy_and_ties(parts: dict) -> None:
    samples = crowd()
    rows = (samples.dataset == "one") & ~np.isnan(samples.label[:, 1])
    label, predicted = samples.label[rows, 1], samples.predicted[rows, 1]
    humor = parts["dataset"]["one"]["humor"]
    assert humor["ties"] == pytest.approx((label * 2 % 2 == 1).mean()) and 0.4 < humor["ties"] < 0.6
    level = np.clip(np.rint(label), 0, 4)
    assert humor["higher"] == pytest.approx((np.clip(np.rint(predicted), 0, 4) > level).mean())
    share = np.array([(level == one).mean() for one in range(5)])
    assert humor["entropy"] == pytest.approx(-(share * np.log2(share)).sum())


def test_table_and_page(parts: dict, tmp_path) -> None:
    assert summary_table(parts).count("\n") == 1 + 2 * 8
    data = {"parts": parts, "attributes": SCHEMA.to_dict(), "summary": "<b>", "seed": 0, "settings": {"a": 1}}
    report = write_report(tmp_path, data)
    html = (tmp_path / "report.html").read_text()
    assert "<b>" not in html and html.count("data:image/png") == 6
    assert report["parts"]["dataset"]["one"]["quality"]["noise"] > 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["annotators.png", "dataset.png", "language.png"]
