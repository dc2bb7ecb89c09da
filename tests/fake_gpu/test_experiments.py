"""`make test-dry`: one step of every experiment of conf/ at full size, on the first, a middle and the last stage."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_steerlm.config import AnnotateConfig, Architecture, SampleConfig, TrainRegressorConfig, TrainSftConfig
from nemo_steerlm.config.compose import draft
from nemo_steerlm.config.experiments import Experiment, experiments
from nemo_steerlm.config.gpus import GPUS
from nemo_steerlm.config.primary import conf_folder
from nemo_steerlm.fake_gpu.dry_run import Measured, MeasuredInference, measure, measure_inference
from nemo_steerlm.fake_gpu.memory import GIB
from nemo_steerlm.fake_gpu.room import Room
from nemo_steerlm.plan.job import training_job, with_micro_batches
from nemo_steerlm.plan.memory import stage_memory

pytestmark = pytest.mark.dry
TRAINING: dict[str, type[Any]] = {"train-sft": TrainSftConfig, "train-regressor": TrainRegressorConfig}
INFERENCE: dict[str, type[Any]] = {"annotate": AnnotateConfig, "sample": SampleConfig}
ONCE_A_STEP = {"finalize_model_grads", "get_grad_norm_fp32", "sum_over_ranks"}  # see benchmarks/RESULTS.md
AT_EVERY_EXCHANGE = {"_communicate"}  # between stages: megatron-core's own, `batch_p2p_sync`


def config_of(experiment: Experiment) -> Any:
    """What its command asks for."""
    _, verb, *words = shlex.split(experiment.command)
    return OmegaConf.to_object(draft(verb, {**TRAINING, **INFERENCE}[verb], words))


def shape_of(experiment: Experiment) -> Architecture:
    """The model in its name."""
    values = OmegaConf.load(conf_folder() / "model" / f"{experiment.model}.yaml").architecture
    architecture = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Architecture), values))
    assert isinstance(architecture, Architecture)
    return architecture


def stages(verbs: Collection[str]) -> list[Any]:
    """Every experiment of these verbs, at its first, a middle and its last stage."""
    found = []
    for experiment in experiments([conf_folder()]):
        if experiment.verb in verbs:
            count = config_of(experiment).parallel.pipeline
            for place in sorted({0, count // 2, count - 1}):
                name = f"{experiment.name}-{place}"
                found.append(pytest.param(experiment, place, id=name, marks=pytest.mark.xdist_group(name)))
    return found


def check(found: Measured | MeasuredInference, most: int, config: Any) -> None:
    """It fits the GPU that the experiment names."""
    print(json.dumps(asdict(found)))  # noqa: T201
    assert sum(found.parts.values()) == found.peak
    assert most < GPUS[config.trainer.gpu].memory, f"{most / GIB:.1f} GiB"


def test_every_experiment_is_of_a_verb_that_is_run() -> None:
    assert {experiment.verb for experiment in experiments([conf_folder()])} <= {*TRAINING, *INFERENCE}


@pytest.mark.parametrize(("experiment", "stage"), stages(TRAINING))
def test_a_step_of_training(room: Room, experiment: Experiment, stage: int) -> None:
    config = config_of(experiment)
    config.model.architecture = shape_of(experiment)
    found = measure(room, config, stage=stage)
    check(found, max(found.peak, found.saving), config)
    job = with_micro_batches(training_job(config, config.model.architecture), found.micro_batches)
    assert stage_memory(job.stages()[stage]).peak == pytest.approx(found.peak, rel=0.03)
    waits = {place.split()[-1]: count for place, count in found.waits.items()}
    assert all(count == 1 for name, count in waits.items() if name not in AT_EVERY_EXCHANGE), found.waits
    assert waits.keys() <= (ONCE_A_STEP | AT_EVERY_EXCHANGE if config.parallel.pipeline > 1 else ONCE_A_STEP)


@pytest.mark.parametrize(("experiment", "stage"), stages(INFERENCE))
def test_full_rows_of_inference(room: Room, experiment: Experiment, stage: int) -> None:
    config = config_of(experiment)
    found = measure_inference(room, config, shape_of(experiment), stage=stage)
    check(found, found.peak, config)
