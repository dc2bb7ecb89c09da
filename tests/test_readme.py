"""The four steps of the README and the commands of docs/ on real data, as a newcomer would type them."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.distributed import ROOT
from tests.fork_server import interpreter
from tests.tokenizers import real_data

pytestmark = pytest.mark.real_data


def _block(page: str, mark: str) -> str:
    match = re.search(rf"<!-- the tests run this block{mark}.*?```bash\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert match is not None
    block = match[1]  # shorter, otherwise as it stands there
    for long, short in (
        ("max_steps=60 ", "max_steps=2 trainer.global_batch_size=16 "),  # two micro-batches
        ("max_steps=20 ", "max_steps=2 trainer.global_batch_size=16 "),
        ("tokens=48 ", "tokens=12 "),
        ("output=policy ", "output=policy steering.max_new_tokens=12 "),
        ("output=bootstrap ", "output=bootstrap steering.max_new_tokens=12 "),
    ):
        block = block.replace(long, short)
    return block


# What a healthy block says beside its results: where long work is, and what was chosen for the user.
SAID = re.compile(
    r"[\w.-]+: (steps|conversations|responses|texts read|answers) [\d,]+ of [\d,]+.*|precision: fp32, .*"
    r"|trained parameters: .*|wrote \w+|asked for: quality 4, toxicity 0, humor 0, .*|no label for .*"
    r"|[\w./-]+: \d+ of \d+ samples are too long and left out; .*"  # contexts of 512 tokens for a vocabulary of 512
    r"|generate: tokens [\d,]+, .*|the head starts anew: .*"
)


def _run(block: str, folder: Path, environment: dict[str, str]) -> str:
    command = ["bash", "-euo", "pipefail", "-c", block]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    strange = [line for line in run.stderr.splitlines() if not SAID.fullmatch(line)]
    assert not strange, strange[:20]
    return run.stdout


def _commands(folder: Path) -> Path:
    """A folder with a `steerlm` that starts where the imports are done; README's first block runs the real one."""
    script = folder / "bin/steerlm"
    if not script.exists():
        script.parent.mkdir()
        script.write_text(f'#!/bin/sh\nexec {interpreter()} -m nemo_steerlm "$@"\n')
        script.chmod(0o755)
    return script.parent


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ["", "trainer.devices=2 parallel=tp2", "trainer.devices=2 parallel=pp2"])
def test_the_four_steps_run_on_real_data(layout: str, tmp_path: Path) -> None:
    assert not layout or f"`{layout}`" in (ROOT / "docs/guide.md").read_text()
    with gzip.open(real_data("oasst1_en_val.dev.trees.jsonl.gz"), "rt") as file:
        trees = [next(file) for _ in range(36)]
    (tmp_path / "trees.jsonl").write_text("".join(trees))
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "PATH": f"{_commands(tmp_path) if layout else Path(sys.executable).parent}:{os.environ['PATH']}",
        "TREES": "trees.jsonl",
        "LLAMA": str(real_data("stories260K/stories260K.bin")),
        "TOKENIZER": str(real_data("stories260K/tok512.model")),
        "LAYOUT": layout,
    }
    printed = _run(_block("README.md", ", with TREES"), tmp_path, environment)

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    metrics = lines("regressor/metrics.jsonl")
    assert metrics[-1]["val/loss"] > 0 and -1 <= metrics[-1]["val/quality/pearson"] <= 1
    labelled, prepared = lines("labelled.jsonl"), lines("data/train.jsonl")
    assert [row["id"] for row in labelled] == [row["id"] for row in prepared]
    turns = [turn for row in labelled for turn in row["conversations"] if turn["from"] == "Assistant"]
    counts = json.loads((tmp_path / "labelled.report.json").read_text())
    assert sum("label_predicted" in turn for turn in turns) == counts["labelled"] > 50
    assert len(turns) == counts["labelled"] + counts["unlabelled"]  # what is too long to read has no label
    assert sum("label_human" in turn for turn in turns) > 50
    change = json.loads((tmp_path / "bootstrap/report.json").read_text())
    assert len(change["interval"]) == 2 and change["rounds"][0]["sampled"] == 2 * len(prepared)
    assert "data:\n  source  " in printed and "base: language_model with 260,032 parameters in float32" in printed
    assert re.search(r"trained on +attribute +change +95% interval\n[─ ]+\nbootstrap +mean of the targets ", printed)
    *_, answer, exported = printed.splitlines()
    assert len(answer.split()) > 3, "generate answers with words"
    assert exported == "policy-hf: Hugging Face policy with 260,032 parameters in float32"
    assert (tmp_path / "policy-hf/model.safetensors").is_file()
    assert len(re.findall(r"^verdict: .*(listen|obey)", printed, re.M)) == 2  # of train-sft and of bootstrap
    if not layout:
        environment["PATH"] = f"{_commands(tmp_path)}:{os.environ['PATH']}"
        _measured_and_improved(tmp_path, environment)
        printed = _run(_block("docs/steerability.md", " too"), tmp_path, environment)
        assert re.search(r"\nquality .*\n(.+\n)*labels are worth .* nats a response .*\n(.+\n)*verdict: ", printed)
        assert (tmp_path / "steering" / "report.html").stat().st_size > 10_000


def _measured_and_improved(folder: Path, environment: dict[str, str]) -> None:
    """The block on the regressor, in the folder that the first one left."""
    with gzip.open(real_data("hh_harmless_base_test.dev.jsonl.gz"), "rt") as file:
        (folder / "pairs.jsonl").write_text("".join(next(file) for _ in range(40)))
    printed = _run(_block("docs/regressor.md", " too"), folder, {**environment, "PAIRS": "pairs.jsonl"})
    for words in ("Pearson", "accuracy", "TF-IDF", "longer", "report: ", "again: regressor of quality 0 to 4"):
        assert words in printed
    for name in ("evaluation", "label-noise", "preference"):
        assert (folder / name / "report.html").stat().st_size > 10_000
    metrics = [json.loads(line) for line in (folder / "second-stage/metrics.jsonl").read_text().splitlines()]
    assert len(metrics) >= 2 and metrics[-1]["train/loss"] > 0
    weights = [load_file(folder / name / "model.safetensors") for name in ("regressor-hf", "regressor-hf-2")]
    assert all(bool((weights[0][name] == tensor).all()) for name, tensor in weights[1].items())
