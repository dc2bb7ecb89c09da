"""Parameter counts beside the published ones, and beside those of the built model."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_steerlm.config import LoRAConfig, ParallelConfig
from nemo_steerlm.plan.job import Job
from nemo_steerlm.plan.parameters import model_parameters, stage_parameters
from tests.plan.helpers import shape

# Parameters of the models' safetensors on the Hugging Face hub, as their pages state them.
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "mistral_7b": 7_248_023_552,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    found, trained = model_parameters(Job(architecture=shape(name)))
    assert found == trained == PUBLISHED[name]


def test_stages_and_ranks_sum_to_the_model() -> None:
    job = Job(architecture=shape("llama3_8b"))
    split = dataclasses.replace(job, devices=8, parallel=ParallelConfig(tensor=2, pipeline=4, sequence=True))
    norms = (2 * 32 + 1) * 4096  # each tensor-parallel rank has them
    held = 2 * sum(stage_parameters(stage).all for stage in split.stages())
    assert held - norms == model_parameters(job)[0]


def test_an_uneven_split_leaves_fewer_layers_to_the_last_stage() -> None:
    job = Job(architecture=shape("llama2_13b"), lora=LoRAConfig(), devices=3, parallel=ParallelConfig(pipeline=3))
    assert [stage.layers for stage in job.stages()] == [14, 14, 12]


def test_adapters() -> None:
    it = shape("llama2_7b")
    job = Job(architecture=it, lora=LoRAConfig(rank=8), trained="lora")
    hidden, inner = 4096, 11008
    a_layer = 8 * ((hidden + 3 * hidden) + (hidden + hidden) + (hidden + 2 * inner) + (inner + hidden))
    assert model_parameters(job)[1] == 32 * a_layer
