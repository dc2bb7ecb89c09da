"""A run folder is entered by the same run alone; what is damaged or changed is said with its key."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from nemo_steerlm.errors import ConfigError
from nemo_steerlm.train.logs import JSONLLogger
from nemo_steerlm.train.run_folder import enter_run_folder
from tests.verbs.helpers import policy_config


def test_another_run_is_refused_by_the_key_that_differs(tmp_path: Path) -> None:
    config = policy_config(tmp_path)
    output = Path(config.output)
    enter_run_folder(output, config)
    enter_run_folder(output, config)
    config.optimizer.lr = 5e-4
    with pytest.raises(ConfigError) as error:
        enter_run_folder(output, config)
    said = "policy holds another run: optimizer.lr=0.001, now 0.0005; choose another output, or resume=false"
    assert said in str(error.value) and "{" not in str(error.value)


def test_a_damaged_config_says_what_to_do(tmp_path: Path) -> None:
    config = policy_config(tmp_path)
    output = Path(config.output)
    enter_run_folder(output, config)
    text = (output / "config.yaml").read_text()
    (output / "config.yaml").write_text(text[: len(text) // 2] + "\n\x00: [")
    with pytest.raises(ConfigError, match=r"config\.yaml: .* start over with resume=false"):
        enter_run_folder(output, config)
    enter_run_folder(output, dataclasses.replace(config, resume=False))
    assert (output / "config.yaml").read_text().count("lr: 0.001") == 1


def test_fewer_steps_than_before_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = policy_config(tmp_path, steps=10)
    enter_run_folder(Path(config.output), config)
    config.trainer.max_steps = 4
    with caplog.at_level(logging.INFO):
        enter_run_folder(Path(config.output), config)
    assert "trainer.max_steps was 10 and is 4 now" in caplog.text


def test_metrics_lose_a_half_line_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)  # whatever a trainer of another test made of it
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "train/lo')
    JSONLLogger(path).rewind(3)
    assert path.read_text().splitlines() == lines
    assert [found.name for found in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_keeps_the_reports_of_its_checkpoint_but_not_its_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 2, "straggler/rank": 1.0}, {"step": 2, "train/loss": 1.0}, {"step": 2, "val/loss": 1.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    JSONLLogger(path).rewind(2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:2]
