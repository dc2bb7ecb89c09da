"""A user's mistake gets one clear line and exit code 2, and leaves nothing half-written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.distributed import ROOT, run_distributed
from tests.fork_server import interpreter
from tests.verbs.helpers import make_world, policy_config, regressor_config

SMALL = (
    "trainer.max_steps=1 trainer.global_batch_size=8 trainer.micro_batch_size=4 optimizer.lr=1e-3 "
    "trainer.progress_bar=false"
)
TRAIN = "data.train={w}/data/train.jsonl"
# name: (words of the command line, what the one line must say)
MISTAKES = {
    "malformed JSONL": ("data.train={w}/malformed.jsonl", ["malformed.jsonl:3", "JSON"]),
    "not UTF-8": ("data.train={w}/latin1.jsonl", ["latin1.jsonl:1", "UTF-8"]),
    "unknown attribute": ("data.train={w}/unknown.jsonl", ["unknown.jsonl:1", "humour", "did you mean 'humor'"]),
    "value out of range": ("data.train={w}/range.jsonl", ["range.jsonl:1", "humor", "9", "4"]),
    "empty data": ("data.train={w}/empty.jsonl", ["empty.jsonl"]),
    "missing data": ("data.train={w}/nothing.jsonl", ["nothing.jsonl"]),
    "all labels missing": ("data.train={w}/unlabelled.jsonl", ["all labels are missing"]),
    "too long": (TRAIN + " data.max_length=20 data.overlong=error", ["max_length=20", "truncate_history"]),
    "everything too long": (TRAIN + " data.max_length=20 data.overlong=drop", ["too long", "max_length"]),
    "missing checkpoint": (TRAIN + " model.init={w}/nowhere", ["nowhere", "no such model folder"]),
    "not a checkpoint": (TRAIN + " model.init={w}/data", ["not a model folder"]),
    "batch that does not divide": (
        TRAIN + " trainer.global_batch_size=6", ["global_batch_size=6", "micro_batch_size=4"]
    ),
    "layout that does not divide": (TRAIN + " parallel.tensor=3", ["parallel.tensor=3"]),
    "unknown key": (TRAIN + " trainer.max_step=3", ["max_step", "did you mean", "max_steps"]),
    "wrong type": (TRAIN + " trainer.max_steps=many", ["trainer.max_steps", "many"]),
    "changed files": (TRAIN + " model.init={w}/retokenised", ["tokenizer.json", "sha256", "trainer.verify=false"]),
    "wrong tokenizer": (TRAIN + " model.init={w}/retokenised trainer.verify=false", ["tokenizer", "fingerprint"]),
    "another schema": (
        "VERB=train-sft " + TRAIN + " model.init={w}/policy/model attributes.schema.extra.high=9",
        ["trained on the attributes", "extra"],
    ),
    "damaged weights": (TRAIN + " model.init={w}/damaged", ["damaged"]),
    "a LoRA target nobody knows": (
        TRAIN + " model.lora.rank=4 model.lora.targets=[linear_qv]", ["linear_qv", "did you mean 'linear_qkv'"]
    ),
    "LoRA without a target": (TRAIN + " model.lora.rank=4 model.lora.targets=[]", ["model.lora.targets", "nothing"]),
    "LoRA in a frozen trunk": (
        TRAIN + " model.lora.rank=4 model.freeze=trunk", ["model.lora.rank=4", "model.freeze=trunk"]
    ),
    "LoRA on random weights": (
        TRAIN + " model.lora.rank=4 model.init=null model=llama_tiny model.tokenizer={w}/tokenizer",
        ["model.lora.rank=4", "model.init"],
    ),
    "a frozen policy in stages": (
        "VERB=train-sft " + TRAIN + " model.freeze=trunk parallel.pipeline=2 trainer.devices=2",
        ["model.freeze=trunk", "parallel.tensor"],
    ),
    "a frozen backbone in stages": (
        TRAIN + " model.freeze=trunk parallel.pipeline=2 trainer.devices=2", ["model.freeze=trunk", "parallel.tensor"]
    ),
    "context parallelism without its engine": (
        TRAIN + " parallel.context=2 trainer.devices=2", ["parallel.context=2", "Transformer Engine"]
    ),
    "fp8 without its engine": (TRAIN + " trainer.precision=fp8", ["trainer.precision=fp8", "Transformer Engine"]),
    "a setting of the pipeline that is ours to choose": (
        TRAIN + " parallel.batch_p2p_comm=true", ["unknown key 'parallel.batch_p2p_comm'"]
    ),
    "no model at all": (TRAIN + " model.init=null", ["model.init", "model=llama_tiny"]),
    "a policy to annotate with": (
        "VERB=annotate checkpoint={w}/policy/model input={w}/data/test.jsonl output={w}/out",
        ["this is a policy", "expected a regressor"],
    ),
    "a shard beyond the last": (
        "VERB=annotate checkpoint={w}/regressor/model input={w}/data/test.jsonl output={w}/out shards=8/8",
        ["shards=8/8", "0/8 to 7/8"],
    ),
    "an attribute nobody knows": (
        "VERB=generate checkpoint={w}/policy/model prompt=Hi attributes.humour=2", ["humour", "did you mean 'humor'"]
    ),
    "a level out of range": ("VERB=generate checkpoint={w}/policy/model prompt=Hi attributes.humor=7", ["humor", "7"]),
    "a target nobody knows": (
        "VERB=sample checkpoint={w}/policy/model prompts={w}/data/prompts.jsonl annotated={w}/data/train.jsonl "
        "target=[humour] output={w}/out",
        ["humour", "did you mean 'humor'"],
    ),
}  # fmt: skip


def _bad_files(world: Path) -> None:
    lines = (world / "data/train.jsonl").read_text().splitlines(keepends=True)
    (world / "malformed.jsonl").write_text("".join(lines[:2]) + '{"conversations": [\n')
    (world / "latin1.jsonl").write_bytes('{"conversations": [{"from": "User", "value": "café"}]}\n'.encode("latin1"))
    row = {
        "conversations": [{"from": "User", "value": "Hi"}, {"from": "Assistant", "value": "Ho", "label": "humour:1"}]
    }
    (world / "unknown.jsonl").write_text(json.dumps(row) + "\n")
    row["conversations"][1]["label"] = "humor:9"
    (world / "range.jsonl").write_text(json.dumps(row) + "\n")
    row["conversations"][1]["label"] = None  # type: ignore[assignment]
    (world / "unlabelled.jsonl").write_text(json.dumps(row) + "\n")
    (world / "empty.jsonl").write_text("")


def _bad_models(world: Path) -> None:
    import shutil

    for name in ("retokenised", "damaged"):
        shutil.copytree(world / "regressor/model", world / name)
    tokenizer = json.loads((world / "retokenised/tokenizer/tokenizer.json").read_text())
    tokenizer["added_tokens"][-1]["content"] += "!"
    (world / "retokenised/tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    (world / "damaged/weights/metadata.json").unlink()


def make_mistakes(folder: str) -> dict:
    """Run every mistake through the real command line, in one process."""
    from nemo_steerlm import cli
    from nemo_steerlm.verbs import train_regressor, train_sft

    world = Path(folder)
    make_world(world)
    train_regressor.main(regressor_config(world, steps=1))
    train_sft.train(policy_config(world, steps=1))
    _bad_files(world)
    _bad_models(world)
    before = sorted(str(p) for p in world.rglob("*"))
    outcome = {}
    for name, (words, _) in MISTAKES.items():
        arguments = words.format(w=world).split()
        verb = "train-regressor"
        if arguments[0].startswith("VERB="):
            verb = arguments.pop(0).removeprefix("VERB=")
        if verb.startswith("train"):
            usual = f"attributes=synthetic model.init={world}/regressor/model output={world}/out {SMALL}".split()
            arguments = [
                word for word in usual if word.split("=")[0] not in {a.split("=")[0] for a in arguments}
            ] + arguments
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            code = cli.main([verb, *arguments])
        outcome[name] = [code, stderr.getvalue()]
    new = sorted(set(map(str, world.rglob("*"))) - set(before))
    return {"outcome": outcome, "left": new}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("mistakes")
    return {**run_distributed(make_mistakes, 1, folder=str(folder)), "folder": folder}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(mistakes: dict, name: str) -> None:
    code, stderr = mistakes["outcome"][name]
    lines = [line for line in stderr.splitlines() if line.startswith("steerlm: error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in stderr, stderr
    for part in MISTAKES[name][1]:
        assert part in lines[0]


def test_nothing_half_written_is_left(mistakes: dict) -> None:
    assert mistakes["left"] == []


def test_heads_that_do_not_divide_are_named_once_by_all_processes(mistakes: dict) -> None:
    world = mistakes["folder"]
    words = (
        f"train-regressor attributes=synthetic model.init={world}/regressor/model output={world}/out "
        f"data.train={world}/data/train.jsonl trainer.devices=3 parallel.tensor=3 {SMALL}"
    ).split()
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    run = subprocess.run(
        [interpreter(), "-m", "nemo_steerlm", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    lines = [line for line in run.stderr.splitlines() if line.startswith("steerlm: error: ")]
    assert run.returncode == 2, run.stderr
    assert len(lines) == 1 and "parallel.tensor=3 does not divide the model's num_attention_heads=4" in lines[0]
    assert not (world / "out").exists()
