"""Two attributes of rows that are labelled with five, from the training to the bootstrap."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.verbs.helpers import make_world

SIZE = (
    "model=llama_tiny model.tokenizer={w}/tokenizer model.architecture.hidden_size=32 "
    "model.architecture.ffn_hidden_size=64 model.architecture.num_layers=2"
)
STEPS = (
    "trainer.max_steps=2 trainer.global_batch_size=8 trainer.micro_batch_size=8 data.max_length=300 optimizer.lr=1e-3 "
    "trainer.progress_bar=false logging.tensorboard=false"
)
FILES = "data.train={w}/data/train.jsonl data.val={w}/data/val.jsonl"
REGRESSOR = f"train-regressor {FILES} {SIZE} {STEPS}"
BOOTSTRAP = f"bootstrap policy={{w}}/policy/model {FILES} {STEPS} sampling.responses=1 sampling.max_new_tokens=4"
COMMANDS = {
    "train-regressor": f"{REGRESSOR} attributes={{w}}/two.yaml output={{w}}/regressor",
    "train-sft": f"train-sft attributes={{w}}/two.yaml {FILES} {SIZE} {STEPS} output={{w}}/policy",
    "evaluate": "evaluate task=regressor checkpoint={w}/regressor/model input={w}/data/val.jsonl output={w}/report "
    "resamples=0",
    "bootstrap": BOOTSTRAP + " regressor={w}/regressor/model target=[humor] output={w}/bootstrap",
}
WIDER = {  # a regressor of all five, which takes nothing from the policy's two
    "regressor": f"{REGRESSOR} attributes=synthetic output={{w}}/wider",
    "bootstrap": BOOTSTRAP + " regressor={w}/wider/model target=[humor] output={w}/bootstrap-wider",
    "narrower": f"{REGRESSOR} attributes={{w}}/one.yaml output={{w}}/narrower",
    "refused": BOOTSTRAP + " regressor={w}/narrower/model target=[humor] output={w}/refused",
}


def run_all(folder: str) -> dict[str, Any]:
    """The commands one after the other: exit code and standard error of each."""
    import logging

    from nemo_steerlm import cli

    world = Path(folder)
    make_world(world)
    (world / "two.yaml").write_text("humor: {low: 0, high: 4}\nquality: {low: 0, high: 4}\n")
    (world / "one.yaml").write_text("humor: {low: 0, high: 4}\n")
    said = {}
    for name, words in [*COMMANDS.items(), *((f"wider {name}", words) for name, words in WIDER.items())]:
        logging.getLogger().handlers.clear()  # basicConfig takes the standard error of each command
        with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(words.format(w=world).split())
        said[name] = [code, stderr.getvalue()]
    return said


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("subset")
    return folder, run_distributed(run_all, 1, folder=str(folder))


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_others_are_left_out_and_said_once(ran: tuple[Path, dict], verb: str) -> None:
    code, stderr = ran[1][verb]
    assert code == 0, stderr
    [line] = [line for line in stderr.splitlines() if "left out" in line]
    assert all(f"{name} (" in line for name in ("helpfulness", "verbosity", "toxicity")) and "humor" not in line


def test_what_comes_out_knows_the_two_alone(ran: tuple[Path, dict]) -> None:
    world = ran[0]
    for name in ("regressor", "policy", "bootstrap"):
        written = json.loads((world / name / "run.json").read_text())
        assert list(written["attributes"]) == ["humor", "quality"]
    assert json.loads((world / "policy/run.json").read_text())["data"]["train"]["kept"] > 50
    figures = json.loads((world / "report/report.json").read_text())["datasets"]
    assert all(list(one["attributes"]) == ["humor", "quality"] for one in figures.values())
    kept = (world / "bootstrap/round-1/train.jsonl").read_text()
    assert "humor:" in kept and "toxicity:" not in kept


def test_a_regressor_may_know_more_than_the_policy(ran: tuple[Path, dict]) -> None:
    world, said = ran
    assert said["wider bootstrap"][0] == 0, said["wider bootstrap"][1]
    kept = (world / "bootstrap-wider/round-1/train.jsonl").read_text()
    assert "humor:" in kept and "toxicity:" not in kept
    report = json.loads((world / "bootstrap-wider/report.json").read_text())
    assert set(report["attributes"]) == {"quality", "helpfulness", "verbosity", "humor", "toxicity"}


def test_a_regressor_that_lacks_an_attribute_of_the_policy_is_refused(ran: tuple[Path, dict]) -> None:
    code, stderr = ran[1]["wider refused"]
    assert code == 2 and "must know every attribute of the policy with its range: not quality" in stderr
    assert "policy/model was trained on humor 0-4, quality 0-4, " in stderr
