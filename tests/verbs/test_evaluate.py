"""`steerlm evaluate` on a tiny model: one report on any number of ranks, calibrations and what annotation does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_steerlm.agreement import attribute_metrics
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import AnnotateConfig, EvaluateConfig, PreferenceConfig, compose
from nemo_steerlm.conversation import read_conversations, write_conversations
from nemo_steerlm.errors import ConfigError, SteerLMError
from nemo_steerlm.provenance import write_run_json
from tests.distributed import run_distributed
from tests.verbs.helpers import make_world, regressor_config

SCHEMA = AttributeSchema.load("synthetic")


def _config(folder: str, output: str, **changes) -> EvaluateConfig:
    settings = dict(
        task="regressor", checkpoint=f"{folder}/regressor/model", output=f"{folder}/{output}", resamples=40,
        input=[f"{folder}/test.jsonl", f"{folder}/more.jsonl"],
    )  # fmt: skip
    return EvaluateConfig(**{**settings, **changes})


def _write_inputs(root: Path) -> None:
    """Two datasets in one file, one response of it shared with an earlier row, and a file that is its own dataset."""
    rows = list(read_conversations(root / "data/train.jsonl"))
    for number, row in enumerate(rows[:41]):
        row.extra["dataset"] = "even" if number % 2 else "odd"
    rows[0].turns[-1].shared = True
    write_conversations(root / "test.jsonl", rows[:41])
    write_conversations(root / "more.jsonl", rows[41:])
    write_conversations(root / "few.jsonl", rows[:4])
    write_conversations(root / "bare.jsonl", rows[41:])
    write_run_json(root, "prepare", {}, schema=SCHEMA, name="bare.run.json")


def run_all(folder: str) -> dict:
    """On two ranks: train, evaluate with and without a calibration, annotate with and without it."""
    from nemo_steerlm.megatron import parallel
    from nemo_steerlm.models.regressor import AttributeRegressor
    from nemo_steerlm.verbs import annotate, evaluate, train_regressor

    parallel.initialize()

    root = Path(folder)
    if parallel.is_rank_zero():
        make_world(root)
    parallel.barrier()
    train_regressor.main(regressor_config(root, steps=20))
    if parallel.is_rank_zero():
        _write_inputs(root)
    parallel.barrier()
    before = (root / "regressor/model/model_config.yaml").stat().st_mtime_ns
    printed = evaluate.main(_config(folder, "fitted", calibrate="isotonic"))
    evaluate.main(_config(folder, "stored"))
    for name, calibrated in (("corrected", True), ("raw", False)):
        annotate.main(
            AnnotateConfig(
                checkpoint=f"{folder}/regressor/model", input=f"{folder}/test.jsonl", output=f"{folder}/{name}.jsonl",
                calibrated=calibrated,
            )
        )  # fmt: skip
    model = AttributeRegressor.from_pretrained(root / "regressor/model")
    model.save_to(f"{folder}/packed.nemo")
    texts = [[1, 2, 3], [5, 6, 7, 8]]
    corrected = model.predict(texts)
    again = AttributeRegressor.from_pretrained(f"{folder}/packed.nemo").predict(texts)
    model.calibration = None
    raw = model.predict(texts)
    spread = _levels(root)
    noise = dict(task="label_noise", input=f"{folder}/raw.jsonl")
    noise_printed = evaluate.main(_config(folder, "noise", checkpoint=None, **noise))
    evaluate.main(_config(folder, "noise-model", **noise))
    mistakes = {}
    wrong: dict[str, dict[str, Any]] = {
        "no checkpoint": dict(checkpoint=None),
        "no label": dict(input=f"{folder}/data/prompts.jsonl"),
        "archive": dict(checkpoint=f"{folder}/packed.nemo", calibrate="linear"),
        "no run.json": dict(task="label_noise", checkpoint=None),
        "not annotated": dict(task="label_noise", checkpoint=None, input=f"{folder}/bare.jsonl"),
        "all too long": dict(max_length=2, overlong="drop"),
        "too few": dict(input=f"{folder}/few.jsonl", calibrate="linear"),
        "no levels": dict(calibrate="temperature"),
        "other task": dict(task="label_noise", calibrate="linear"),
        "other keys": dict(preference=PreferenceConfig(preset="llama3_70b")),
    }
    for name, changes in wrong.items():
        try:
            evaluate.main(_config(folder, "nothing", **changes))
        except SteerLMError as error:
            mistakes[name] = str(error)
    return {
        "mistakes": mistakes, "printed": printed, "noise": noise_printed,
        "untouched": before == (root / "regressor/model/model_config.yaml").stat().st_mtime_ns,
        "corrected": corrected.tolist(), "archived": again.tolist(), "raw": raw.tolist(), "broken": _broken(model),
        "spread": spread,
    }  # fmt: skip


def _levels(root: Path) -> str:
    """A regressor with distributions, given a temperature, whose probabilities annotation writes."""
    from nemo_steerlm.verbs import annotate, evaluate, train_regressor

    train_regressor.main(regressor_config(root, "spread", steps=3, head="distribution"))
    checkpoint = f"{root}/spread/model"
    said = evaluate.main(_config(str(root), "tempered", checkpoint=checkpoint, calibrate="temperature"))
    evaluate.main(_config(str(root), "tempered-again", checkpoint=checkpoint))
    for calibrated in (True, False):
        annotate.main(
            AnnotateConfig(
                checkpoint=checkpoint, input=f"{root}/test.jsonl", output=f"{root}/spread-{calibrated}.jsonl",
                distributions=True, calibrated=calibrated,
            )
        )  # fmt: skip
    return said


def _broken(model: Any) -> list[str]:
    """What a diverged regressor says, on one rank and over ranks."""
    import torch

    with torch.no_grad():
        model.chunks[0].score.weight[0, 0] = torch.nan
    said = []
    for predict in (model.predict, model.predict_over_ranks):
        try:
            predict([[1, 2, 3], [4, 5]])
        except SteerLMError as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("evaluate")
    return folder, run_distributed(run_all, 2, folder=str(folder))


def _report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_every_labelled_response_is_measured_once(world) -> None:
    folder, result = world
    report = _report(folder / "fitted")
    datasets = report["datasets"]
    assert list(datasets) == ["all", "even", "more", "odd"]
    labels = {name: 0 for name in SCHEMA.names}
    responses = 0
    for file in ("test.jsonl", "more.jsonl"):
        for row in read_conversations(folder / file):
            for turn in row.turns:
                if turn.label and not turn.shared:
                    responses += 1
                    for name in turn.label:
                        labels[name] += 1
    assert datasets["all"]["n"] == responses == sum(datasets[name]["n"] for name in ("even", "more", "odd"))
    assert {name: one["n"] for name, one in datasets["all"]["attributes"].items()} == labels
    assert result["printed"].count("\n") == 1 + 4 * len(SCHEMA)
    one = datasets["all"]["attributes"]["verbosity"]
    assert {"skill_mean", "skill_length", "ece", "slope", "length_partial"} <= set(one)
    assert one["interval"]["mse"][0] < one["mse"] < one["interval"]["mse"][1]


def test_figures_of_two_ranks_are_those_of_the_annotated_file(world) -> None:
    folder, _ = world
    report = _report(folder / "fitted")["datasets"]
    turns = [
        (turn, row.extra["dataset"])
        for row in read_conversations(folder / "raw.jsonl")
        for turn in row.turns
        if turn.label_human and not turn.shared
    ]
    for dataset in ("even", "odd"):
        chosen = [turn for turn, name in turns if name == dataset]
        columns = [[SCHEMA.vector(label) for label in (one.label_predicted, one.label_human)] for one in chosen]
        predicted, label = np.array(columns).transpose(1, 0, 2)
        for name, expected in attribute_metrics(predicted, label, SCHEMA).items():
            found = report[dataset]["attributes"][name]
            del expected["spearman"]  # the file's four decimals make ties
            assert {key: found[key] for key in expected} == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_the_stored_correction_is_what_annotation_applies(world) -> None:
    folder, result = world
    stored = json.loads((folder / "regressor/model/calibration.json").read_text())
    assert stored["method"] == "isotonic" and set(stored["attributes"]) == set(SCHEMA.names)
    assert [Path(one["path"]).name for one in stored["inputs"]] == ["test.jsonl", "more.jsonl"]
    assert result["untouched"] and result["archived"] == result["corrected"] != result["raw"]
    pairs = []
    for one, other in zip(*(read_conversations(folder / f"{name}.jsonl") for name in ("raw", "corrected"))):
        for raw, corrected in zip(one.turns, other.turns):
            if raw.label_predicted:
                pairs.append((raw.label_predicted, corrected.label_predicted))
    for name, curve in stored["attributes"].items():
        raw, corrected = (np.array([pair[i][name] for pair in pairs]) for i in (0, 1))
        # four decimals in the file; a knot may be steeper than the digits
        expected = [np.interp(raw + shift, curve["x"], curve["y"]) for shift in (-1e-4, 1e-4)]
        assert np.all(corrected >= expected[0] - 1e-4) and np.all(corrected <= expected[1] + 1e-4)
    reports = [json.loads((folder / f"{name}.report.json").read_text()) for name in ("raw", "corrected")]
    assert [one["calibration"] for one in reports] == [None, "isotonic"]
    models: list[str] = []
    for name in ("raw", "corrected"):
        row = next(iter(read_conversations(folder / f"{name}.jsonl")))
        models += {turn.label_model for turn in row.turns if turn.label_model}
    assert models == [f"{models[1]}-raw", models[1]] and len(models[1]) == 16
    job = json.loads((folder / "raw.manifest.json").read_text())["job"]
    assert job["precision"] == "fp32" and job["calibrated"] is False


def test_a_temperature_acts_on_distributions_and_annotation_writes_them(world) -> None:
    folder, result = world
    assert result["spread"].count("\n") == 1 + 4 * len(SCHEMA)
    stored = json.loads((folder / "spread/model/calibration.json").read_text())
    temperatures = [stored["attributes"][name]["temperature"] for name in SCHEMA.names]
    assert stored["method"] == "temperature" and all(abs(t - 1) > 0.01 for t in temperatures)
    first, again = (_report(folder / name) for name in ("tempered", "tempered-again"))
    assert f"Temperatures (above 1: it was too sure): quality {temperatures[0]:.2f}" in first["correction"]
    for name, one in first["datasets"]["all"]["attributes"].items():
        other = again["datasets"]["all"]["attributes"][name]
        assert one["mse"] == other["mse"] and one["corrected"]["mse"] != other["corrected"]["mse"] != one["mse"]
    count = 0
    for rows in zip(*(read_conversations(folder / f"spread-{calibrated}.jsonl") for calibrated in (True, False))):
        for corrected, raw in zip(*(row.turns for row in rows)):
            assert (corrected.label_distribution is None) == (corrected.label_predicted is None)
            for k, name in enumerate(SCHEMA.names if corrected.label_predicted else ()):
                found, plain = (np.array(turn.label_distribution[name]) for turn in (corrected, raw))
                assert found.sum() == pytest.approx(1, abs=3e-4)
                assert corrected.label_predicted[name] == pytest.approx(found @ np.arange(5), abs=1e-3)
                expected = plain ** (1 / temperatures[k])
                np.testing.assert_allclose(found, expected / expected.sum(), atol=2e-3)
                count += 1
    assert count > 100


def test_corrected_figures_are_cross_fitted(world) -> None:
    folder, _ = world
    fitted, stored = (_report(folder / name) for name in ("fitted", "stored"))
    assert "cross-fitted" in fitted["correction"] and "too good" in stored["correction"]
    for name, one in fitted["datasets"]["all"]["attributes"].items():
        other = stored["datasets"]["all"]["attributes"][name]
        assert {**one, "corrected": None} == {**other, "corrected": None}
        # isotonic regression is the best monotone curve on the rows it was fitted on, and not on others
        assert other["corrected"]["mse"] < min(one["mse"], one["corrected"]["mse"])


def test_label_noise_reads_an_annotated_file_or_asks_the_model(world) -> None:
    folder, result = world
    stored, asked = (_report(folder / name)["parts"] for name in ("noise", "noise-model"))
    assert sorted(stored["dataset"]) == ["even", "odd"] and stored["language"] == {}
    for name, one in stored["dataset"]["odd"].items():
        other = asked["dataset"]["odd"][name]
        assert one["n"] == other["n"] and one["entropy"] == other["entropy"]
        assert one["mae"] != other["mae"]  # the file holds raw values, the model corrects
    assert result["noise"].count("\n") == 1 + 2 * len(SCHEMA)


def test_the_page_stands_alone(world) -> None:
    html = (world[0] / "fitted/report.html").read_text()
    assert html.count("data:image/png;base64,") == 4 and "http" not in html.replace("http-equiv", "")
    for name in ("agreement.png", "reliability.png"):
        assert (world[0] / "fitted" / name).read_bytes().startswith(b"\x89PNG")


def test_mistakes_say_what_to_do(world) -> None:
    folder, result = world
    assert "checkpoint=" in result["mistakes"]["no checkpoint"]
    assert "prompts.jsonl: no response carries a human label" in result["mistakes"]["no label"]
    assert "packed.nemo is none" in result["mistakes"]["archive"]
    assert "give checkpoint=" in result["mistakes"]["no run.json"]
    assert "annotate the file first" in result["mistakes"]["not annotated"]
    assert "max_length" in result["mistakes"]["all too long"]
    assert "fewer than 10 responses have a label" in result["mistakes"]["too few"]
    assert "head=regression has no probabilities" in result["mistakes"]["no levels"]
    assert "calibrate is for task=regressor" in result["mistakes"]["other task"]
    assert "preference is for task=preference" in result["mistakes"]["other keys"]
    assert len(result["broken"]) == 2 and all("not finite" in message for message in result["broken"])
    assert not (folder / "nothing").exists()


def test_input_is_a_file_or_a_list() -> None:
    def inputs(text: str) -> list[str]:
        words = ["task=regressor", "checkpoint=m", "output=o", f"input={text}"]
        return compose.load("evaluate", EvaluateConfig, words).inputs()

    assert inputs("a.jsonl") == ["a.jsonl"] and inputs("[a.jsonl,b/c.jsonl.gz]") == ["a.jsonl", "b/c.jsonl.gz"]
    assert inputs("with space (1).jsonl") == ["with space (1).jsonl"]
    with pytest.raises(ConfigError, match="expected a file"):
        inputs("[]")
