"""Estimated memory beside that of the true step on fake CUDA tensors, for layers of every kind of model."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_steerlm.config import Architecture, LoRAConfig, ParallelConfig
from nemo_steerlm.config.compose import draft
from nemo_steerlm.config.plan import PLANNED
from nemo_steerlm.fake_gpu.dry_run import measure
from nemo_steerlm.fake_gpu.room import Room
from nemo_steerlm.plan.job import Job, training_job, with_micro_batches
from nemo_steerlm.plan.memory import stage_memory, storage
from tests.plan.helpers import shape

GIVEN = ("attributes=helpsteer", "model.tokenizer=none", "data.train=none", "output=none", "trainer.precision=bf16",
         "optimizer.lr=1e-5")  # fmt: skip
SFT, REGRESSOR = "train-sft", "train-regressor"
PACKED = "data.packing=true"
LORA = "model.lora.rank=16"


def config_of(verb: str, name: str, layers: int, words: str) -> tuple[Any, Architecture]:
    """A training of a model of conf/model, cut to so many layers."""
    settings = draft(
        verb, PLANNED[verb], [f"model={name}", f"model.architecture.num_layers={layers}", *GIVEN, *words.split()]
    )
    return OmegaConf.to_object(settings), shape(name, layers)


@pytest.mark.parametrize(
    ("verb", "name", "layers", "stage", "words"),
    [
        (SFT, "llama2_13b", 3, 0, "parallel=tp4 trainer.devices=8"),
        (SFT, "llama3_8b", 2, 0, f"parallel=tp2 trainer.devices=2 {PACKED}"),
        (SFT, "llama2_13b", 3, 0, LORA),
        (SFT, "llama2_13b", 3, 0, f"{LORA} trainer.recompute=full trainer.micro_batch_size=2 data.max_length=1024"),
        (SFT, "nemotron_4_15b", 4, 0, "parallel=tp2 trainer.devices=2 trainer.recompute=full optimizer.ema_decay=0.9"),
        (SFT, "qwen2_5_7b", 4, 1, "parallel=tp2_pp2 trainer.devices=8"),
        (SFT, "llama2_7b", 8, 0, f"parallel=pp2_vpp2 trainer.devices=2 {PACKED}"),
        (REGRESSOR, "qwen3_8b", 3, 0, "trainer.recompute=selective"),
        (REGRESSOR, "mistral_7b", 3, 0, "model.freeze=trunk trainer.micro_batch_size=2"),
        (REGRESSOR, "llama2_13b", 6, 0, f"parallel=tp2_pp2 trainer.devices=4 {LORA} {PACKED}"),
        (REGRESSOR, "llama2_7b", 2, 0, "trainer.precision=fp32 optimizer.distributed=false"),
        (REGRESSOR, "llama2_7b", 2, 0, "head=generative parallel=tp2 trainer.devices=2"),
    ],
    ids=str,
)
def test_memory_is_that_of_the_step(room: Room, verb: str, name: str, layers: int, stage: int, words: str) -> None:
    config, architecture = config_of(verb, name, layers, words)
    taken = measure(room, config, stage=stage, loss_share=1.0)
    job = with_micro_batches(training_job(config, architecture), taken.micro_batches)
    found = stage_memory(job.stages()[stage])
    assert (found.parameters.all, found.parameters.trained) == (taken.parameters, taken.trained)
    parts = dict(taken.parts)
    assert found.weights == pytest.approx(parts.pop("parameters"), rel=1e-3)
    assert found.gradients == pytest.approx(parts.pop("gradient buffers"), rel=1e-2)
    assert found.optimizer == pytest.approx(parts.pop("optimizer"), rel=2e-2)
    assert found.average == pytest.approx(parts.pop("average", 0), rel=1e-3)
    assert found.activations.peak == pytest.approx(sum(parts.values()), rel=0.03)
    assert found.peak == pytest.approx(taken.peak, rel=0.02)
    assert found.saving == pytest.approx(taken.saving, rel=0.03)


def test_the_optimizer_is_shared_by_data_parallel_ranks() -> None:
    job = Job(architecture=shape("llama2_7b"), devices=8)
    (stage,) = (stage_memory(stage) for stage in job.stages())
    assert stage.weights == 2 * 6_738_415_616 and stage.gradients == 4 * 6_738_415_616
    assert stage.optimizer == 12 * 6_738_415_616 // 8


def test_a_checkpoint_holds_every_trained_weight_once() -> None:
    job = Job(architecture=shape("llama2_7b"), devices=8, parallel=ParallelConfig(tensor=4, sequence=True))
    norms = 3 * 65 * 4096  # on the other tensor-parallel ranks
    found = storage(job, [stage_memory(stage) for stage in job.stages()])
    assert found.checkpoint == 14 * (6_738_415_616 + norms)
    adapters = Job(architecture=shape("llama2_7b"), trained="lora", lora=LoRAConfig(rank=16))
    (stage,) = (stage_memory(stage) for stage in adapters.stages())
    assert storage(adapters, [stage]).checkpoint == 14 * stage.parameters.trained
