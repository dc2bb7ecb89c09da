"""`trainer.gpu` and the group that fills it."""

from __future__ import annotations

import pytest

from nemo_steerlm import config
from nemo_steerlm.config import compose
from nemo_steerlm.config.gpus import GPUS
from nemo_steerlm.errors import ConfigError

READ = ["checkpoint=m", "input=i.jsonl", "output=o"]
TRAIN = ["data.train=t", "output=o", "model.init=m", "attributes=helpsteer", "trainer.max_steps=4"]


def test_hardware_is_for_every_verb_that_computes() -> None:
    words = [*READ, "hardware=4x8xh100_80g", "parallel=tp8", "trainer.num_nodes=2"]
    trainer = compose.load("annotate", config.AnnotateConfig, words).trainer
    assert (trainer.gpu, trainer.devices, trainer.num_nodes, trainer.accelerator) == ("h100_80g", 8, 2, "gpu")
    with pytest.raises(ConfigError, match="trainer.gpu=h100: expected one of .*; did you mean 'h100_80g'"):
        compose.load("annotate", config.AnnotateConfig, [*READ, "trainer.gpu=h100"])


def test_fp8_needs_a_gpu_that_has_it() -> None:
    assert {name for name, gpu in GPUS.items() if not gpu.fp8} == {"a100_40g", "a100_80g"}
    with pytest.raises(ConfigError, match="trainer.precision=fp8: A100-80G .trainer.gpu=a100_80g. has none; use"):
        compose.load("train-sft", config.TrainSftConfig, [*TRAIN, "trainer.gpu=a100_80g", "trainer.precision=fp8"])
