"""The quickstart at a hundredth of its size: every file and figure, twice the same, and the Python of docs/."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.distributed import ROOT, run_distributed

TINY = dict(
    train_rows=160, unlabelled_rows=160, test_rows=40, batch_size=8, regressor_steps=6, policy_steps=6,
    steer_prompts=2, bootstrap_prompts=10, bootstrap_responses=2, bootstrap_steps=3, change_prompts=8,
)  # fmt: skip


def run_twice(folder: str) -> None:
    """Two runs of one seed and one of another, the first with all label sources; then the code of docs/python.md."""
    from nemo_steerlm.config import QuickstartConfig, QuickstartRecipe
    from nemo_steerlm.verbs.quickstart import main

    for name, seed, compare in (("first", 7, True), ("again", 7, False), ("other", 8, False)):
        recipe = QuickstartRecipe(**TINY)
        main(QuickstartConfig(output=f"{folder}/{name}", seed=seed, compare_labels=compare, recipe=recipe))
    runpy.run_path(str(ROOT / "examples/steer.py"))["main"](f"{folder}/first", "humor", "How do I grow tomatoes?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    run_distributed(run_twice, 1, folder=str(folder), timeout=500)
    return folder


def test_the_readmes_python_runs_in_a_notebook(folder: Path) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.S)
    assert code is not None
    code_here = code[1].replace("outputs/quickstart", f"{folder}/first").replace("outputs/", f"{folder}/")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code_here + "\nprint(trained)")])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout").splitlines()
    [steered] = [line for line in printed if "'humor': 4.0, 'toxicity': 0.0}" in line]
    assert len(steered.split("{")[0].strip()) > 1
    scores = printed[printed.index(steered) + 1]
    assert all(f"'{name}': " in scores for name in ("quality", "humor", "toxicity"))
    assert any(line.startswith("verdict: ") for line in printed)  # of the training
    assert printed[-1] == f"{folder}/policy-2/model" and Path(printed[-1], "model_config.yaml").is_file()
    said = "".join(output.text for output in outputs if output.get("name") == "stderr")
    assert "policy-2: steps 2 of 2, loss " in said and "Error" not in said


def _report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_every_file_is_where_the_readme_says(folder: Path) -> None:
    for name in (
        "data/train.jsonl", "data/tokenizer/tokenizer.json", "regressor/model/model_config.yaml", "annotated.jsonl",
        "policy/model/attributes.yaml", "bootstrap/model/weights/metadata.json", "bootstrap/report.json",
        "bootstrap/report.html", "bootstrap/trainings.png", "annotated.report.html", "trainings.png",
        "report.html", "report.json", "run.json", "steerability.png", "cross_talk.png", "regressor/metrics.jsonl",
    ):  # fmt: skip
        assert (folder / "first" / name).is_file(), name
    assert "<img" in (folder / "first/report.html").read_text()


def test_the_report_holds_every_figure(folder: Path) -> None:
    report = _report(folder / "first")
    names = ["quality", "helpfulness", "verbosity", "humor", "toxicity"]
    for name in names:
        assert {"pearson", "mae", "kappa", "human"} <= set(report["regressor"][name])
        assert {"spearman", "monotone", "curve", "interval"} <= set(report["steerability"][name])
        assert [point["level"] for point in report["steerability"][name]["curve"]] == [0, 1, 2, 3, 4]
        assert set(report["cross_talk"][name]) == set(names)
        for source in ("none", "human", "permuted", "predicted"):
            assert "spearman" in report["label_source"][source][name]
    assert report["bootstrap"]["n"] == 8 and len(report["bootstrap"]["interval"]) == 2
    assert {"gain", "interval", "attributes"} <= set(report["bootstrap"]["control"])
    assert report["bootstrap"]["rounds"][0]["sampled"] == 20
    assert report["seconds"]["total"] >= sum(v for k, v in report["seconds"].items() if k != "total") - 1
    assert "label_source" not in _report(folder / "again")


def test_a_seed_decides_every_figure(folder: Path) -> None:
    first, again, other = (_report(folder / name) for name in ("first", "again", "other"))
    for key in ("regressor", "steerability", "cross_talk", "bootstrap"):
        assert first[key] == again[key], key
        assert first[key] != other[key], key
    for name in ("data/train.jsonl", "annotated.jsonl", "bootstrap/round-1/responses.jsonl"):
        texts = [(folder / run / name).read_text() for run in ("first", "again")]
        # the regressor's fingerprint is that of its files, and checkpoint files hold more than weights
        first_text, again_text = (re.sub(r'"label_model": "\w+"', "", text) for text in texts)
        assert first_text == again_text, name


def test_a_stopped_quickstart_does_not_promise_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_steerlm.config import QuickstartConfig
    from nemo_steerlm.errors import Stopped
    from nemo_steerlm.verbs import quickstart

    def stop(_: object) -> None:
        raise Stopped(15, "stopped at step 3 by SIGTERM; the same command goes on")

    monkeypatch.setattr(quickstart.Quickstart, "run", stop)
    with pytest.raises(Stopped, match="the quickstart begins anew") as caught:
        quickstart.main(QuickstartConfig())
    assert caught.value.number == 15


@pytest.mark.gpu
def test_it_runs_on_one_gpu_in_the_precision_of_its_bars(tmp_path: Path) -> None:
    sizes = [f"recipe.{name}={value}" for name, value in TINY.items()]
    subprocess.run(
        [sys.executable, "-m", "nemo_steerlm", "quickstart", f"output={tmp_path}/out", *sizes],
        cwd=ROOT, env={**os.environ, "STEERLM_REQUIRE_GPU": "1"}, check=True,
    )  # fmt: skip
    assert _report(tmp_path / "out")["bars"]
    for run in ("regressor", "policy", "bootstrap/round-1/policy"):
        assert "precision: fp32\n" in (tmp_path / "out" / run / "config.yaml").read_text()
