"""A model's way to the hub, of which hub_server.py is a stand-in, and README.md there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nemo_steerlm import AttributeConditionedGPT, AttributeRegressor
from nemo_steerlm.cli import main
from nemo_steerlm.verbs import train_regressor, train_sft
from tests.hub_server import Hub, reached, served
from tests.verbs.helpers import make_world, policy_config, regressor_config

QUESTION = "How do I grow tomatoes?"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A regressor that was measured, and a policy trained on one of the hub, which has a license."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    with pytest.MonkeyPatch.context() as patch, served() as site, reached(site, folder / "cache", patch):
        patch.chdir(folder)
        train_regressor.main(regressor_config(folder, steps=2))
        words = ["task=regressor", "input=data/val.jsonl", "checkpoint=regressor/model", "output=regressor/measured"]
        assert main(["evaluate", *words]) == 0
        train_sft.main(policy_config(folder, "first", steps=2))
        assert main(["export", "checkpoint=first/model", "output=base"]) == 0
        (folder / "base" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A base\n")
        site.add("org/base", folder / "base")
        words = ["attributes=synthetic", "data.train=data/train.jsonl", "data.val=data/val.jsonl", "output=policy",
                 "model.init=org/base", "trainer.max_steps=2", "trainer.global_batch_size=8",
                 "trainer.micro_batch_size=8", "data.max_length=256", "logging.tensorboard=false"]  # fmt: skip
        assert main(["train-sft", *words]) == 0
        for kind in ("regressor", "policy"):
            assert main(["export", f"checkpoint={kind}/model", f"output={kind}-hf"]) == 0
        yield folder


@pytest.fixture
def site(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(world)
    with served() as site, reached(site, tmp_path / "cache", monkeypatch):
        yield site


def parts(readme: str) -> tuple[dict, str]:
    """The front matter and the page below it."""
    _, front, page = readme.split("---\n", 2)
    return yaml.safe_load(front), page


def run_code(page: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the first Python code on a page prints."""
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found
    capsys.readouterr()
    exec(compile(found[1].replace("max_new_tokens=256", "max_new_tokens=24"), "README.md", "exec"), {})
    return capsys.readouterr().out.strip()


def test_an_exported_policy_comes_with_a_page_whose_code_steers(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    front, page = parts((world / "policy-hf" / "README.md").read_text())
    assert front == {
        "base_model": "org/base", "library_name": "transformers", "license": "mit", "pipeline_tag": "text-generation",
        "tags": ["steerlm", "nemo"],
    }  # fmt: skip
    assert "\n| humor | 0 to 4 | 0 | how funny the response is |\n" in page
    run = json.loads((world / "policy" / "run.json").read_text())
    assert f"| data/train.jsonl | {run['inputs'][0]['bytes']} | {run['inputs'][0]['sha256']} |" in page
    assert (
        f"**train-sft**: 2 steps of 8 samples, learning rate 1e-05; {run['data']['train']['kept']} samples, " in page
    )
    assert re.search(r"base is \[org/base\]\(https://huggingface.co/org/base\) at commit `[0-9a-f]{40}`", page)
    assert "labels are worth, nats a response" in page, "of steering.json, with which the training ended"
    assert "That of the base: mit." in page and str(world) not in page
    policy = AttributeConditionedGPT.from_pretrained("policy/model")
    monkeypatch.chdir(world / "policy-hf")
    for levels in ({}, {"humor": 4, "verbosity": 0}):
        asked = policy.schema.format(policy.request(levels))
        default = policy.schema.format(policy.request({}))
        assert f"attributes = '{default}'" in page
        answer = policy.generate(QUESTION, levels, max_new_tokens=24)
        assert run_code(page.replace(f"'{default}'", f"'{asked}'"), capsys) == answer.strip()


def test_an_exported_regressor_comes_with_a_page_whose_code_predicts(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    front, page = parts((world / "regressor-hf" / "README.md").read_text())
    assert (
        front["tags"] == ["steerlm", "nemo", "reward-model"] and "license" not in front and "base_model" not in front
    )
    assert "The weights were random before training." in page and "Not known here: the licenses" in page
    report = json.loads((world / "regressor" / "measured" / "report.json").read_text())
    [dataset] = report["datasets"].values()
    for name, figures in dataset["attributes"].items():
        assert re.search(rf"\| {name} \| {figures['n']} \| ", page)
    with monkeypatch.context() as inside:
        inside.chdir(world / "regressor-hf")
        printed = eval(run_code(page, capsys))
    chat = [{"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "Plant them in the sun and water them every day."}]  # fmt: skip
    [expected] = AttributeRegressor.from_pretrained("regressor/model").score([chat])
    assert printed == pytest.approx(expected, abs=1e-4)


def test_an_exported_folder_is_uploaded_as_it_is_but_for_the_name(
    world: Path, site: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    page = world / "policy-hf" / "README.md"
    page.write_text(page.read_text() + "\nA sentence of the user.\n")
    assert main(["push-to-hub", "input=policy-hf", "repository=me/policy"]) == 0
    [_, (commit, files)] = site.commits["me/policy"]
    del files[".gitattributes"]
    assert capsys.readouterr().out.strip() == f"{site.url}/me/policy/commit/{commit}: {len(files)} files"
    here = {p.relative_to(world / "policy-hf").as_posix(): p for p in (world / "policy-hf").rglob("*") if p.is_file()}
    assert set(files) == set(here) - {"run.json"} and site.private["me/policy"] is True
    assert all(files[name] == here[name].read_bytes() for name in files if name != "README.md")
    text = files["README.md"].decode()
    assert 'name = "me/policy"' in text and 'NAME="me/policy"' in text and "# this folder" not in text
    assert text.endswith("\nA sentence of the user.\n")
    assert main(["import", "input=me/policy", "output=from-hub"]) == 0
    assert json.loads((world / "from-hub" / "run.json").read_text())["config"]["input"] == f"me/policy@{commit}"
    ours, theirs = (AttributeConditionedGPT.from_pretrained(name) for name in ("policy/model", "from-hub"))
    assert ours.generate(QUESTION, max_new_tokens=8) == theirs.generate(QUESTION, max_new_tokens=8)


def test_a_model_folder_is_uploaded_with_a_page_and_read_by_its_name(
    world: Path, site: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    site.commit("me/regressor", {".gitattributes": b"x", "weights/old.distcp": b"x", "figure.png": b"x"})
    assert main(["push-to-hub", "input=regressor/model", "repository=me/regressor", "private=false"]) == 0
    files = site.commits["me/regressor"][-1][1]
    assert not (world / "regressor" / "model" / "README.md").exists()
    assert {".gitattributes", "figure.png", "SHA256SUMS", "weights/.metadata"} < set(files)
    assert "weights/old.distcp" not in files
    front, page = parts(files["README.md"].decode())
    assert front["library_name"] == "nemo" and 'steerlm annotate checkpoint="$NAME" input=' in page
    assert len(eval(run_code(page, capsys))) == 1


def test_what_cannot_be_uploaded_is_one_line(
    world: Path, site: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    def said(*words: str) -> str:
        capsys.readouterr()
        assert main(["push-to-hub", *words]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        return line

    assert "repository=policy: expected OWNER/NAME" in said("input=policy-hf", "repository=policy")
    assert "expected a folder that `steerlm export` wrote, or a model folder" in said("input=data", "repository=a/b")
    damaged = shutil.copytree(world / "policy" / "model", tmp_path / "damaged")
    with next((damaged / "weights").glob("*.distcp")).open("ab") as file:
        file.write(b"x")
    assert "not the file that was written" in said(f"input={damaged}", "repository=a/b")
    assert site.asked == []
    monkeypatch.setenv("HF_TOKEN", "another")
    assert "a/b: this login may not write there; log in with `hf auth" in said("input=policy-hf", "repository=a/b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "a/b: HF_HUB_OFFLINE=1 keeps from asking" in said("input=policy-hf", "repository=a/b")
