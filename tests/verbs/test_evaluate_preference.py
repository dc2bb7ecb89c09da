"""`evaluate task=preference` with a tiny regressor: the report, the scores, data parallelism, and what it refuses."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_steerlm.config import EvaluateConfig, compose
from tests.distributed import run_distributed
from tests.tokenizers import real_data

WORDS = "tomatoes need sun and water every day or they will not grow well in a pot".split()
LONG = "a very long story " * 40  # more than the 300 tokens a text may have here


def _pairs(count: int, seed: int) -> list[dict[str, str]]:
    random = np.random.default_rng(seed)

    def text(most: int) -> str:
        return " ".join(random.choice(WORDS, random.integers(2, most)))

    return [
        {
            "prompt": f"{text(6)} {seed} {i}?", "chosen": text(12), "rejected": text(9),
            "subset": "hep-go" if i % 3 else "hep-js",
        }
        for i in range(count)
    ]  # fmt: skip


def evaluate_all(folder: str, real: str | None) -> dict[str, Any]:
    """Train for a step on two data-parallel ranks and evaluate in several ways; what went wrong, by case."""
    from nemo_steerlm.calibration import Calibration
    from nemo_steerlm.conversation import Conversation, Turn
    from nemo_steerlm.errors import SteerLMError
    from nemo_steerlm.megatron import parallel
    from nemo_steerlm.models.regressor import AttributeRegressor
    from nemo_steerlm.verbs import train_regressor
    from nemo_steerlm.verbs.evaluate import main
    from tests.verbs.helpers import regressor_config

    home = Path(folder)
    train_regressor.main(regressor_config(home, steps=1))
    checkpoint = str(home / "regressor" / "model")
    cases = {
        "plain": ["input=test.jsonl"],
        "weights": ["input=test.jsonl", "preference.weights={humor: 0.5, verbosity: -1}"],
        "fit": ["input=test.jsonl", "preference.fit=train.jsonl", "preference.floor_train=train.jsonl"],
        "drop": ["input=long.jsonl", "overlong=drop"],
        "error": ["input=long.jsonl", "overlong=error"],
        "all_dropped": ["input=test.jsonl", "max_length=5"],
        "overlap": ["input=test.jsonl", "preference.fit=test.jsonl"],
        "twice": ["input=test.jsonl", "preference.preset=llama3_70b", "preference.fit=train.jsonl"],
        "preset": ["input=test.jsonl", "preference.preset=llama3_70b"],
        "several": [f"input=[{home}/test.jsonl,{home}/train.jsonl]"],
        **({"real": [f"input={real}", "max_length=256"]} if real else {}),
    }
    said: dict[str, Any] = {}
    for name, (source, *words) in cases.items():
        source = source.replace("input=", "input=" if source[6] in "/[" else f"input={home}/")
        words = [word.replace("=train.jsonl", f"={home}/train.jsonl").replace("=test.jsonl", f"={home}/test.jsonl")
                 for word in words]  # fmt: skip
        if not any(word.startswith("max_length") for word in words):
            words.append("max_length=300")
        keys = ["task=preference", f"checkpoint={checkpoint}", f"output={home / name}", source, *words]
        keys += ["trainer.devices=2"]
        try:
            said[name] = main(compose.load("evaluate", EvaluateConfig, keys))
        except SteerLMError as error:
            said[name] = f"refused: {error}"
    model = AttributeRegressor.from_pretrained(checkpoint)
    rows = [json.loads(line) for line in (home / "test.jsonl").read_text().splitlines()]
    said["alone"] = model.score(
        [Conversation([Turn("User", row["prompt"]), Turn("Assistant", row["chosen"])]) for row in rows]
    )
    if parallel.is_rank_zero():
        Calibration("linear", {"quality": {"slope": 0.5, "intercept": 1.0}}).write(checkpoint)
    parallel.barrier()
    words = ["task=preference", f"checkpoint={checkpoint}", f"output={home}/corrected", f"input={home}/test.jsonl"]
    said["corrected"] = main(compose.load("evaluate", EvaluateConfig, [*words, "max_length=300", "trainer.devices=2"]))
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.verbs.helpers import make_world

    folder = tmp_path_factory.mktemp("preference")
    make_world(folder)
    test = _pairs(13, 0)
    files = {"test": test, "train": _pairs(9, 1), "long": [*test[:6], {**test[6], "rejected": LONG}]}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    real = None
    try:
        with gzip.open(real_data("hh_harmless_base_test.dev.jsonl.gz"), "rt") as file:
            (folder / "real.jsonl").write_text("".join(next(file) for _ in range(12)))
        real = str(folder / "real.jsonl")
    except pytest.skip.Exception:
        pass
    said = run_distributed(evaluate_all, 2, folder=str(folder), real=real)
    (folder / "said.json").write_text(json.dumps(said, indent=1))
    return folder


def _said(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "said.json").read_text())


def _report(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "report.json").read_text())["preference"]


def _scores(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "scores.jsonl").read_text().splitlines()]


def test_the_values_of_two_ranks_are_those_of_one(folder: Path) -> None:
    scores = _scores(folder, "plain")
    assert len(scores) == 13
    for row, alone in zip(scores, _said(folder)["alone"], strict=True):
        assert row["chosen"][0] == pytest.approx(alone, abs=2e-5)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("plain", {"quality": 1, "helpfulness": 1, "toxicity": -1}),
        ("weights", {"humor": 0.5, "verbosity": -1}),
        ("fit", None),
    ],
)
def test_the_accuracy_is_that_of_the_weighted_values(name: str, weights: dict | None, folder: Path) -> None:
    report = _report(folder, name)
    if weights is None:
        weights = report["weights"]
        assert set(weights) == {"quality", "helpfulness", "verbosity", "humor", "toxicity"} and any(weights.values())
        assert "fitted on the 9 pairs" in report["weights_from"]
        assert any("TF-IDF baseline: fitted on the 9 pairs" in note for note in report["notes"])
    else:
        assert report["weights"] == weights
        assert any("cross-fitted on this file, 5 folds" in note for note in report["notes"])
    won: dict[str, list[bool]] = {}
    for row in _scores(folder, name):
        chosen, rejected = (sum(w * row[key][0][k] for k, w in weights.items()) for key in ("chosen", "rejected"))
        won.setdefault(row["subset"], []).append(chosen > rejected)
    rows = {row["name"]: row for row in report["rows"]}
    for subset, hits in won.items():
        assert rows[subset]["model"]["accuracy"] == pytest.approx(np.mean(hits)), subset
        assert rows[subset]["n"] == len(hits)
    both = (np.mean(won["hep-go"]) + np.mean(won["hep-js"])) / 2  # equal weights in RewardBench
    assert rows["average"]["model"]["accuracy"] == pytest.approx(both)
    assert {"longer", "tfidf"} <= rows["average"].keys()


def test_the_table_says_what_was_done_and_the_page_shows_it(folder: Path) -> None:
    text, page = _said(folder)["plain"], (folder / "plain" / "report.html").read_text()
    for word in ("95% interval", "longer", "TF-IDF", "Reasoning", "average", "1.00 × quality", "−1.00 × toxicity"):
        assert word in text, word
    assert "hep-js" in page and "<img" in page and (folder / "plain" / "preference.png").is_file()
    run = json.loads((folder / "fit" / "run.json").read_text())
    assert [Path(one["path"]).name for one in run["inputs"]] == ["test.jsonl", "train.jsonl", "train.jsonl"]


def test_the_stored_correction_is_applied_and_said(folder: Path) -> None:
    assert "values after the model's stored linear calibration" in _said(folder)["corrected"]
    for row, plain in zip(_scores(folder, "corrected"), _scores(folder, "plain"), strict=True):
        assert row["chosen"][0]["quality"] == pytest.approx(0.5 * plain["chosen"][0]["quality"] + 1, abs=2e-5)
        assert row["chosen"][0]["humor"] == pytest.approx(plain["chosen"][0]["humor"], abs=1e-5)


def test_a_row_with_an_answer_too_long_is_left_out_and_counted(folder: Path) -> None:
    report = _report(folder, "drop")
    assert report["counts"]["left_out"] == 1 and report["rows"][-1]["n"] == 6
    assert _scores(folder, "drop")[-1]["chosen"] is None
    assert "1 rows with an answer that cannot be read" in _said(folder)["drop"]


def test_what_makes_no_sense_is_refused(folder: Path) -> None:
    said = _said(folder)
    for name, words in {
        "error": "max_length=300",
        "all_dropped": "every row holds an answer of more than max_length tokens",
        "overlap": "this is the file that is tested",
        "twice": "preference.preset and preference.fit both say",
        "preset": "predicts no 'correctness'",
        "several": "reads one file; put several into a folder",
    }.items():
        assert said[name].startswith("refused: ") and words in said[name], said[name]
        assert not (folder / name).exists(), name


@pytest.mark.real_data
def test_real_hh_pairs(folder: Path) -> None:
    real_data("hh_harmless_base_test.dev.jsonl.gz")
    report = _report(folder, "real")
    assert report["layout"] == "hh" and report["rows"][-1]["n"] + report["counts"]["left_out"] == 12
    low, high = report["rows"][-1]["model"]["interval"]
    assert 0 <= low < report["rows"][-1]["model"]["accuracy"] < high <= 1
