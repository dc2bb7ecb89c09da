"""The number format that nobody chose: decided once, said once, and part of what a job or run is."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from nemo_steerlm.config import AnnotateConfig, ComputeConfig, SampleConfig, TrainConfig
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.megatron import parallel
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.verbs import annotate, sample, train_regressor, train_sft
from tests.verbs.helpers import make_world, policy_config, regressor_config

SAID = "precision: fp32, as on every CPU; trainer.precision chooses another"


def test_nobody_s_choice_is_bf16_on_a_gpu_and_fp32_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert parallel.resolve_precision(None) == "fp32"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert parallel.resolve_precision(None) == "bf16"
        assert parallel.resolve_precision("fp32") == "fp32"  # said by the user, so not by us
    assert caplog.messages == [SAID, SAID.replace("fp32", "bf16").replace("CPU", "GPU")]


def test_runs_and_jobs_record_what_was_decided(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_world(tmp_path)
    runs: tuple[tuple[Callable[[Any], Any], Callable[..., TrainConfig]], ...] = (
        (train_regressor.main, regressor_config), (train_sft.train, policy_config),
    )  # fmt: skip
    for train, make in runs:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            train(make(tmp_path, steps=1))
        assert caplog.messages.count(SAID) == 1
        output = Path(make(tmp_path).output)
        assert json.loads((output / "run.json").read_text())["config"]["trainer"]["precision"] == "fp32"
        assert OmegaConf.load(output / "config.yaml").trainer.precision == "fp32"

    other = regressor_config(tmp_path, steps=2)
    other.trainer.precision = "bf16"
    with caplog.at_level(logging.INFO):
        train_regressor.main(other)
    assert f"{other.output} was trained in fp32 until now and goes on in bf16 (trainer.precision)" in caplog.messages
    assert OmegaConf.load(tmp_path / "regressor/config.yaml").trainer.precision == "bf16"

    for steps, precision in ((1, "fp32"), (2, "bf16")):
        config = policy_config(tmp_path, output="undistributed", steps=steps)
        config.optimizer.distributed, config.trainer.precision = False, precision
        with contextlib.nullcontext() if steps == 1 else pytest.raises(ConfigError, match="or resume=false"):
            train_sft.train(config)

    def label(precision: str | None) -> None:
        annotate.main(
            AnnotateConfig(
                checkpoint=str(tmp_path / "regressor/model"), input=str(tmp_path / "data/test.jsonl"),
                output=str(tmp_path / "labelled.jsonl"), trainer=ComputeConfig(precision=precision),
            )
        )  # fmt: skip

    def answer(precision: str | None) -> None:
        sample.main(
            SampleConfig(
                checkpoint=str(tmp_path / "policy/model"), prompts=str(tmp_path / "data/prompts_test.jsonl"),
                annotated=str(tmp_path / "data/train.jsonl"), target=["quality"], responses=1, max_new_tokens=2,
                output=str(tmp_path / "answers.jsonl"), trainer=ComputeConfig(precision=precision),
            )
        )  # fmt: skip

    for job, name in ((label, "labelled"), (answer, "answers")):
        job(None)
        assert json.loads((tmp_path / f"{name}.run.json").read_text())["config"]["trainer"]["precision"] == "fp32"
        written = (tmp_path / f"{name}.manifest.json").stat().st_mtime_ns
        job("fp32")  # the same job, which is done
        assert (tmp_path / f"{name}.manifest.json").stat().st_mtime_ns == written
        job("bf16")  # another
        assert json.loads((tmp_path / f"{name}.manifest.json").read_text())["job"]["precision"] == "bf16"

    # weights stored in fp32 are read as what is asked for
    assert AttributeConditionedGPT.from_pretrained(tmp_path / "policy/model").cfg.precision == "fp32"
    model = AttributeConditionedGPT.from_pretrained(tmp_path / "policy/model", precision="bf16")
    exact = AttributeConditionedGPT.from_pretrained(tmp_path / "policy/model")
    for half, full in zip(model.chunks[0].parameters(), exact.chunks[0].parameters(), strict=True):
        assert half.dtype == torch.bfloat16 and torch.equal(half, full.bfloat16())


def test_a_regressor_in_bf16_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Its head is in fp32: two types in one group of the optimizer."""
    make_world(tmp_path)

    def steps(name: str, count: int, precision: str = "bf16", **optimizer: bool) -> list[float]:
        config = regressor_config(tmp_path, output=name, steps=count)
        config.trainer.precision, config.trainer.val_every = precision, None
        for key, value in optimizer.items():
            setattr(config.optimizer, key, value)
        train_regressor.main(config)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [row["train/loss"] for row in rows if "train/loss" in row]

    whole = steps("whole", 4)
    steps("parts", 2)
    shutil.copytree(tmp_path / "parts", tmp_path / "parts in fp32")
    assert steps("parts", 4) == whole
    assert steps("parts in fp32", 4, "fp32") == pytest.approx(whole, rel=2e-2)
    with pytest.raises(ConfigError, match="optimizer.distributed=false: megatron-core cannot save"):
        steps("whole undistributed", 2, distributed=False)
